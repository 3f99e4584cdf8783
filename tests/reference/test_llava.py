"""LLaVA 1.5 and LLaVA-NeXT beside transformers' classes: pixels, ids, logits, training, answers."""

import pytest
import torch

import vlm
from tests.reference import images_in_text as law
from tests.reference import tiny_llava
from tests.reference.images_in_text import close, our_logits, reopened, with_marks
from tests.reference.tiny_llava import (
    GRID,
    KINDS,
    PINPOINTS,
    SIZES,
    examples,
    our_batch,
    their_inputs,
    write_folder,
)
from tests.tiny import image as one_image
from vlm.data.example import Example, Turn
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.batch import IMAGE, collate
from vlm.systems import llava

folder = law.folders(KINDS, write_folder)


def is_next(model):
    return model.reference.model_type == "llava_next"


def test_llava_pixels_and_ids_match_reference(folder):
    """Images that are not square, small, large and narrow, of one view, and of each resolution."""
    model, (_, processor) = vlm.load(folder, "cpu"), reopened(folder)
    layouts = set()
    for size_hw in (*SIZES.values(), *map(tuple, PINPOINTS)):
        image, prompt = one_image(3, size_hw), "what is <image>\n a cat"
        row = model.processor.encode_literal([image], prompt)
        inputs = processor(images=[image], text=[prompt], return_tensors="pt")
        assert torch.equal(with_marks(row.ids, model), inputs["input_ids"][0])
        theirs = inputs["pixel_values"][0] if is_next(model) else inputs["pixel_values"]
        close(torch.stack([view for view, _ in row.views]), theirs, 1e-6)
        whole, *joined = row.layout.images[0].spans
        assert (whole.length, whole.grid_hw) == (GRID**2, (GRID, GRID))
        layouts.add(tuple(span.grid_hw for span in joined))
    assert len(layouts) > 6 if is_next(model) else layouts == {()}


@pytest.mark.parametrize("answers", [False, True])
def test_llava_ids_and_logits_match_reference(folder, answers):
    law.check_ids_and_logits(folder, tiny_llava, answers)


def test_llava_loss_and_gradients_match_reference(folder):
    """The newline embedding learns."""
    gradients = law.check_loss_and_gradients(folder, tiny_llava, llava.KEY_MAPS)
    assert ("adaptor.newline" in gradients) == is_next(vlm.load(folder, "cpu"))


def test_llava_training_step_changes_every_part(folder, tmp_path):
    """What was trained is what is saved: the newline embedding too."""
    model = law.check_every_part_learns(folder, tiny_llava)
    model.save(tmp_path, layout="reference")
    peer, processor = reopened(tmp_path)
    with torch.no_grad():
        expected = peer(**their_inputs(processor)).logits
        batch = our_batch(model)
        close(our_logits(model, batch)[batch.valid], expected[batch.valid])


@pytest.mark.parametrize("pack", [None, 800])
def test_llava_trains_by_the_same_loop(folder, tmp_path, pack):
    law.check_trains_by_the_loop(folder, tiny_llava, tmp_path, pack)


def test_llava_greedy_ids_match_reference_and_batches(folder):
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    batch = our_batch(model)
    written = engine.generate(
        model.module, batch, model.stop_ids, model.processor.pad_id, max_new_tokens=10
    )
    inputs = their_inputs(processor)
    theirs = peer.generate(
        **inputs, max_new_tokens=10, do_sample=False, eos_token_id=list(model.stop_ids)
    )
    theirs = theirs[:, inputs["input_ids"].shape[1] :].tolist()
    for number, (ids, _) in enumerate(written):
        assert ids == theirs[number][: len(ids)]
        (alone,) = model.answer_examples([examples(True)[number]], max_new_tokens=10)
        assert alone == model.processor.decode(ids)
    assert len({tuple(ids) for ids, _ in written}) > 1


