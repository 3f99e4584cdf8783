"""PaliGemma 1 and 2 beside transformers' class: ids, masks, logits, answers, boxes."""

import math
from itertools import groupby

import pytest
import torch

import vlm
from tests.reference import images_in_text as law
from tests.reference.images_in_text import close, our_logits, reopened, with_marks
from tests.reference.tiny_paligemma import (
    IMAGE_TOKENS,
    ROWS,
    TEXT,
    TEXTS,
    examples,
    our_batch,
    their_inputs,
    write_folder,
)
from tests.tiny import image as one_image
from vlm import cli
from vlm.box_codecs import MALFORMED
from vlm.data.example import BadRow, Box, Example, Turn
from vlm.data.sources.transfer import detection
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.batch import IMAGE, collate
from vlm.families.decoder_only.ground import find
from vlm.losses.token import token_losses
from vlm.systems import paligemma
from vlm.systems.paligemma import PROMPTS, SEG_TOKENS
from vlm.systems.published import first_names, published_name

folder = law.folders(TEXTS, write_folder)


@pytest.mark.parametrize("answers", [False, True])
@torch.no_grad()
def test_paligemma_ids_pixels_masks_and_logits_match_reference(folder, answers):
    """Through the processors of both sides, in a batch of unequal length."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    batch, inputs = our_batch(model, answers), their_inputs(processor, answers=answers)
    assert torch.equal(batch.valid, inputs["attention_mask"].bool())
    assert torch.equal(with_marks(batch.ids, model)[batch.valid], inputs["input_ids"][batch.valid])
    (group,) = batch.groups
    close(group.pixels, inputs["pixel_values"], atol=1e-5)
    assert torch.equal(batch.prefix, (inputs["token_type_ids"] == 0) & batch.valid)
    labels = inputs.pop("labels")
    if answers:
        assert torch.equal(batch.scored, labels != -100)
        assert torch.equal(batch.targets, labels[batch.scored])
    expected = peer(**inputs).logits
    close(our_logits(model, batch)[batch.valid], expected[batch.valid])
    right = our_batch(model, answers, "right")
    close(our_logits(model, right)[right.valid], expected[batch.valid])


@torch.no_grad()
def test_paligemma_rows_alone_match_the_batch(folder):
    """Beside the reference one by one."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    logits = our_logits(model, batch := our_batch(model))
    for number, row in enumerate(ROWS):
        inputs = their_inputs(processor, [row])
        inputs.pop("labels")
        close(logits[number][batch.valid[number]], peer(**inputs).logits[0])


def test_paligemma_loss_and_gradients_match_reference(folder):
    """The loss is the mean over answers and their ends."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    batch, inputs = our_batch(model, padding="right"), their_inputs(processor)
    expected = peer(**inputs).loss
    loss = token_losses(model.module(batch), batch.targets).mean()
    close(loss, expected, atol=1e-5)
    loss.backward()
    expected.backward()
    theirs = {name: p.grad for name, p in peer.named_parameters()}
    ours = {name: p.grad for name, p in model.module.named_parameters()}
    assert all(grad is not None for grad in ours.values())
    renamed, _ = first_names(theirs, paligemma.KEY_MAP, paligemma.UNUSED, "peer")
    assert len(renamed) == len(ours)
    for name, grad in ours.items():
        close(grad, renamed[published_name(name, paligemma.KEY_MAP)], atol=2e-4)


@torch.no_grad()
def test_paligemma_greedy_ids_match_reference_and_batches(folder):
    """Generated ids are answer."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    images, prompts, _ = zip(*ROWS)
    prompts = [f"<image>{prompt}" for prompt in prompts]
    together = model.generate(images, prompts, max_new_tokens=10)
    inputs = their_inputs(processor, answers=False)
    inputs.pop("labels")
    theirs = peer.generate(**inputs, max_new_tokens=10, do_sample=False)
    length = inputs["input_ids"].shape[1]
    for number, written in enumerate(together):
        assert list(written.ids) == theirs[number, length:][: len(written.ids)].tolist()
        (alone,) = model.generate([images[number]], [prompts[number]], max_new_tokens=10)
        assert alone.ids == written.ids
        assert min(alone.logprobs) < 0
    assert len({written.ids for written in together}) > 1


