"""Kosmos-2 beside transformers' classes: pixels, ids, logits, training, answers."""

import pytest
import torch
import transformers

import vlm
from tests.reference import images_in_text as law
from tests.reference import tiny_kosmos2
from tests.reference.images_in_text import close, our_logits, reopened
from tests.reference.tiny_kosmos2 import (
    KINDS,
    LATENTS,
    ROWS,
    examples,
    their_inputs,
    write_folder,
)
from tests.tiny import image as one_image
from vlm.box_codecs import KOSMOS2
from vlm.data.example import Example, Turn
from vlm.families.decoder_only.batch import IMAGE, collate, collate_packed
from vlm.image_tokens import ImageTokens
from vlm.pixels import from_transformers
from vlm.systems import kosmos2

folder = law.folders(KINDS, write_folder)


@pytest.mark.parametrize("prompt", ["<grounding> An image of", "what is it? <phrase> a cat"])
@pytest.mark.parametrize("size_hw", [(75, 40), (40, 90), (300, 100), (20, 20), (9, 7)])
def test_kosmos2_pixels_and_ids_match_its_processor(folder, size_hw, prompt):
    model, (_, processor) = vlm.load(folder, "cpu"), reopened(folder)
    image = one_image(3, size_hw)
    row = model.processor.encode_literal([image], f"<image>{prompt}")
    inputs = processor(images=image, text=prompt, num_image_tokens=LATENTS, return_tensors="pt")
    ids, is_image = inputs["input_ids"][0], inputs["image_embeds_position_mask"][0].bool()
    assert torch.equal(row.ids == IMAGE, is_image)
    assert torch.equal(row.ids[~is_image], ids[~is_image])
    close(torch.stack([view for view, _ in row.views]), inputs["pixel_values"], 1e-6)


@pytest.mark.parametrize("answers", [False, True])
def test_kosmos2_ids_and_logits_match_reference(folder, answers):
    law.check_ids_and_logits(folder, tiny_kosmos2, answers)


@torch.no_grad()
def test_kosmos2_logits_of_grey_images_match_reference(folder):
    """Pixels that are zero all over after normalising have a unit length of nothing."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    batch, inputs = tiny_kosmos2.our_batch(model), their_inputs(processor)
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    for group in batch.groups:
        group.pixels.zero_()
    close(our_logits(model, batch)[batch.valid], peer(**inputs).logits[batch.valid])


def test_kosmos2_loss_and_gradients_match_reference(folder):
    law.check_loss_and_gradients(folder, tiny_kosmos2, {"kosmos-2": kosmos2.KEY_MAP})


def test_kosmos2_training_step_changes_every_part(folder):
    law.check_every_part_learns(folder, tiny_kosmos2)


@pytest.mark.parametrize("pack", [None, 300])
def test_kosmos2_trains_by_the_same_loop(folder, tmp_path, pack):
    law.check_trains_by_the_loop(folder, tiny_kosmos2, tmp_path, pack)


@torch.no_grad()
def test_kosmos2_packed_rows_have_the_logits_of_rows_alone(folder):
    model = vlm.load(folder, "cpu")
    rows = [model.processor.encode(example) for example in examples()]
    packed = model.module(collate_packed(rows))
    alone = [model.module(collate([row], model.processor.pad_id)) for row in rows]
    close(packed, torch.cat(alone), 1e-5)


def test_kosmos2_greedy_ids_match_reference_and_batches(folder):
    """transformers' class counts padding into the positions of what it writes, so that its own
    answers are those of rows alone."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    together = model.answer_examples(examples(), max_new_tokens=10)
    for number, (images, content, _) in enumerate(ROWS):
        inputs = their_inputs(processor, ROWS[number : number + 1])
        theirs = peer.generate(
            **inputs, max_new_tokens=10, do_sample=False, eos_token_id=list(model.stop_ids)
        )
        theirs = theirs[0, inputs["input_ids"].shape[1] :].tolist()
        literal = "".join("<image>" if part is None else part for part in content)
        (written,) = model.generate([images], [literal], max_new_tokens=10)
        assert list(written.ids) == theirs
        assert together[number] == written.text == model.processor.decode(theirs)
    assert len(set(together)) > 1


