"""Idefics3 and SmolVLM beside transformers' classes: pixels, ids, logits, training, answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import vlm
from tests.reference import images_in_text as law
from tests.reference import tiny_smolvlm
from tests.reference.images_in_text import close, our_logits, reopened, with_marks
from tests.reference.tiny_smolvlm import (
    IMAGE_TOKENS,
    KINDS,
    LONG,
    ROWS,
    SIZES,
    TILE,
    examples,
    their_inputs,
    write_folder,
)
from tests.tiny import image as one_image
from vlm.data.example import Example, Turn
from vlm.families.decoder_only.batch import IMAGE, collate
from vlm.systems import smolvlm

folder = law.folders(KINDS, write_folder)


SETTINGS = {
    "three tiles a side": {},
    "one tile": {"size": {"longest_edge": TILE}},
    "a side between tiles": {"size": {"longest_edge": LONG - 12}},
    "no tiles": {"do_image_splitting": False},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_smolvlm_pixels_and_ids_match_reference(kind, settings, tmp_path):
    """Images that are not square, small, large, and narrow; of one tile alone."""
    write_folder(tmp_path, kind, image_processor=SETTINGS[settings])
    model, (_, processor) = vlm.load(tmp_path, "cpu"), reopened(tmp_path)
    shapes = set()
    for size_hw in SIZES.values():
        image, prompt = one_image(3, size_hw), "what is <image>? a cat"
        row = model.processor.encode_literal([image], prompt)
        inputs = processor(images=[[image]], text=[prompt], return_tensors="pt")
        assert torch.equal(with_marks(row.ids, model), inputs["input_ids"][0])
        close(torch.stack([view for view, _ in row.views]), inputs["pixel_values"][0], 1e-6)
        (layout,) = row.layout.images
        assert [span.length for span in layout.spans] == [IMAGE_TOKENS] * len(row.views)
        assert {span.grid_hw for span in layout.spans} == {(2, 2)}
        shapes.add(model.processor.pixel_spec.layout(size_hw))
    assert (shapes == {(1, 1)}) == (settings in ("one tile", "no tiles"))


@pytest.mark.parametrize("answers", [False, True])
def test_smolvlm_ids_and_logits_match_reference(folder, answers):
    law.check_ids_and_logits(folder, tiny_smolvlm, answers)


def test_smolvlm_loss_and_gradients_match_reference(folder):
    key_maps = dict.fromkeys(KINDS, smolvlm.KEY_MAP)
    law.check_loss_and_gradients(folder, tiny_smolvlm, key_maps)


def test_smolvlm_training_step_changes_every_part(folder):
    law.check_every_part_learns(folder, tiny_smolvlm)


@pytest.mark.parametrize("pack", [None, 800])
def test_smolvlm_trains_by_the_same_loop(folder, tmp_path, pack):
    law.check_trains_by_the_loop(folder, tiny_smolvlm, tmp_path, pack)


def test_smolvlm_greedy_ids_match_reference_and_batches(folder):
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    together = model.answer_examples(examples(), max_new_tokens=10)
    inputs = their_inputs(processor)
    theirs = peer.generate(
        **inputs, max_new_tokens=10, do_sample=False, eos_token_id=list(model.stop_ids)
    )
    theirs = theirs[:, inputs["input_ids"].shape[1] :].tolist()
    assert together == [model.processor.decode(ids) for ids in theirs]
    for number, (images, content, _) in enumerate(ROWS):
        literal = "".join("<image>" if part is None else part for part in content)
        text = their_text(model, content)
        (written,) = model.generate([images], [text], max_new_tokens=10)
        assert list(written.ids) == theirs[number][: len(written.ids)], literal
    assert len(set(together)) > 1


def their_text(model, content):
    """The prompt of a question without the token that begins it where the tokenizer adds one."""
    marked = model.processor.chat_template.render((Turn("user", content),), "row", open_answer=True)
    text = marked.replace("\ue5c0", "<image>")
    adds = bool(model.processor.text_tokenizer("")["input_ids"])
    return text.removeprefix("<|begin_of_text|>") if adds else text


def test_smolvlm_prompt_matches_snapshot(folder):
    processor = vlm.load(folder, "cpu").processor
    row = processor.encode_prompt(
        Example("r", (Turn("user", (None, "a <image>?")),), (one_image(1, (40, 60)),))
    )
    text, run = "", 0
    for id in row.ids.tolist():
        if id == IMAGE:
            run += 1
            continue
        text += f"[{run}]" * (run > 0) + processor.text_tokenizer.decode([id])
        run = 0
    fake, begins = "<fake_token_around_image>", processor.text_tokenizer.bos_token
    assert text == (
        f"{begins}User:"
        f"{fake}<row_1_col_1>[4]{fake}<row_1_col_2>[4]{fake}<row_1_col_3>[4]\n"
        f"{fake}<row_2_col_1>[4]{fake}<row_2_col_2>[4]{fake}<row_2_col_3>[4]\n"
        f"\n{fake}<global-img>[4]{fake}a <image>?<end_of_utterance>\nAssistant:"
    )


def test_smolvlm_counts_image_tokens_by_the_layout_whatever_the_pixels(folder):
    """transformers' class drops views that are zero all over, such as those of a black image where
    nothing is normalised."""
    model = vlm.load(folder, "cpu")
    grey = Image.fromarray(np.full((40, 90, 3), 127, np.uint8))
    batch = collate([model.processor.encode_literal([grey], "<image> what is it?")], 0)
    (group,) = batch.groups
    zero = torch.zeros_like(group.pixels)
    batch = replace(batch, groups=(replace(group, pixels=zero),))
    assert our_logits(model, batch).isfinite().all()
    assert int((batch.ids == IMAGE).sum()) == IMAGE_TOKENS * len(zero) == 7 * IMAGE_TOKENS


def test_smolvlm_chat_says_what_an_answer_says(folder):
    law.check_chat_says_what_an_answer_says(folder, tiny_smolvlm)


def test_smolvlm_is_listed_and_used_by_commands(folder, tmp_path, capsys):
    law.check_is_listed_and_used_by_commands(folder, tmp_path, capsys, "smolvlm")
