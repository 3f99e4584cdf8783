"""What decoder-only recipes take from the model that they go on from."""

import pytest

import vlm
from tests.reference import tiny_llava, tiny_paligemma, tiny_smolvlm
from tests.runs import stage_of


@pytest.mark.parametrize(
    ("tiny", "kind", "prompt"),
    [
        (tiny_smolvlm, "smolvlm", "Can you describe this image?"),
        (tiny_paligemma, "gemma", "caption en"),
        (tiny_llava, "llava", "Describe the picture."),
    ],
    ids=["smolvlm", "paligemma", "llava"],
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