def test_kosmos2_beams_in_a_batch_are_those_of_rows_alone(folder):
    model = vlm.load(folder, "cpu")
    options = dict(max_new_tokens=6, num_beams=3)
    together = model.answer_examples(examples(), **options)
    assert together == [model.answer_examples([e], **options)[0] for e in examples()]


def test_kosmos2_prompt_matches_snapshot(folder):
    processor = vlm.load(folder, "cpu").processor
    row = processor.encode_prompt(
        Example("r", (Turn("user", (None, "what is it?")),), (one_image(1, (40, 60)),))
    )
    tokens = [
        "*" if id == IMAGE else processor.text_tokenizer.convert_ids_to_tokens(id)
        for id in row.ids.tolist()
    ]
    words = ["\u2581what", "\u2581is", "\u2581it", "?"]
    assert tokens == ["<s>", "<image>", *"*" * LATENTS, "</image>", *words]
    row = processor.encode(examples()[0])
    scored = processor.text_tokenizer.convert_ids_to_tokens(row.ids[row.scored].tolist())
    assert scored == [
        "\u2581a",
        "\u2581cat",
        "</s>",
    ]
    assert processor.max_tokens == 512


def test_kosmos2_drops_nothing_in_training(folder):
    """So that losses are the same however a run is split; published folders have dropout."""
    text = vlm.load(folder, "cpu").module.text.train()
    ids = torch.arange(3, 9)[None]
    assert torch.equal(text(ids).logits, text(ids).logits)


def test_kosmos2_tokens_of_places_are_one_id_each_and_stay_in_answers(folder):
    processor = vlm.load(folder, "cpu").processor
    places = (*KOSMOS2.tokens, *KOSMOS2.tags, "<grounding>")
    ids = processor.text_tokenizer("".join(places), add_special_tokens=False)["input_ids"]
    assert len(ids) == len(set(ids)) == len(places) == 1024 + 6
    assert processor.text_tokenizer.unk_token_id not in ids
    said = processor.decode(ids)
    assert all(place in said for place in places)


def test_kosmos2_published_size_has_the_published_parameters():
    config = transformers.Kosmos2Config()
    spec = from_transformers(transformers.CLIPImageProcessor(use_square_size=True))
    assert (spec.size_hw, spec.fit) == ((224, 224), "stretch")
    with torch.device("meta"):
        module = kosmos2.compose(config, spec)
        peer = transformers.Kosmos2ForConditionalGeneration(config)

    def millions(part):
        return round(sum(p.numel() for p in part.parameters()) / 1e6, 1)

    counts = {name: millions(part) for name, part in module.parts().items()}
    assert counts == {"tokenizer": 303.2, "adaptor": 19.0, "text": 1342.3}
    assert millions(module) == millions(peer) == 1664.5
    assert module.text.get_output_embeddings().weight is module.text.get_input_embeddings().weight


def test_kosmos2_latents_see_image_tokens_and_each_other(folder):
    """The attention from its equation: queries are the latents, keys and values the projected
    tokens and the latents."""
    adaptor = vlm.load(folder, "cpu").module.adaptor
    tokens = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    images = ImageTokens(tokens=tokens, grid_hw=(2, 2))
    seen = torch.cat([adaptor.project(tokens[0] / tokens[0].norm(dim=-1, keepdim=True)),
                      adaptor.latents])  # fmt: skip
    read = []
    for head in range(3):
        own = slice(8 * head, 8 * head + 8)
        query = adaptor.query(adaptor.latents)[:, own]
        scores = query @ adaptor.key(seen)[:, own].T / 8**0.5
        read.append(scores.softmax(-1) @ adaptor.value(seen)[:, own])
    close(adaptor(images).tokens[0], adaptor.out(torch.cat(read, -1)), 1e-5)


def test_kosmos2_chat_says_what_an_answer_says(folder):
    law.check_chat_says_what_an_answer_says(folder, tiny_kosmos2)


def test_kosmos2_is_listed_and_used_by_commands(folder, tmp_path, capsys):
    law.check_is_listed_and_used_by_commands(folder, tmp_path, capsys, "kosmos-2")