@torch.no_grad()
def test_paligemma_answers_continue_as_when_read_at_once(folder):
    """The slow twin of generation: every id by a whole pass over prompt and answer."""
    model = vlm.load(folder, "cpu")
    rows = [model.processor.encode_prompt(example) for example in examples(answers=False)]
    batch = collate(rows, model.processor.pad_id, "left")
    written = engine.generate(model.module, batch, (), 0, max_new_tokens=6)
    for row, (ids, _) in zip(rows, written, strict=True):
        for count, id in enumerate(ids):
            before = torch.tensor(ids[:count], dtype=torch.long)
            answer = torch.ones(count, dtype=torch.bool)
            longer = type(row)(
                name=row.name,
                ids=torch.cat([row.ids, before]),
                scored=torch.cat([row.scored, answer]),
                views=row.views,
                layout=row.layout,
            )
            logits = our_logits(model, collate([longer], 0))
            assert int(logits[0, -1].argmax()) == id


@torch.no_grad()
def test_paligemma_several_images_and_text_alone_match_reference(folder):
    """What begins texts stands after the last image."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    images = [one_image(5, (30, 40)), one_image(6, (9, 33))]
    prompt = "a <image>b<image> what differs?"
    inputs = processor(images=[images], text=[prompt], return_tensors="pt")
    inputs.pop("labels")
    row = model.processor.encode_literal(images, prompt)
    turns = (Turn("user", ("a ", None, "b", None, " what differs?")),)
    asked = model.processor.encode_prompt(Example("row", turns, tuple(images)))
    for found in (row, asked):
        assert torch.equal(with_marks(found.ids, model)[None], inputs["input_ids"])
    close(our_logits(model, collate([row], 0)), peer(**inputs).logits)
    alone = model.processor.encode_literal([], "cat")
    ids = processor.tokenizer("<bos>cat\n", return_tensors="pt")["input_ids"]
    assert torch.equal(alone.ids[None], ids)
    theirs = peer(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
    close(our_logits(model, collate([alone], 0)), theirs)


def test_paligemma_prompt_matches_snapshot(folder):
    processor = vlm.load(folder, "cpu").processor
    row = processor.encode(examples()[0])
    decode = processor.text_tokenizer.decode
    assert row.ids[:IMAGE_TOKENS].tolist() == [IMAGE] * IMAGE_TOKENS
    assert decode(row.ids[IMAGE_TOKENS:]) == "<bos>caption en\ncat on a dog<eos>"
    assert decode(row.ids[row.scored]) == "cat on a dog<eos>"
    again = (Turn("assistant", ("a",)), Turn("user", ("b",)))
    with pytest.raises(BadRow, match="expected one user's prompt and at most its answer"):
        processor.encode_prompt(Example("row", (*examples(False)[0].turns, *again), (one_image(),)))
    with pytest.raises(BadRow, match="0 <image> marks, there are 1 images"):
        processor.encode_literal([one_image()], "caption en")


def test_paligemma_score_is_the_references(folder):
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    image, prompt, answer = ROWS[0]
    inputs = their_inputs(processor, ROWS[:1])
    with torch.no_grad():
        loss = peer(**inputs).loss
    count = int((inputs["labels"] != -100).sum())
    close(model.score([image], [f"<image>{prompt}"], [answer])[0], -loss * count)


@torch.no_grad()
def test_paligemma_scales_text_and_not_images(folder):
    """Text vectors are the table's rows times √width, image tokens are the adaptor's."""
    module = vlm.load(folder, "cpu").module
    batch = our_batch(vlm.load(folder, "cpu"))
    tokens, owner = module.encode(batch.groups)
    vectors = module.embed(batch.ids, (tokens, owner), batch.names)
    is_image = batch.ids == IMAGE
    assert torch.equal(vectors[is_image], tokens)
    table = module.text.get_input_embeddings().weight
    close(vectors[~is_image], table[batch.ids[~is_image]] * math.sqrt(TEXT["hidden_size"]), 1e-5)


def test_paligemma_locations_and_segments_are_one_id_each(folder):
    """There and back, within text too."""
    model = vlm.load(folder, "cpu")
    tokenizer = model.processor.text_tokenizer
    tokens = [*model.processor.box_codec.tokens, *SEG_TOKENS]
    assert tokens[0] == "<loc0000>"
    assert tokens[1023:1025] == ["<loc1023>", "<seg000>"]
    assert tokens[-1] == "<seg127>"
    ids = tokenizer("".join(tokens), add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.convert_tokens_to_ids(tokens)
    assert len(set(ids)) == 1024 + 128
    written = "<loc0001><loc0203> a cat ; <seg127>"
    back = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert model.processor.decode(back) == written


def test_paligemma_boxes_put_y_first(folder):
    """What is written of a box, and where an answer's boxes lie, in an image that is not square."""
    model = vlm.load(folder, "cpu")
    image = one_image(7, (100, 200))
    boxes = (Box(0, (20, 10, 160, 90), "cat"), Box(0, (100, 50, 200, 100), "dog"))
    row = Example("row", (Turn("user", (None,)),), (image,), boxes)
    encoded = model.processor.encode(detection(row, ["dog", "cat"], PROMPTS["detect"]))
    text = model.processor.text_tokenizer.decode(encoded.ids[IMAGE_TOKENS:])
    assert text == (
        "<bos>detect dog ; cat\n<loc0512><loc0512><loc1023><loc1023> dog ; "
        "<loc0102><loc0102><loc0921><loc0819> cat<eos>"
    )


