"""Phrases to boxes by models that write boxes as text: a tiny model made to write an answer, its
boxes in the caller's pixels, and scores of the ids that write the numbers, however those are split.
"""

import json
import math
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

import vlm
from tests import tiny
from vlm import cli
from vlm.box_codecs import (
    KOSMOS2,
    KOSMOS2_PROMPT,
    MALFORMED,
    NO_BOX,
    QWEN2_VL,
    QWEN2_VL_PROMPT,
    QWEN25_VL,
    QWEN25_VL_PROMPT,
    QWEN_VL,
    QWEN_VL_PROMPT,
)
from vlm.data.example import Example, Turn
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.batch import collate
from vlm.families.decoder_only.ground import MAX_BOXES, character_spans, find, require_prompt
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.families.prefix_decoder.model import PrefixDecoderModel

CODECS = {"qwen_vl": QWEN_VL, "qwen2_vl": QWEN2_VL, "qwen25_vl": QWEN25_VL, "kosmos2": KOSMOS2}
SPECIAL = (*QWEN2_VL.tags, *QWEN_VL.tags, *KOSMOS2.tags, *KOSMOS2.tokens)


def joining_tokenizer():
    """An id for two digits, and for a bracket or blank with the digit after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    digits, blank = "0123456789", "\u0120"  # as ByteLevel writes a blank
    merges = [(first, digit) for first in ("(", blank, "[") for digit in digits]
    merges += [(first, second) for first in digits for second in digits]
    tokens = [*alphabet, *map("".join, merges)]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*tiny.SPECIAL, *SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    return tokenizer


TOKENIZERS = {
    "digit by digit": lambda: tiny.text_tokenizer(SPECIAL),
    "joined": joining_tokenizer,
    "no special tags": tiny.text_tokenizer,
}


def model(codec, tokenizer="digit by digit", prefix=False, **options):
    made = (tiny.prefix_decoder if prefix else tiny.decoder_only)(vocab=1500)
    processor = tiny.processor(
        made, text_tokenizer=TOKENIZERS[tokenizer](), box_codec=codec, prefix=prefix
    )
    kind = PrefixDecoderModel if prefix else DecoderOnlyModel
    return kind(module=made, processor=processor, stop_ids=(processor.end_id,), **options)


class Says(LogitsProcessor):
    """Makes a model write the next of some answers, ids each, where rows are written one by one."""

    def __init__(self, answers):
        self.answers, self.now = iter(answers), None

    def __call__(self, input_ids, scores):
        written = input_ids.shape[1]
        if not written:
            self.now = next(self.answers)
        only = torch.full_like(scores, -math.inf)
        only[:, self.now[written]] = 0.0
        return only


def answered(made, image, phrase, text):
    """The ids of an answer, its end among them, and the log-probability that the model gives each:
    the slow twin, one forward pass over prompt and answer."""
    asked = Turn("user", (None, made.ground_prompt.format(phrase=phrase)))
    row = made.processor.encode(Example("r", (asked, Turn("assistant", (text,))), (image,)))
    batch = collate([row], made.processor.pad_id)
    with torch.no_grad():
        logits = made.module(batch)
    logprobs = logits.float().log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    return row.ids[row.scored].tolist(), logprobs.tolist()


def says(answers):
    return LogitsProcessorList([Says([ids for ids, _ in answers])])


def expected_score(made, text, logprobs, spans):
    """The geometric mean over ids whose characters, as the text tokenizer itself gives them, meet
    those of the numbers."""
    offsets = made.processor.text_tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    own = [
        logprob
        for (start, end), logprob in zip(offsets, logprobs)
        if any(start < last and first < end for first, last in spans)
    ]
    return math.exp(sum(own) / len(own))


IMAGES = [tiny.image(1, (28, 56)), tiny.image(2, (60, 20))]
PHRASES = [["cat", "a 2nd dog"], "犬 (1,2)"]
BOXES = {
    (0, "cat"): [(14, 7, 42, 21), (3, 1, 25, 27)],
    (0, "a 2nd dog"): [(0, 0, 28, 28)],
    (1, "犬 (1,2)"): [(2, 10, 19, 55)],
}


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", CODECS)
def test_ground_gives_the_boxes_that_the_model_writes(name, tokenizer):
    """Labels, several boxes and phrases, images that are not square, numbers split in any way."""
    codec = CODECS[name]
    if codec is KOSMOS2 and tokenizer == "no special tags":
        pytest.skip("its numbers are tokens")
    made = model(codec, tokenizer, labelled_boxes=True)
    texts, answers = {}, {}
    for (i, phrase), boxes in BOXES.items():
        resize = made.processor.pixel_spec.resize_record(IMAGES[i].size[::-1])
        text = codec.write(boxes, resize, [phrase] * len(boxes), "Ja, é: ")
        texts[i, phrase], answers[i, phrase] = text, answered(made, IMAGES[i], phrase, text)
    found = find(made, IMAGES, PHRASES, 1, logits_processor=says(answers.values()))
    assert [[answer.phrase for answer in row] for row in found] == [PHRASES[0], [PHRASES[1]]]
    for i, row in enumerate(found):
        for answer in row:
            text, (_, logprobs) = texts[i, answer.phrase], answers[i, answer.phrase]
            resize = made.processor.pixel_spec.resize_record(IMAGES[i].size[::-1])
            read = codec.read(text, resize)
            assert (answer.text, answer.fault) == (text, None)
            assert len(answer.boxes) == len(read.boxes) == len(BOXES[i, answer.phrase])
            for box, same in zip(answer.boxes, read.boxes):
                assert (box.image, box.label) == (0, answer.phrase)
                assert box.xyxy_px == pytest.approx(same.xyxy_px)
                score = expected_score(made, text, logprobs, same.spans)
                assert box.score == pytest.approx(score, rel=1e-3)
                assert 0 < box.score < 1
    listed = made.ground(IMAGES, PHRASES, batch_size=1, logits_processor=says(answers.values()))
    assert listed == [[box for answer in row for box in answer.boxes] for row in found]


def test_answers_of_a_batch_are_those_of_single_phrases():
    """As the model writes by itself: no boxes, but the same text and fault."""
    made = model(QWEN2_VL)
    phrases = [["cat", "a long red dog"], ["bird"]]
    together = find(made, IMAGES, phrases, max_new_tokens=6)
    for image, asked, row in zip(IMAGES, phrases, together):
        alone = [find(made, [image], [phrase], max_new_tokens=6)[0][0] for phrase in asked]
        assert alone == row
        assert {answer.fault for answer in row} == {NO_BOX}


def test_whole_boxes_of_an_answer_that_was_cut_are_taken():
    made = model(QWEN2_VL)
    ids, _ = answered(made, IMAGES[0], "cat", QWEN2_VL.box[0] + "(1,2),(30,40)" + QWEN2_VL.box[1])
    ids = [*ids[:-1], *ids[:5]]
    ((found,),) = find(
        made, [IMAGES[0]], ["cat"], max_new_tokens=len(ids), logits_processor=says([(ids, None)])
    )
    assert (len(found.boxes), found.fault) == (1, MALFORMED)


def test_prefix_models_ground_in_any_way_of_writing_boxes():
    made = model(QWEN25_VL, prefix=True)
    text = '[{"bbox_2d": [1, 2, 6, 8], "label": "cat"}]'
    ids = answered(made, IMAGES[0], "cat", text)
    ((box,),) = made.ground([IMAGES[0]], ["cat"], logits_processor=says([ids]))
    assert box.xyxy_px == pytest.approx((56 / 12, 7, 28, 28))


@pytest.mark.parametrize("name", CODECS)
def test_only_loc_tokens_can_be_constrained(name):
    with pytest.raises(
        ValueError, match="constrained: expected a model that writes boxes as <loc>"
    ):
        model(CODECS[name]).ground([IMAGES[0]], ["cat"], constrained=True)


@pytest.mark.parametrize("name", CODECS)
def test_longest_answer_has_room_for_its_boxes(name, monkeypatch):
    """What all boxes of the limit take, each with its own label, is not cut."""
    codec, made, given = CODECS[name], model(CODECS[name]), []

    def write(module, vectors, *rest, **options):
        given.append(options["max_new_tokens"])
        return [([made.processor.end_id], [0.0])] * len(vectors)

    monkeypatch.setattr(engine, "write", write)
    made.ground([IMAGES[0]], ["cat"])
    made.ground([IMAGES[0]], ["cat"], max_new_tokens=7)
    resize = made.processor.pixel_spec.resize_record((28, 56))
    text = codec.write([(14, 7, 42, 21)] * MAX_BOXES, resize, ["cat", "dog"] * (MAX_BOXES // 2))
    pieces = re.findall(r"<[^<>]*>|\d|\w+|\s|[^\w\s]", text)  # at least as many as of a tokenizer
    assert given[1] == 7
    assert len(pieces) <= given[0]


@pytest.mark.parametrize(
    "prompt", [QWEN_VL_PROMPT, QWEN2_VL_PROMPT, QWEN25_VL_PROMPT, KOSMOS2_PROMPT]
)
def test_published_prompts_have_a_place_for_the_phrase(prompt):
    require_prompt(prompt)
    assert "a cat" in prompt.format(phrase="a cat")


def test_characters_of_ids_follow_bytes_that_make_one_together():
    tokenizer = tiny.text_tokenizer()
    text = "é犬1,\ufffd2"
    ids = tokenizer(text)["input_ids"]
    spans = character_spans(tokenizer.decode, ids)
    assert len(spans) == len(ids) == 2 + 3 + 1 + 1 + 3 + 1
    assert [text[start:end] for start, end in spans if start < end] == list(text)
    cut = character_spans(tokenizer.decode, ids[:4])  # within a character
    assert [end for _, end in cut][:2] == [0, 1]
    assert cut[-1][1] == len(tokenizer.decode(ids[:4]))


def test_ground_command_prints_and_draws_boxes_of_text(tmp_path, monkeypatch, capsys):
    made = model(QWEN25_VL)
    answers = [answered(made, IMAGES[0], "cat", '{"bbox_2d": [3, 2, 9, 6]}'),
               answered(made, IMAGES[0], "a dog", '{"bbox_2d": [3, 2, 9')]  # fmt: skip

    def write(module, vectors, batch, *rest, **options):
        assert len(vectors) == 2
        return [(ids, logprobs) for ids, logprobs in answers]

    monkeypatch.setattr(engine, "write", write)
    monkeypatch.setattr(vlm, "load", lambda *_, **__: made, raising=False)
    IMAGES[0].save(tmp_path / "a.png")
    command = ["ground", str(tmp_path / "a.png"), "cat", "a dog", "--model", "x"]
    cli.main([*command, "--json", "--draw", str(tmp_path / "drawn.png")])
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["boxes"][0]["xyxy_px"] == pytest.approx([14, 7, 42, 21])
    assert (second["boxes"], second["fault"]) == ([], MALFORMED)
    assert (tmp_path / "drawn.png").is_file()
    with pytest.raises(SystemExit):
        cli.main([*command, "--constrained"])
    assert "constrained: expected a model" in capsys.readouterr().err
