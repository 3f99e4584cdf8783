import io

import pytest
import torch

from tests import tiny
from vlm.data.example import caption_example
from vlm.families.contrastive.batch import collate_pairs
from vlm.pixels.image_ref import ImageRef
from vlm.systems import scratch
from vlm.weights import same_bits

SIZES = dict(image_px=16, patch_px=8, width=64, depth=1, text_width=128, text_depth=2, length=12,
             embed_width=24)  # fmt: skip


def build(loss="sigmoid", seed=0, **sizes):
    return scratch.build(scratch.ScratchConfig(**SIZES | sizes), loss, seed)


def test_model_is_of_the_sizes_asked():
    parts = build()
    module = parts.module
    assert not module.training
    assert module.dim == 24
    assert module.tokenizer.dim == 64
    assert module.tokenizer.tokens_for((30, 70)) == 4
    assert module.text.dim == 128
    assert len(module.text.backbone.encoder.layers) == 2
    assert parts.processor.length == 12
    assert parts.processor.pixel_spec.size_hw == (16, 16)
    examples = [caption_example(f"r{i}", ImageRef(png(i), "r"), "a cat", "") for i in range(2)]
    with torch.no_grad():
        images, texts = module(collate_pairs([parts.processor.encode(e) for e in examples]))
    assert images.shape == texts.shape == (2, 24)


def png(seed):
    data = io.BytesIO()
    tiny.image(seed).save(data, "PNG")
    return data.getvalue()


def test_loss_decides_scale_and_bias():
    """Source: SigLIP, section 3.2; CLIP, section 2.5."""
    module = build("sigmoid").module
    assert (module.log_scale.exp().item(), module.bias.item()) == (pytest.approx(10), -10)
    module = build("softmax").module
    assert module.log_scale.exp().item() == pytest.approx(1 / 0.07)
    assert module.bias is None


def test_seed_decides_the_weights_and_the_global_generator_stays():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = build(seed=1).module.state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert same_bits(first, build(seed=1).module.state_dict())
    other = build(seed=2).module.state_dict()
    assert not torch.equal(first["image_head.weight"], other["image_head.weight"])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(image_px=20), "image_px must be a multiple of patch_px, found 20 and 8"),
        (dict(width=100), "width must be a multiple of 64, found 100"),
        (dict(text_width=100), "text_width must be a multiple of 64, found 100"),
        (dict(patch_px=0), "patch_px must be at least 1, found 0"),
        (dict(text_depth=0), "text_depth must be at least 1, found 0"),
        (dict(embed_width=-1), "embed_width must be at least 1, found -1"),
        (dict(length=2), "length 2 leaves no token beside 2 tokens of every text"),
        (dict(loss="triplet"), "loss is one of softmax, sigmoid, found 'triplet'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        build(**sizes)
