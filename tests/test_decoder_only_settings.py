"""What decoder-only recipes take from the model that they go on from."""

from fnmatch import fnmatch

import pytest

import vlm
from tests import towers
from tests.reference import tiny_kosmos2, tiny_llava, tiny_paligemma, tiny_qwen2_vl, tiny_smolvlm
from tests.runs import stage_of
from vlm.tokenizers.paired import AverageNeck, PairedTokenizer
from vlm.training.runs.decoder_only_settings import high_resolution_frozen
from vlm.training.stages import FROZEN


@pytest.mark.parametrize(
    ("tiny", "kind", "prompt"),
    [
        (tiny_smolvlm, "smolvlm", "Can you describe this image?"),
        (tiny_paligemma, "gemma", "caption en"),
        (tiny_llava, "llava", "Describe the picture."),
        (tiny_kosmos2, "kosmos-2", "An image of"),
        (tiny_qwen2_vl, "qwen2_vl", "Describe this image."),
    ],
    ids=["smolvlm", "paligemma", "llava", "kosmos2", "qwen2_vl"],
)
def test_caption_prompt_of_a_published_model_is_kept(tmp_path, tiny, kind, prompt):
    """In the data, which are opened before the model, and in the model that is trained."""
    tiny.write_folder(tmp_path, kind)
    stage = stage_of("stage3_sft")
    settings = stage.Settings(previous=str(tmp_path))
    assert settings.caption_prompt == vlm.load(tmp_path, "cpu").caption_prompt == prompt
    assert settings.build().caption_prompt == prompt
    asked = stage.Settings(previous=str(tmp_path), prompt="Say it.")
    assert asked.caption_prompt == asked.build().caption_prompt == "Say it."


def test_caption_prompt_says_what_a_folder_without_a_model_lacks(tmp_path):
    settings = stage_of("stage3_sft").Settings(previous=str(tmp_path))
    with pytest.raises(ValueError, match=r"expected config.json here or in model/"):
        _ = settings.caption_prompt


def two_towers():
    """A model whose image tokenizer has a tower of high resolution and one of low."""
    high, low = towers.timm_vit(size_hw=(64, 64)), towers.timm_vit(size_hw=(32, 32))
    return towers.composed(
        PairedTokenizer(high, low, low_from="picture", high_neck=AverageNeck(high.dim))
    )


@pytest.mark.parametrize(
    ("make", "path"),
    [(two_towers, "tokenizer.low."), (lambda: towers.composed(towers.timm_vit()), "tokenizer.")],
    ids=["two towers", "one tower"],
)
def test_lora_of_the_image_tokenizer_leaves_its_high_resolution_tower_alone(make, path):
    module = make()
    stage_of("stage3_sft").Settings(previous="x", vision="lora", lora_rank=2).add_lora(module)
    names = [name for name, _ in module.named_parameters() if "lora_" in name]
    assert names
    assert all(name.startswith(path) for name in names)


def test_high_resolution_tower_alone_is_frozen():
    module = two_towers()
    [(pattern, rate)] = high_resolution_frozen(module)
    matched = {name for name, _ in module.named_parameters() if fnmatch(name, pattern)}
    assert matched == {f"tokenizer.high.{n}" for n, _ in module.tokenizer.high.named_parameters()}
    assert rate is FROZEN
    assert high_resolution_frozen(towers.composed(towers.timm_vit())) == ()
