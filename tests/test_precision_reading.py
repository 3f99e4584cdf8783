"""Reading in 16 bits beside fp32: the same weights, read twice."""

import contextlib
import copy

import pytest
import torch

from tests import encoder_decoders, line_readers
from tests.line_readers import line
from tests.tiny import image
from vlm.families.encoder_decoder.model import EncoderDecoderModel
from vlm.training.objectives.base import sum_totals
from vlm.training.objectives.ctc import Transcribe
from vlm.training.objectives.next_token import NextToken
from vlm.weights import cast_parameters

TEXTS = ("ab", "cab a")


def line_reader():
    parts = line_readers.parts()
    rows = [parts.processor.encode(line(text, seed=i)) for i, text in enumerate(TEXTS)]
    images = [line(text, seed=i).images[0] for i, text in enumerate(TEXTS)]
    return parts, Transcribe(), rows, images


def encoder_decoder():
    module = encoder_decoders.model(noise=0.0)
    processor = encoder_decoders.processor(module)
    parts = EncoderDecoderModel(
        module=module, processor=processor, end_ids=(258,), max_new_tokens=8
    )
    rows = encoder_decoders.rows(processor, *TEXTS)
    return parts, NextToken(256), rows, [image(i) for i in range(len(TEXTS))]


@pytest.mark.parametrize("make", [line_reader, encoder_decoder])
def test_reading_in_bf16_is_close_to_fp32(make):
    """Lines that a model has half learned are read alike, and as surely to a few hundredths."""
    torch.manual_seed(0)
    model, objective, rows, images = make()
    batches = objective.collate(rows)
    totals = sum_totals(objective.totals, [objective.count(batch) for batch in batches])
    optimizer = torch.optim.AdamW(model.module.parameters(), 3e-3)
    for _ in range(100):
        objective.backward(model.module, batches, totals, contextlib.nullcontext)
        optimizer.step()
        optimizer.zero_grad()
    expected = model.read_lines(images)
    assert tuple(read.text for read in expected) == TEXTS
    assert min(read.confidence for read in expected) > 0.1
    short = copy.deepcopy(model)
    cast_parameters(short.module, torch.bfloat16)
    found = short.read_lines(images)
    for half, whole in zip(found, expected, strict=True):
        assert half.text == whole.text
        assert half.confidence == pytest.approx(whole.confidence, abs=0.05)
        for a, b in zip(half.tokens, whole.tokens, strict=True):
            assert a.text == b.text
            assert a.confidence == pytest.approx(b.confidence, abs=0.05)
