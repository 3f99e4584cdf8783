"""The bridge: a tower that was trained contrastively as the image tokenizer of a language model."""

import pytest
import torch

import vlm
from tests import training
from tests.contrastive_runs import SHORT, run_from_scratch, write_bert, write_decoder
from tests.folders import write_parts
from tests.runs import stage_of
from vlm.systems.pretrained import load_vision
from vlm.training.runs import decoder_only as recipe
from vlm.training.runs.contrastive import Settings
from vlm.weights import same_bits

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return run_from_scratch(tmp_path_factory.mktemp("scratch") / "run")


def test_folder_without_a_pooling_has_no_pooled_vector(tmp_path):
    write_decoder(tmp_path / "decoder")
    text = write_bert(tmp_path / "bert")
    settings = Settings(vision=str(tmp_path / "decoder"), text=text, pool="own")
    with pytest.raises(ValueError, match=r"pooled vector is asked of .* saved without one"):
        settings.build()


def assert_same_tower(tokenizer, trained):
    """Bit for bit, but for what pools."""
    before, after = trained.state_dict(), tokenizer.state_dict()
    assert same_bits({name: before[name] for name in after}, after)
    return {name for name in before if name not in after}


@pytest.mark.parametrize("image_px", [None, (32, 48)])
def test_trained_tokenizer_begins_stage_1(scratch, tmp_path, image_px):
    """Of a model with a head that pools, at the size that it was trained for and at another."""
    _, language = write_parts(tmp_path, "siglip", "llama")
    stage1 = stage_of("stage1_adaptor")
    settings = stage1.Settings(
        **SHORT | {"held_out_rows": 2, "batch": 2}, out=tmp_path / "s1", vision=str(scratch[0]),
        text=language, adaptor="mlp", image_px=image_px,
    )  # fmt: skip
    recipe.run(settings, stage1.stage, stage1.objective)
    model = vlm.load(tmp_path / "s1", dtype="stored")
    trained = vlm.load(scratch[0], dtype="stored").module.tokenizer
    gone = assert_same_tower(model.module.tokenizer, trained)
    assert gone
    assert all(name.startswith("backbone.head.") for name in gone)
    assert model.processor.pixel_spec.size_hw == (image_px or (16, 16))
    assert model.module.tokenizer(torch.zeros(1, 3, 32, 48)).grid_hw == (4, 6)


@pytest.mark.parametrize("size_hw", [None, (64, 32)])
@pytest.mark.parametrize("image", ["mean", "class", "own", "net, mean"])
def test_timm_tower_crosses_the_bridge(tmp_path, image, size_hw):
    """Patch tokens alone, whatever the pooling read; positions resized."""
    from tests.contrastive_models import model
    from vlm.families.contrastive.model import ContrastiveModel

    trained = model(image)
    processor = training.contrastive_model().processor
    processor.pixel_spec = trained.tokenizer.pixel_spec
    ContrastiveModel(module=trained, processor=processor).save(tmp_path)
    tokenizer = load_vision(str(tmp_path), size_hw)
    sizes = size_hw or trained.tokenizer.pixel_spec.size_hw
    pixels = torch.randn(2, 3, *sizes)
    with torch.no_grad():
        images = tokenizer(pixels)
    assert images.tokens.shape[1] == tokenizer.tokens_for(sizes)
    assert images.tokens.shape[1] == images.grid_hw[0] * images.grid_hw[1]
    assert images.pooled is None
    if size_hw is None or image == "net, mean":
        assert not assert_same_tower(tokenizer, trained.tokenizer)
        expected = trained.tokenizer(pixels)
        patches = expected.tokens[:, expected.shape.prefix :]
        torch.testing.assert_close(images.tokens, patches.detach())
    else:
        before, after = trained.tokenizer.state_dict(), tokenizer.state_dict()
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        assert changed == {"backbone.pos_embed"}
