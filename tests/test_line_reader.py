"""A line reader: its tokens, its loss, what it writes, and its folder."""

import contextlib
import itertools
import math

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import vlm
from tests import tiny
from tests import tokenizer_laws as laws
from tests.line_readers import line, parts
from vlm.data.example import BadRow
from vlm.families import text_reader
from vlm.families.line_reader import layout as line_reader
from vlm.families.line_reader.batch import LineRow, by_width, collate_lines
from vlm.families.line_reader.processor import LineProcessor
from vlm.losses.ctc import BLANK, ctc_losses, least_columns
from vlm.metrics.calibration import apply_temperature
from vlm.ocr import ctc_decode as ctc
from vlm.tokenizers.columns import STRIDE, level
from vlm.training.objectives.base import sum_totals
from vlm.training.objectives.ctc import Transcribe


@pytest.mark.parametrize("size_hw", [(24, 96), (16, 40), (5, 300), (60, 20)])
def test_columns_tokenizer_counts_its_tokens_for_any_shape(size_hw):
    laws.check_count_is_exact(parts().module.tokenizer, size_hw)


def test_columns_tokenizer_keeps_the_contract():
    laws.check_parts_hold_every_parameter_once(parts().module.tokenizer)
    laws.check_rebuilt_is_equal(parts().module.tokenizer, (24, 96))


def test_a_line_reads_the_same_alone_and_beside_others():
    processor, module = parts().processor, parts().module
    rows = [processor.encode(line(width=96, seed=i)) for i in range(3)]
    with torch.no_grad():
        together = module(collate_lines(rows))
        alone = torch.cat([module(collate_lines([row])) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)


def test_level_makes_pale_and_dark_print_alike_and_blank_views_zero():
    pixels = torch.rand(1, 3, 16, 64)
    pale = 0.6 + pixels * 0.4
    assert torch.allclose(level(pixels), level(pale), atol=1e-3)
    assert level(torch.full((1, 3, 16, 64), 0.9)).abs().max() < 1e-3


def brute_force(logits, ids):
    """The probability of a text, every path of tokens counted."""
    probabilities = logits.softmax(-1)
    total = 0.0
    for path in itertools.product(range(logits.shape[-1]), repeat=len(logits)):
        joined = [id for id, _ in itertools.groupby(path)]
        if [id for id in joined if id != BLANK] == list(ids):
            total += math.prod(probabilities[t, id].item() for t, id in enumerate(path))
    return total


@pytest.mark.parametrize("ids", [(), (1,), (1, 2), (2, 2), (1, 1, 1)])
def test_ctc_loss_equals_the_sum_over_all_paths(ids):
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    loss = ctc_losses(logits[None], torch.tensor(ids, dtype=torch.long), torch.tensor([len(ids)]))
    assert math.exp(-loss.item()) == pytest.approx(brute_force(logits, ids), rel=1e-4)


def test_a_text_that_does_not_fit_has_no_loss_and_no_gradient_and_is_counted():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    loss = ctc_losses(logits, torch.tensor([1, 1, 1]), torch.tensor([3]))
    loss.sum().backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0
    assert least_columns([1, 1, 1]) == 5
    row = LineRow("narrow", torch.zeros(3, 16, 3 * STRIDE), (1, 1, 1))
    objective = Transcribe()
    (batch,) = objective.collate([row])
    assert not row.fits
    assert objective.count(batch).unscored == 1
    assert objective.count(batch).totals == {"characters": 0}


def test_greedy_reads_the_path_of_the_likeliest_names():
    path = [0, 1, 1, 0, 1, 2, 2, 0]
    logits = F.one_hot(torch.tensor(path), 4).float()[None] * 9
    (read,) = ctc.greedy(logits)
    assert read.ids == (1, 1, 2)
    assert read.spans == ((1, 3), (4, 5), (5, 7))
    assert all(-0.01 < value <= 0 for value in read.logprobs)


@pytest.mark.parametrize("seed", range(6))
def test_beam_total_equals_the_rescored_log_probability(seed):
    """Totals are those of the whole text, and no text that the search kept is likelier."""
    logits = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(seed)) * 2
    (wide,) = ctc.beam(logits, 200)
    (greedy,) = ctc.greedy(logits)
    texts = [t for n in range(7) for t in itertools.product((1, 2, 3), repeat=n)]
    totals = [ctc.total_logprobs(logits, [text])[0] for text in texts]
    assert wide.logprob == pytest.approx(max(totals), abs=1e-4)
    assert wide.ids == texts[max(range(len(texts)), key=totals.__getitem__)]
    assert wide.logprob >= greedy.logprob - 1e-5
    assert len(wide.spans) == len(wide.ids) == len(wide.logprobs)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(wide.spans))


