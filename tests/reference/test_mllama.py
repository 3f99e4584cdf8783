"""Mllama beside transformers' class: ids, logits, training, answers; and the authors' rule for text
that sees no image, which transformers' class has not."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

import vlm
from tests.reference import images_in_text as law
from tests.reference import tiny_mllama
from tests.reference.images_in_text import close, examples_of, our_logits, reopened, with_marks
from tests.reference.tiny_mllama import (
    BEGINS,
    MARK,
    MORE_ROWS,
    PLACES,
    ROWS,
    SIDE,
    examples,
    our_batch,
    processor_of,
    text_tokenizer,
    their_inputs,
    write_folder,
)
from tests.tiny import image as one_image
from vlm.data.example import BadRow, Example, Turn
from vlm.families.decoder_only.batch import IMAGE, collate, collate_packed
from vlm.losses.token import token_losses
from vlm.systems import mllama
from vlm.systems.published import first_names, published_name
from vlm.training.activation_checkpointing import checkpoint_activations, saved_bytes

folder = law.folders(("mllama",), write_folder)

EVERY_ROW = [*ROWS, *MORE_ROWS]
ONE_IMAGE = [ROWS[0], MORE_ROWS[1]]
"""Rows of one image each: transformers' results of rows in a batch are those of each alone where
all have as many images."""
BEFORE, SEEN, AFTER = "what is a cat? it is ", None, " a cat."


def opened(folder, reference_mask=True):
    model = vlm.load(folder, "cpu")
    if reference_mask:
        mllama.use_reference_mask(model)
    return model


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("answers", [False, True])
@torch.no_grad()
def test_mllama_ids_and_logits_match_reference(folder, answers, padding):
    """None, one and two images; portrait, wide, tiny; in one batch, each row as transformers has it
    alone."""
    model, (peer, processor) = opened(folder), reopened(folder)
    batch = our_batch(model, answers, padding, EVERY_ROW)
    logits = our_logits(model, batch)
    for number, row in enumerate(EVERY_ROW):
        inputs = their_inputs(processor, [row], answers)
        valid = batch.valid[number]
        assert torch.equal(
            with_marks(batch.ids[number], model, MARK)[valid], inputs["input_ids"][0]
        )
        close(logits[number][valid], peer(**inputs).logits[0])


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_mllama_logits_of_a_batch_match_those_of_the_reference(folder, padding):
    model, (peer, processor) = opened(folder), reopened(folder)
    batch = our_batch(model, True, padding, ONE_IMAGE)
    inputs = their_inputs(processor, ONE_IMAGE, True, padding)
    assert torch.equal(batch.valid, inputs["attention_mask"].bool())
    expected = peer(**inputs).logits
    close(our_logits(model, batch)[batch.valid], expected[batch.valid])


@torch.no_grad()
def test_mllama_reads_images_of_one_colour(folder):
    """A grey image is no padding, nor is one whose every pixel is zero after normalising."""
    model, (peer, processor) = opened(folder), reopened(folder)
    for colour in ((127, 127, 127), (0, 0, 0), (255, 255, 255)):
        row = ([Image.new("RGB", (90, 40), colour)], (None, "what is it?"), "a cat")
        logits = our_logits(model, our_batch(model, False, rows=[row]))
        close(logits, peer(**their_inputs(processor, [row])).logits)


def test_mllama_greedy_ids_match_reference_and_batches(folder):
    model, (peer, processor) = opened(folder), reopened(folder)
    options = dict(max_new_tokens=10)
    together = model.answer_examples(examples(True, EVERY_ROW), **options)
    for number, row in enumerate(EVERY_ROW):
        inputs = their_inputs(processor, [row])
        theirs = peer.generate(
            **inputs, **options, do_sample=False, eos_token_id=list(model.stop_ids)
        )[0, inputs["input_ids"].shape[1] :].tolist()
        assert together[number] == model.processor.decode(theirs)
        asked = model.processor.encode_prompt(examples_of([row], False)[0])
        (written,) = model.write_after([asked], **options)
        assert list(written.ids) == theirs[: len(written.ids)]
    assert len(set(together)) > 2


def test_mllama_beams_do_not_depend_on_the_batch(folder):
    model = opened(folder, reference_mask=False)
    options = dict(max_new_tokens=6, num_beams=3)
    rows = examples(True, EVERY_ROW)
    together = model.answer_examples(rows, **options)
    assert together == [model.answer_examples([row], **options)[0] for row in rows]


def before_an_image(model, seed):
    """Logits of a prompt whose image stands after text, and the position of its mark."""
    prompt = f"{BEFORE}{MARK}{AFTER}"
    batch = collate([model.processor.encode_literal([one_image(seed, (40, 90))], prompt)], 0)
    return our_logits(model, batch)[0], int((batch.ids[0] == IMAGE).nonzero())


@torch.no_grad()
def test_mllama_text_before_an_image_does_not_depend_on_it(folder):
    """Exactly, by the authors' rule; by transformers' it does."""
    model = opened(folder, reference_mask=False)
    (one, at), (other, _) = before_an_image(model, 1), before_an_image(model, 2)
    assert at > 3
    assert torch.equal(one[:at], other[:at])
    assert (one[at:] - other[at:]).abs().amax(-1).min() > 1e-3
    alone = collate([model.processor.encode_literal([], BEFORE.strip())], 0)
    close(our_logits(model, alone)[0], one[: alone.ids.shape[1]], 1e-5)
    mllama.use_reference_mask(model)
    moved = before_an_image(model, 1)[0] - before_an_image(model, 2)[0]
    assert moved[:at].abs().max() > 1e-3
    mllama.use_reference_mask(model, on=False)
    assert torch.equal(before_an_image(model, 1)[0], one)


@torch.no_grad()
def test_mllama_default_is_the_reference_without_attention_of_text_that_sees_no_image(folder):
    """The authors' rule in transformers' class: the attention's output is zero there, as that of
    the feed-forward layer is."""
    model, (peer, processor) = opened(folder, reference_mask=False), reopened(folder)
    inputs = their_inputs(processor, [MORE_ROWS[1]])
    sees = inputs["cross_attention_mask"][0].flatten(1).any(1)
    assert not sees.all()

    def blind(module, arguments, output):
        return (output[0] * sees[None, :, None], *output[1:])

    for layer in peer.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            layer.cross_attn.register_forward_hook(blind)
    batch = our_batch(model, rows=[MORE_ROWS[1]])
    close(our_logits(model, batch), peer(**inputs).logits)


@torch.no_grad()
def test_mllama_logits_do_not_depend_on_the_batch(folder):
    """Rows with and without images, of unequal tiles and texts, padded and packed."""
    model = opened(folder, reference_mask=False)
    rows = [model.processor.encode(example) for example in examples(True, EVERY_ROW)]
    alone = [our_logits(model, collate([row], 0))[0] for row in rows]
    for padding in ("left", "right"):
        batch = collate(rows, 0, padding)
        for number, logits in enumerate(our_logits(model, batch)):
            close(logits[batch.valid[number]], alone[number], 1e-5)
    close(our_logits(model, collate_packed(rows))[0], torch.cat(alone), 1e-5)


def test_mllama_memory_has_the_tokens_of_tiles_that_are_there(folder):
    model = vlm.load(folder, "cpu")
    row = ([one_image(1, (90, 30)), one_image(2, (20, 20))], (None, "and", None), "a")
    batch = our_batch(model, rows=[row])
    assert [group.pixels.shape[-2:] for group in batch.groups] == [(3 * SIDE, SIDE), (SIDE, SIDE)]
    for count, model_of in ((None, opened(folder, False)), (4, opened(folder))):
        memory = model_of.module.encode(batch.groups)
        tiles = (count or 3, count or 1)
        assert memory.bounds == ((0, tiles[0] * PLACES, sum(tiles) * PLACES),)
        assert memory.tokens.shape == (sum(tiles) * PLACES, 32)


def test_mllama_loss_and_gradients_match_reference(folder):
    model, (peer, processor) = opened(folder), reopened(folder)
    batch = our_batch(model, True, "right", ONE_IMAGE)
    inputs = their_inputs(processor, ONE_IMAGE, True, "right")
    labels = with_marks(batch.ids, model, MARK).masked_fill(~batch.scored, -100)
    expected = peer(**inputs, labels=labels).loss
    loss = token_losses(model.module(batch), batch.targets).mean()
    close(loss, expected, atol=1e-5)
    loss.backward()
    expected.backward()
    key_map = mllama.key_map_of([1, 3], 5)
    theirs = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    renamed, _ = first_names(theirs, key_map, (), "peer")
    ours = {name: p.grad for name, p in model.module.named_parameters()}
    assert len(renamed) == len(ours)
    for name, grad in ours.items():
        assert grad.abs().max() > 0
        close(grad, renamed[published_name(name, key_map)], atol=2e-4)


@pytest.mark.parametrize("reference_mask", [False, True])
def test_mllama_loss_is_that_of_rows_end_to_end(folder, reference_mask):
    model = opened(folder, reference_mask)
    rows = [model.processor.encode(example) for example in examples(True, EVERY_ROW)]
    losses = [
        token_losses(model.module(batch), batch.targets).sum()
        for batch in (collate(rows, 0), collate_packed(rows))
    ]
    close(*losses, 1e-4)


def test_mllama_training_step_changes_every_part(folder):
    law.check_every_part_learns(folder, tiny_mllama)


def test_mllama_activations_that_are_computed_again_give_the_same_gradients(folder):
    found = []
    for parts in ((), ("tokenizer", "text")):
        model = vlm.load(folder, "cpu")
        checkpoint_activations(model.module, parts)
        batch = our_batch(model, True, "right")
        with saved_bytes() as kept:
            loss = token_losses(model.module(batch), batch.targets).mean()
        loss.backward()
        grads = [p.grad for p in model.module.parameters()]
        found.append((loss.detach(), grads, sum(kept.values())))
    (loss, grads, bytes_), (again, its, fewer) = found
    close(loss, again, 1e-6)
    for one, other in zip(grads, its, strict=True):
        close(one, other, 1e-6)
    assert fewer < 0.6 * bytes_


@pytest.mark.parametrize("pack", [None, 200])
def test_mllama_trains_by_the_same_loop(folder, tmp_path, pack):
    law.check_trains_by_the_loop(folder, tiny_mllama, tmp_path, pack)


PROMPTS = {
    f"{MARK}what is it?": 1,
    f"{MARK}{MARK}what is it?": 2,
    f"what is {MARK} it?": 1,
    f"{BEGINS}{MARK}what is it?": 1,
    f"{MARK}{BEGINS}what is it?": 1,
    "what is it?": 0,
}


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_mllama_literal_prompts_begin_once_as_those_of_the_reference(prompt, adds_bos, tmp_path):
    """transformers' processor writes the first token after leading images; a text tokenizer that
    adds one by itself would write a second."""
    write_folder(tmp_path, adds_bos=adds_bos)
    model = vlm.load(tmp_path, "cpu")
    images = [one_image(seed, (30, 60)) for seed in range(PROMPTS[prompt])]
    row = model.processor.encode_literal(images, prompt)
    inputs = processor_of(text_tokenizer(adds_bos))(
        text=prompt, images=images or None, add_special_tokens=False, return_tensors="pt"
    )
    assert torch.equal(with_marks(row.ids, model, MARK), inputs["input_ids"][0])
    assert int((row.ids == model.processor.text_tokenizer.bos_token_id).sum()) == 1
    asked = Example("r", (Turn("user", ("what?",)),))
    ids = model.processor.encode_prompt(asked).ids
    assert int((ids == model.processor.text_tokenizer.bos_token_id).sum()) == 1


def test_mllama_prompt_matches_snapshot(folder):
    processor = vlm.load(folder, "cpu").processor
    row = processor.encode_prompt(
        Example("r", (Turn("user", (None, "a <image>?")),), (one_image(1, (40, 60)),))
    )
    ids = row.ids.tolist()
    assert ids.count(IMAGE) == 1
    text = processor.text_tokenizer.decode([id for id in ids if id != IMAGE])
    at = ids.index(IMAGE)
    before = processor.text_tokenizer.decode(ids[:at])
    assert before == f"{BEGINS}<|start_header_id|>user<|end_header_id|>\n\n"
    assert text == (
        f"{before}a <image>?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_mllama_refuses_more_images_than_marks(folder):
    processor = vlm.load(folder, "cpu").processor
    images = [one_image(1), one_image(2)]
    with pytest.raises(BadRow, match=r"the prompt has 1 <\|image\|> marks, there are 2 images"):
        processor.encode_literal(images, f"{MARK}what?")


def test_mllama_raises_where_a_batch_has_more_images_than_marks(folder):
    model = vlm.load(folder, "cpu")
    batch = our_batch(model, rows=[ROWS[0]])
    batch = replace(batch, ids=batch.ids.masked_fill(batch.ids == IMAGE, 0))
    with pytest.raises(ValueError, match="r0: 0 image marks in the text, 1 images"):
        model.module(batch)


def test_mllama_chat_says_what_an_answer_says(folder):
    law.check_chat_says_what_an_answer_says(folder, tiny_mllama)


def test_mllama_is_listed_and_used_by_commands(folder, tmp_path, capsys):
    law.check_is_listed_and_used_by_commands(folder, tmp_path, capsys, "mllama")
