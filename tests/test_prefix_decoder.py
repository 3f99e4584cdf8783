"""The prefix family over language models of several kinds: its mask, its rows, its folders."""

import dataclasses
import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import vlm
from tests import tiny, training
from tests.folders import write_parts
from tests.tiny import prefix_decoder
from vlm.data.example import BadRow, Example, Turn
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.batch import IMAGE, collate
from vlm.families.decoder_only.module import DecoderOnly
from vlm.families.prefix_decoder.model import PrefixDecoderModel
from vlm.families.prefix_decoder.module import PrefixDecoder
from vlm.weights import same_bits

KINDS = list(tiny.TEXT_SHAPES)


def processor(model, **options):
    return tiny.processor(model, prefix=True, **options)


def examples():
    """Two images, one image, text alone; unequal lengths."""
    return [
        tiny.example("two", (None, "and ", None, "differ how?"), "in colour and more"),
        tiny.example("one", (None, "?"), "a dog on a hill"),
        tiny.example("text", ("What is the capital of France?",), "Paris"),
    ]


def batch_of(model, padding="right"):
    made = processor(model)
    return collate([made.encode(example) for example in examples()], made.pad_id, padding)


def all_logits(model, batch):
    vectors = model.embed(batch.ids, model.encode(batch.groups), batch.names)
    return model.logits(model.read(vectors, batch))


def changed(batch, row, position):
    """The batch with another id at one position."""
    ids = batch.ids.clone()
    ids[row, position] = (ids[row, position] + 1) % 256
    return dataclasses.replace(batch, ids=ids)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_answer_is_causal_and_prompt_is_not(kind):
    """A changed answer token changes no logit before it; a changed prompt token changes logits
    of the prompt before it, and a changed image those of the text before it."""
    model = prefix_decoder(kind)
    batch = collate([processor(model).encode(tiny.example(answer="a cat sat on it"))], 256)
    plain = all_logits(model, batch)
    position = int(batch.scored[0].nonzero()[3])
    later = all_logits(model, changed(batch, 0, position))
    assert torch.equal(later[:, :position], plain[:, :position])
    assert not torch.allclose(later[:, position], plain[:, position])
    asked = int(batch.prefix[0].nonzero()[-1])
    earlier = all_logits(model, changed(batch, 0, asked))
    moved = (earlier - plain).abs().amax(-1)[0]
    assert (moved[batch.valid[0]] > 1e-6).all()
    first = int((batch.ids[0] == IMAGE).nonzero()[0])
    groups = tuple(dataclasses.replace(g, pixels=g.pixels.flip(0, -1)) for g in batch.groups)
    shown = all_logits(model, dataclasses.replace(batch, groups=groups))
    assert first > 0
    assert not torch.allclose(shown[:, 0], plain[:, 0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_on_either_side_changes_no_logit(kind):
    """In training mode: each row alone equals the same row in a padded batch; what padding
    holds does not matter."""
    model = prefix_decoder(kind).train()
    made = processor(model)
    rows = [made.encode(example) for example in examples()]
    alone = torch.cat([model(collate([row], made.pad_id)) for row in rows])
    for padding in ("right", "left"):
        batch = collate(rows, made.pad_id, padding)
        torch.testing.assert_close(model(batch), alone, atol=1e-4, rtol=1e-4)
        other = dataclasses.replace(batch, ids=batch.ids.masked_fill(~batch.valid, 65))
        assert torch.equal(model(other), model(batch))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@torch.no_grad()
def test_mask_is_the_one_stated(kind):
    """Each position sees exactly: real ones of the prefix where it is one, real ones up to itself,
    on sliding layers of its window."""
    model = prefix_decoder(kind)
    batch = batch_of(model, "left")
    seen = []
    layers = model.text.get_decoder().layers
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda _, args, options: seen.append(options["attention_mask"]), with_kwargs=True
        )
    all_logits(model, batch)
    position = torch.arange(batch.ids.shape[1])
    causal, window = position[:, None] >= position, position[:, None] - position < 16
    full = batch.prefix[:, :, None] & batch.prefix[:, None, :]
    kinds = getattr(model.text.config, "layer_types", ["full_attention"] * len(layers))
    assert ("sliding_attention" in kinds) == (kind == "gemma2")
    for mask, kind in zip(seen, kinds, strict=True):
        near = causal & window if kind == "sliding_attention" else causal
        expected = (near | full) & batch.valid[:, None, :]
        found = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        assert torch.equal(found[batch.valid], expected[batch.valid])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generated_ids_are_answer(kind, beams):
    """The log-probability of each written id is that of a training row with the same answer."""
    model = prefix_decoder(kind)
    made = processor(model)
    rows = [made.encode_prompt(example.question()) for example in examples()]
    batch = collate(rows, made.pad_id, "left")
    written = engine.generate(model, batch, (299,), 256, max_new_tokens=7, num_beams=beams)
    for row, (ids, logprobs) in zip(rows, written, strict=True):
        longer = dataclasses.replace(
            row,
            ids=torch.cat([row.ids, torch.tensor(ids)]),
            scored=torch.cat([row.scored, torch.ones(len(ids), dtype=torch.bool)]),
        )
        scores = model(collate([longer], made.pad_id)).log_softmax(-1)
        expected = scores.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_batches_write_what_rows_alone_write():
    model = prefix_decoder("gemma2")
    made = processor(model)
    rows = [made.encode_prompt(example.question()) for example in examples()]
    together = engine.generate(model, collate(rows, made.pad_id, "left"), (), 0, max_new_tokens=8)
    alone = [
        engine.generate(model, collate([row], made.pad_id), (), 0, max_new_tokens=8)[0]
        for row in rows
    ]
    assert [ids for ids, _ in together] == [ids for ids, _ in alone]


@torch.no_grad()
def test_document_is_read_causally():
    model = prefix_decoder()
    row = processor(model).encode(Example("d", (Turn("text", ("It was a dark night.",)),)))
    batch = collate([row], 256)
    assert batch.prefix.sum() == 1
    causal = DecoderOnly(model.tokenizer, model.adaptor, tiny.text_model())
    torch.testing.assert_close(
        model(batch), causal(dataclasses.replace(batch, sees="causal")), atol=1e-5, rtol=1e-5
    )


def test_row_has_one_answer():
    made = processor(prefix_decoder())
    turns = [Turn("user", (None, "a?")), Turn("assistant", ("b",))] * 2
    example = Example("two", (*turns[:2], Turn("user", ("c?",)), turns[3]), (tiny.image(),))
    with pytest.raises(BadRow, match=r"two: expected one answer, .* found 2"):
        made.encode(example)
    assert made.encode_prompt(example.question()).scored.sum() == 0


def joining_tokenizer():
    """Has one id for "ab", and a template in which an answer follows its prompt at once."""
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}"
    template += "<|im_end|>{% endif %}{% endfor %}"
    values = json.loads(tiny.text_tokenizer().backend_tokenizer.to_str())
    values["model"]["vocab"]["ab"] = 259
    values["model"]["merges"] = [["a", "b"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(values)),
        pad_token="<pad>",
        eos_token="<|im_end|>",
        chat_template=template,
    )


