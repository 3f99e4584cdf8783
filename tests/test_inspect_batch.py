"""Packed rows as they are shown before training; padded ones are in test_cli."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from tests import tiny, towers
from vlm.commands.inspect_batch import draw_rows, show_rows
from vlm.data.example import Skipped
from vlm.draw import BLACK
from vlm.draw_packed import BAND_PX, FILLS
from vlm.tokenizers.paired import PairedSpec
from vlm.tokenizers.tiles import TilesSpec


def test_inspected_packed_rows_show_who_shares_them_and_their_borders(tmp_path, capsys):
    from rich.console import Console

    processor = tiny.processor(tiny.decoder_only())
    rows = [
        processor.encode(tiny.example("first", (None, "what?"), "a cat")),
        processor.encode(tiny.example("long", (None, None, "and these two?"), "dogs " * 20)),
        processor.encode(tiny.example("last", ("say it",), "yes")),
        Skipped("gone", "no image"),
    ]
    lengths = [len(row.ids) for row in rows[:3]]
    pack = lengths[0] + lengths[2] + 10
    assert lengths[1] > pack  # so that it goes alone
    console = Console(no_color=True, force_terminal=False, width=300)
    batches = show_rows(rows, processor, console, pack)
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

    draw_rows(rows, processor, tmp_path / "packed.png", pack)
    page = np.asarray(Image.open(tmp_path / "packed.png"))
    for fill in FILLS.values():
        assert (page == ImageColor.getrgb(fill)).all(2).sum() > 100
    dark = (page == ImageColor.getrgb(BLACK)).all(2)
    borders = [dark[:, x].sum() for x in range(page.shape[1])]
    scale = 1200 / lengths[1]  # the longest row is as wide as the page
    for bound in (0, lengths[0], lengths[0] + lengths[2]):
        assert borders[round(14 + bound * scale)] > BAND_PX
    assert show_rows([Skipped("gone", "no image")], processor, console, pack) is None
    with pytest.raises(ValueError, match="expected a packed row to draw, found none"):
        draw_rows([Skipped("gone", "no image")], processor, tmp_path / "none.png", pack)


def test_images_of_tiles_and_pairs_are_shown_as_they_are_seen():
    spec = towers.SPEC
    image = tiny.image(0, (64, 96))
    tiles = TilesSpec(tile=spec, max_tiles=4, thumbnail=True)
    pair = PairedSpec(high=spec.with_size((64, 96)), low=spec, low_from="picture")
    for chosen, shape in ((tiles, (3, 32, 48)), (pair, (3, 64, 96))):
        seen = chosen.unnormalise(chosen(image)[0])
        assert (seen.dtype, tuple(seen.shape)) == (torch.uint8, shape)
