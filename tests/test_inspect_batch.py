"""Rows as they are shown before training; padded ones of decoder-only models are in test_cli, pairs
in test_contrastive_recipe."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from tests import encoder_decoders, tiny, towers, training
from vlm.commands.inspect_batch import draw_rows, show_rows
from vlm.data.example import Skipped
from vlm.draw import BLACK
from vlm.draw_packed import BAND_PX, FILLS
from vlm.families.registry import FAMILIES, named
from vlm.tokenizers.paired import PairedSpec
from vlm.tokenizers.tiles import TilesSpec


def plain():
    """A console without colours whose lines are long."""
    from rich.console import Console

    return Console(no_color=True, force_terminal=False, width=300)


def test_inspected_packed_rows_show_who_shares_them_and_their_borders(tmp_path, capsys):
    model = training.model()
    processor = model.processor
    rows = [
        processor.encode(tiny.example("first", (None, "what?"), "a cat")),
        processor.encode(tiny.example("long", (None, None, "and these two?"), "dogs " * 20)),
        processor.encode(tiny.example("last", ("say it",), "yes")),
        Skipped("gone", "no image"),
    ]
    lengths = [len(row.ids) for row in rows[:3]]
    pack = lengths[0] + lengths[2] + 10
    assert lengths[1] > pack  # so that it goes alone
    console = plain()
    batches = show_rows(rows, model, console, pack)
    assert [batch.names for batch in batches] == [("long",), ("first", "last")]
    out = capsys.readouterr().out
    alone, shared = out.split("packed row 2 of 2")
    bounds = f"0 {lengths[0]} {lengths[0] + lengths[2]}"
    assert "skipped gone: no image" in alone
    assert f"1 example end to end, {lengths[1]} positions of at most {pack}" in alone
    together = lengths[0] + lengths[2]
    assert f"2 examples end to end, {together} positions of at most {pack}" in shared
    assert f"borders at {bounds}" in shared
    first, border, last = (
        shared.index(said) for said in ("[[a cat<|im_end|>]]", f"position {lengths[0]} ├", "[[yes")
    )
    assert first < border < last
    assert "3 examples in 2 packed rows: utilisation 100% of the positions computed" in shared
    assert "[padding" not in out
    assert batches[1].bounds.tolist() == [int(bound) for bound in bounds.split()]

    draw_rows(rows, model, tmp_path / "packed.png", pack)
    page = np.asarray(Image.open(tmp_path / "packed.png"))
    for fill in FILLS.values():
        assert (page == ImageColor.getrgb(fill)).all(2).sum() > 100
    dark = (page == ImageColor.getrgb(BLACK)).all(2)
    borders = [dark[:, x].sum() for x in range(page.shape[1])]
    scale = 1200 / lengths[1]  # the longest row is as wide as the page
    for bound in (0, lengths[0], lengths[0] + lengths[2]):
        assert borders[round(14 + bound * scale)] > BAND_PX
    assert show_rows([Skipped("gone", "no image")], model, console, pack) is None
    with pytest.raises(ValueError, match="expected a row to draw, found none"):
        draw_rows([Skipped("gone", "no image")], model, tmp_path / "none.png", pack)


def test_inspected_texts_show_what_is_read_what_is_learned_and_padding(tmp_path, capsys):
    model = training.encoder_decoder_model()
    rows = encoder_decoders.rows(model.processor, "a cat", "no")
    batch = show_rows([*rows, Skipped("gone", "no image")], model, plain())
    assert batch.names == ("r0", "r1")
    out = capsys.readouterr().out
    start, end = (model.processor.text_tokenizer.decode([id]) for id in (257, 258))
    assert "skipped gone: no image" in out
    assert "r0  7 tokens: 1 start and prompt, 6 scored; 0 padding" in out
    assert f"{start}[[a cat{end}]]\n" in out
    assert "r1  4 tokens: 1 start and prompt, 3 scored; 3 padding" in out
    assert f"{start}[[no{end}]][padding × 3]" in out
    assert "scored mask  0×1 1×3 0×3" in out
    assert out.count("image: 3 × 8 × 12") == 2
    draw_rows(rows, model, tmp_path / "rows.png")
    assert Image.open(tmp_path / "rows.png").width > 12


def test_inspected_lines_show_their_text_and_what_is_too_narrow_for_it(tmp_path, capsys):
    model = training.line_model()
    rows = [model.processor.encode(line) for line in training.text_lines()[:3]]
    narrow = dataclasses.replace(rows[0], name="narrow", pixels=rows[0].pixels[..., :4])
    batches = show_rows([*rows, narrow], model, plain())
    assert batches[0].names == ("narrow",)
    assert sum(len(batch.names) for batch in batches) == 4
    out = capsys.readouterr().out
    assert "2 characters, at least 2 tokens\nab\n" in out
    assert "narrow  16 x 4 pixels" in out
    assert out.count("too narrow for its text") == 1
    draw_rows(rows, model, tmp_path / "lines.png")
    assert Image.open(tmp_path / "lines.png").width > 16


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_shows_its_rows_and_does_what_it_says(name):
    family = FAMILIES[name]
    assert callable(named(f"{family.inspect}:show"))
    assert callable(named(f"{family.inspect}:draw"))
    assert all(callable(getattr(family.model_class, task)) for task in family.tasks)


def test_images_of_tiles_and_pairs_are_shown_as_they_are_seen():
    spec = towers.SPEC
    image = tiny.image(0, (64, 96))
    tiles = TilesSpec(tile=spec, max_tiles=4, thumbnail=True)
    pair = PairedSpec(high=spec.with_size((64, 96)), low=spec, low_from="picture")
    for chosen, shape in ((tiles, (3, 32, 48)), (pair, (3, 64, 96))):
        seen = chosen.unnormalise(chosen(image)[0])
        assert (seen.dtype, tuple(seen.shape)) == (torch.uint8, shape)