def test_prompt_has_the_same_ids_with_and_without_its_answer():
    model, tokenizer = prefix_decoder(), joining_tokenizer()
    assert tokenizer("ab")["input_ids"] == [259]
    made = processor(model, text_tokenizer=tokenizer)
    example = tiny.example("row", (None, "is it a"), "b")
    whole, asked = made.encode(example), made.encode_prompt(example.question())
    assert whole.ids.tolist() == [*asked.ids, *tokenizer("b<|im_end|>")["input_ids"]]
    assert whole.scored.tolist() == [False] * len(asked.ids) + [True, True]
    literal = made.encode_literal([tiny.image()], "<image>is it a", "b")
    assert torch.equal(literal.ids, whole.ids)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@torch.no_grad()
def test_composed_prefix_model_returns_from_its_folder(tmp_path, kind):
    vision, text = write_parts(tmp_path, "siglip", kind)
    model = vlm.build(vision=vision, text=text, adaptor="mlp", mask="prefix")
    assert isinstance(model, PrefixDecoderModel)
    model.ocr_prompt, model.answer_prompt = "ocr", "answer en {question}"
    model.save(tmp_path / "model")
    again = vlm.load(tmp_path / "model", "cpu", "stored")
    assert isinstance(again.module, PrefixDecoder)
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    assert again.ocr_prompt == "ocr"
    assert again.answer_prompt == "answer en {question}"
    assert again.processor.prefix
    asked = [[tiny.image()]], ["what?"]
    assert again.answer(*asked, max_new_tokens=5) == model.answer(*asked, max_new_tokens=5)
    (reading,) = again.ocr([tiny.image()], max_new_tokens=4)
    assert reading.size_hw == (9, 17)
    assert again.reads == "pages"
    again.ocr_prompt = None
    assert again.ocr([tiny.image()], prompt="ocr", max_new_tokens=4) == [reading]
    with pytest.raises(ValueError, match="mask is one of causal, prefix, found 'none'"):
        vlm.build(vision=vision, text=text, adaptor="mlp", mask="none")


def test_readings_are_yielded_before_the_next_batch_is_opened():
    module = prefix_decoder()
    made = processor(module)
    model = PrefixDecoderModel(module=module, processor=made, stop_ids=(made.end_id,))
    images, taken = [tiny.image(seed) for seed in range(5)], []
    given = (taken.append(image) or image for image in images)
    stream = model.ocr(given, batch_size=2, prompt="ocr", max_new_tokens=3, stream=True)
    assert taken == []
    read = [(len(taken), reading) for reading in stream]
    assert [count for count, _ in read] == [2, 2, 4, 4, 5]
    listed = model.ocr(images, batch_size=2, prompt="ocr", max_new_tokens=3)
    assert [reading for _, reading in read] == listed
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, found 0"):
        model.ocr(images, prompt="ocr", max_new_tokens=0, stream=True)


def test_model_without_a_prompt_for_reading_says_so():
    module = prefix_decoder()
    made = processor(module)
    model = PrefixDecoderModel(module=module, processor=made, stop_ids=(made.end_id,))
    with pytest.raises(ValueError, match="trained on no prompt for reading"):
        model.ocr([tiny.image()])


def test_prefix_model_trains_by_the_same_loop(tmp_path):
    """Equal gradients however a step is split."""
    states = []
    for micro_batch in (4, 2):
        module = prefix_decoder()
        made = processor(module)
        model = PrefixDecoderModel(module=module, processor=made, stop_ids=(made.end_id,))
        stage = dataclasses.replace(training.STAGE, micro_batch=micro_batch, steps=2)
        chosen, _, _ = training.train(
            tmp_path / str(micro_batch), stage, chosen=model, precision="fp32"
        )
        states.append(training.weights(chosen))
    for name, weight in states[0].items():
        torch.testing.assert_close(weight, states[1][name], atol=1e-5, rtol=1e-4)