@torch.no_grad()
def test_llava_full_strategy_keeps_the_class_token(tmp_path):
    write_folder(tmp_path, "llava", vision_feature_select_strategy="full")
    model, (peer, processor) = vlm.load(tmp_path, "cpu"), reopened(tmp_path)
    batch, inputs = our_batch(model), their_inputs(processor)
    assert batch.ids.eq(IMAGE).sum(1).tolist() == [GRID**2 + 1, 2 * (GRID**2 + 1), 0]
    assert torch.equal(with_marks(batch.ids, model)[batch.valid], inputs["input_ids"][batch.valid])
    close(our_logits(model, batch)[batch.valid], peer(**inputs).logits[batch.valid])


@torch.no_grad()
def test_llava_opens_folders_with_an_image_processor_of_their_own(tmp_path):
    write_folder(tmp_path, "llava", images={"name": "LlavaImageProcessor"})
    model, (peer, processor) = vlm.load(tmp_path, "cpu"), reopened(tmp_path)
    assert type(processor.image_processor).__name__ == "LlavaImageProcessor"
    batch, inputs = our_batch(model), their_inputs(processor)
    (group,) = batch.groups
    close(group.pixels, inputs["pixel_values"], 1e-6)
    close(our_logits(model, batch)[batch.valid], peer(**inputs).logits[batch.valid])


@pytest.mark.parametrize("layer", [-1, -3, 1])
@torch.no_grad()
def test_llava_reads_the_layer_that_a_folder_names(layer, tmp_path):
    write_folder(tmp_path, "llava", vision_feature_layer=layer)
    model, (peer, processor) = vlm.load(tmp_path, "cpu"), reopened(tmp_path)
    batch = our_batch(model)
    close(
        our_logits(model, batch)[batch.valid], peer(**their_inputs(processor)).logits[batch.valid]
    )


def text_of(row, tokenizer):
    """A row's text, runs of image tokens as their length in brackets."""
    text, run = "", 0
    for id in [*row.ids.tolist(), None]:
        if id == IMAGE:
            run += 1
            continue
        text += f"[{run}]" * (run > 0)
        run = 0
        text += "" if id is None else tokenizer.convert_ids_to_tokens(id)
    return text.replace("▁", " ")


def test_llava_prompt_matches_snapshot(folder):
    """A text that spells the image's mark stays text."""
    model = vlm.load(folder, "cpu")
    turns = (Turn("user", (None, "a <image>?")), Turn("assistant", ("it",)))
    row = model.processor.encode(Example("r", turns, (one_image(1, (64, 64)),)))
    text = text_of(row, model.processor.text_tokenizer)
    if is_next(model):
        length = GRID**2 + 2 * GRID * (2 * GRID + 1)
        assert text == f"<s> [INST] [{length}]\na <image>? [/INST] it</s>"
    else:
        assert text == f"<s> USER: [{GRID**2}]\na <image>? ASSISTANT: it</s>"
    scored = model.processor.text_tokenizer.convert_ids_to_tokens(row.ids[row.scored].tolist())
    assert scored == ["▁i", "t", "</s>"]


def test_llava_next_image_alone_matches_its_place_among_others(tmp_path):
    """Tokens of an image depend on no other image, whatever the order of rows."""
    write_folder(tmp_path, "llava_next")
    model = vlm.load(tmp_path, "cpu")
    rows = [model.processor.encode_prompt(example) for example in examples(False)]
    with torch.no_grad():
        for part in (rows, rows[::-1], rows[:1]):
            batch = collate(part, 0)
            tokens, example = model.module.encode(batch.groups, batch.arrangement)
            at = next(i for i, row in enumerate(part) if row.name == "r0")
            own = tokens[example == at]
            if part is rows:
                expected = own
            close(own, expected, 1e-6)


def test_llava_chat_says_what_an_answer_says(folder):
    law.check_chat_says_what_an_answer_says(folder, tiny_llava)


def test_llava_is_listed_and_used_by_commands(folder, tmp_path, capsys):
    law.check_is_listed_and_used_by_commands(folder, tmp_path, capsys, "llava_next")