def test_confidences_lie_in_0_to_1_and_a_temperature_moves_them_to_the_middle():
    reader = parts()
    images = [line(seed=i, width=40 + 30 * i).images[0] for i in range(5)]
    for beams in (1, 3):
        for read in reader.read_lines(images, num_beams=beams):
            assert 0 <= read.confidence <= 1
            assert all(0 <= token.confidence <= 1 for token in read.tokens)
    assert apply_temperature(math.log(0.9), 2.0) == pytest.approx(0.75)
    assert apply_temperature(-math.inf, 2.0) == 0
    assert apply_temperature(-400.0, 0.5) == pytest.approx(0)
    assert apply_temperature(0.0, 3.0) == 1


@pytest.mark.parametrize("one", ["line.png", b"bytes"])
def test_one_image_in_place_of_a_list_is_refused(one):
    for read in (parts().ocr, parts().read_lines):
        with pytest.raises(ValueError, match="images is a list of images"):
            read(one)


def test_lines_come_back_in_their_order_whatever_their_widths():
    reader = parts()
    images = [line(seed=i, width=width).images[0] for i, width in enumerate((300, 30, 90, 31))]
    together = [read.text for read in reader.read_lines(images, batch_size=2)]
    assert together == [reader.read_lines([image])[0].text for image in images]


def test_readings_are_yielded_before_the_next_image_is_taken(monkeypatch):
    monkeypatch.setattr("vlm.ocr.pages.WINDOW", 1)
    reader, images, taken = parts(), [line(seed=n).images[0] for n in range(3)], []
    given = (taken.append(image) or image for image in images)
    stream = reader.ocr(given, layout="line", batch_size=1, stream=True)
    assert taken == []
    read = [(len(taken), reading) for reading in stream]
    assert [count for count, _ in read] == [1, 2, 3]
    assert [reading for _, reading in read] == reader.ocr(images, "line", batch_size=1)


def test_long_lines_are_read_fewer_at_a_time(monkeypatch):
    images = [line(seed=i, width=w).images[0] for i, w in enumerate((300, 90, 300, 90, 300))]
    reader, sizes = parts(), []
    read = [one.text for one in reader.read_lines(images)]
    monkeypatch.setattr(text_reader, "LARGEST", 2 * 120**2)  # two of the short ones
    whole = reader._read
    monkeypatch.setattr(reader, "_read", lambda rows, n: sizes.append(len(rows)) or whole(rows, n))
    assert [one.text for one in reader.read_lines(images)] == read
    assert sizes == [2, 1, 1, 1]


def test_blank_line_of_a_reader_that_says_nothing_is_empty_and_sure():
    made = parts()
    with torch.no_grad():
        made.module.head.weight.zero_()
        made.module.head.bias.copy_(torch.tensor([12.0, 0, 0, 0, 0]))
    (read,) = made.read_lines([Image.new("RGB", (200, 20), "white")])
    assert read.text == ""
    assert read.tokens == ()
    assert read.confidence > 0.98


@pytest.mark.parametrize("size", [(3, 5), (20_000, 20), (40, 900), (1, 1)])
def test_images_of_any_shape_are_read(size):
    parts().read_lines([Image.new("RGB", size, "white")])