def answering(monkeypatch, model, text):
    """Makes a model write `text`, each id with probability a half; gives what it is asked."""
    asked = []

    def write(module, images, batch, stop_ids, pad_id, banned, **options):
        ids = model.processor.text_tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, model.processor.end_id]
        return [(ids, [math.log(0.5)] * len(ids)) for _ in batch.names]

    monkeypatch.setattr(engine, "write", write)
    kept = model.processor.encode_prompt
    monkeypatch.setattr(
        model.processor, "encode_prompt", lambda e: asked.append(e.turns[0].text) or kept(e)
    )
    return asked


def test_paligemma_grounds_phrases_in_its_own_words(folder, monkeypatch):
    model = vlm.load(folder, "cpu")
    asked = answering(
        monkeypatch, model,
        "<loc0102><loc0204><loc0512><loc0768> cat ; <loc0000><loc0000><loc1023><loc1023> cat",
    )  # fmt: skip
    (boxes,) = model.ground([one_image(7, (100, 200))], ["cat"])
    assert asked == ["detect cat"]
    assert [box.label for box in boxes] == ["cat", "cat"]
    assert boxes[0].xyxy_px == pytest.approx((39.94, 10.01, 150.1, 50.05), abs=0.01)
    assert boxes[1].xyxy_px == pytest.approx((0.1, 0.05, 199.9, 99.95), abs=0.01)
    assert boxes[0].score == pytest.approx(0.5)
    answering(monkeypatch, model, "<loc0102><loc0204><loc0512> cat")
    ((answer,),) = find(model, [one_image(7)], ["cat"])
    assert answer.fault == MALFORMED


def test_paligemma_writes_whole_boxes_where_nothing_else_is_allowed(folder):
    """Locations in fours, then labels, further boxes or the end; the last may be cut by length."""
    model = vlm.load(folder, "cpu")
    images = [one_image(7), one_image(8, (30, 50))]
    tokenizer = model.processor.text_tokenizer
    locations = set(tokenizer.convert_tokens_to_ids(list(model.processor.box_codec.tokens)))
    options = {"constrained": True, "max_new_tokens": 13}
    for answers in find(model, images, [["cat", "dog"], "a"], **options):
        for answer in answers:
            ids = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
            runs = [(kind, len(list(run))) for kind, run in groupby(id in locations for id in ids)]
            assert runs[0][0]
            assert runs[0][1] >= 4
            assert all(length % 4 == 0 for is_box, length in runs[:-1] if is_box)


def test_paligemma_is_listed_and_used_by_commands(folder, tmp_path, capsys):
    cli.main(["systems"])
    assert "paligemma" in capsys.readouterr().out
    path = tmp_path / "a.png"
    one_image(1, (20, 40)).save(path)
    cli.main(["caption", str(path), "--model", str(folder), "--max-new-tokens", "3"])
    cli.main(["ground", str(path), "cat", "--model", str(folder), "--max-new-tokens", "3"])