def test_unknown_characters_are_named_with_their_numbers():
    with pytest.raises(BadRow, match=r"line 0.*'ß' \(U\+00DF, 2 times\), 'я'"):
        parts().processor.encode(line("aßbßя"))


def test_text_is_composed_and_white_space_joined():
    processor = LineProcessor(None, "é a")
    assert processor.encode_text("e\u0301\t a ", "x") == (1, 2, 3)
    assert processor.decode((1, BLANK, 2, 3)) == "é a"


def test_characters_given_twice_are_refused():
    with pytest.raises(ValueError, match=r"twice \['a'\]"):
        LineProcessor(None, "aba")


@pytest.mark.parametrize("fault", ["text", "images"])
def test_a_line_needs_one_image_and_a_text(fault):
    example = line("  ") if fault == "text" else tiny.example("none", ("read",), "ab")
    with pytest.raises(BadRow, match="one image and its text"):
        parts().processor.encode(example)


def test_lines_of_several_widths_are_no_batch():
    rows = [LineRow("a", torch.zeros(3, 8, 8), ()), LineRow("b", torch.zeros(3, 8, 16), ())]
    with pytest.raises(ValueError, match=r"one width, found \[8, 16\]"):
        collate_lines(rows)
    assert by_width([8, 16, 8, 8]) == [[0, 2, 3], [1]]


def test_folder_round_trips(tmp_path):
    made = parts()
    made.temperatures = line_reader.Temperatures(line=1.5, token=1.1)
    made.save(tmp_path / "reader")
    again = vlm.load(tmp_path / "reader", device="cpu")
    assert again.temperatures == made.temperatures
    assert again.processor.characters == "abc "
    images = [line(seed=i).images[0] for i in range(3)]
    assert again.read_lines(images) == made.read_lines(images)


def test_other_characters_keep_what_is_known_of_the_old():
    old = parts("abc ")
    new = line_reader.with_characters(old, "cdb")
    pixels = torch.randn(1, 3, 16, 64)
    with torch.no_grad():
        before = old.module.head(old.module.tokenizer(pixels).tokens)
        after = new.module.head(new.module.tokenizer(pixels).tokens)
    assert torch.equal(after[..., [0, 1, 3]], before[..., [0, 3, 2]])
    assert line_reader.with_characters(old, "abc ") is old


def test_reader_says_what_it_cannot_do():
    with pytest.raises(AttributeError, match="a line_reader model cannot do this"):
        parts().caption(["x.png"])


@pytest.mark.slow
def test_reader_learns_a_line_by_heart():
    torch.manual_seed(0)
    made = parts()
    rows = [made.processor.encode(line(text, seed=i)) for i, text in enumerate(("ab", "cab a"))]
    objective = Transcribe()
    batches = objective.collate(rows)
    totals = sum_totals(objective.totals, [objective.count(batch) for batch in batches])
    optimizer = torch.optim.AdamW(made.module.parameters(), 3e-3)
    for _ in range(60):
        loss = objective.backward(made.module, batches, totals, contextlib.nullcontext)
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    images = [line(text, seed=i).images[0] for i, text in enumerate(("ab", "cab a"))]
    assert [read.text for read in made.read_lines(images)] == ["ab", "cab a"]


def test_fitted_temperatures_make_a_boastful_reader_modest():
    made = parts()
    with torch.no_grad():
        made.module.head.weight.mul_(40)  # sure of everything, and mostly wrong
    reader = made
    images = [line(seed=i).images[0] for i in range(12)]
    read = reader.read_lines(images)
    truths = [r.text if i % 4 == 0 else "a b c" for i, r in enumerate(read)]
    fitted = reader.fit_temperatures(images, truths)
    assert fitted.token > 1
    after = reader.read_lines(images)
    assert [r.text for r in after] == [r.text for r in read]
    mean = [
        torch.tensor([t.confidence for r in rs for t in r.tokens]).mean() for rs in (read, after)
    ]
    assert mean[1] < mean[0]
