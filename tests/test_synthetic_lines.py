"""Drawn lines: fonts that hold what is drawn, text that is split by what it says, seeded wear."""

import pickle
from random import Random

import numpy as np
import pytest

from tests.pages import DEJAVU
from vlm.data.sources import BadSource, open_source
from vlm.data.synthetic import degrade, fonts, text
from vlm.data.synthetic.fonts import BadFont, find_fonts
from vlm.data.synthetic.lines import (
    ALPHABETS,
    DrawnLine,
    Lines,
    _joins,
    characters_of,
    draw,
)
from vlm.data.synthetic.pen import Hand, _middles
from vlm.data.synthetic.text import ASCII, MARKS, BadText, TextSampler, split_of
from vlm.pixels import open_image

pytestmark = pytest.mark.usefixtures("few_lines")
SERIF = DEJAVU.replace("Sans", "Serif")
LATIN_ONLY = DEJAVU.replace("DejaVuSans", "cmr10")


def lines(count=20, seed=0, **options):
    return Lines(count, seed, fonts=f"{DEJAVU},{SERIF}", **options)


def test_a_row_is_the_same_whenever_it_is_read():
    first, again = lines(seed=3), pickle.loads(pickle.dumps(lines(seed=3)))
    for row in (0, 7, 19):
        assert first[row].answer == again[row].answer
        assert first[row].images[0].data == again[row].images[0].data
    assert lines(seed=4)[0].images[0].data != first[0].images[0].data


def test_rows_are_images_with_their_text():
    source = lines()
    for row in range(20):
        example = source[row]
        image = open_image(example.images[0])
        assert example.answer == source.line(row).text
        assert image.width > 3
        assert image.height > 3
        assert example.name == f"{source.name}[{row}]"


@pytest.mark.parametrize("kind", degrade.KINDS)
def test_every_kind_of_wear_keeps_the_line_visible(kind):
    font = find_fonts(DEJAVU)[0]
    for seed in range(30):
        rng = np.random.default_rng(seed)
        line = DrawnLine("Shape of things", font, degrade.draw_kind(rng, kind))
        pixels = draw(line, rng)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.std() > 2
        assert pixels.shape[1] > pixels.shape[0]


@pytest.mark.parametrize("wear", degrade.WEARS)
def test_lines_with_one_fault_differ_from_clean_ones_and_stay_visible(wear):
    font = find_fonts(DEJAVU)[0]
    for seed in range(8):
        pixels = draw(DrawnLine("Shape of things", font, wear), np.random.default_rng(seed))
        assert pixels.std() > 5
        assert not ((pixels < 3) | (pixels > 252)).all()
    assert {lines(60, kind="one").wear_of(row) for row in range(60)} == set(degrade.WEARS)


def test_made_up_hands_write_alike_each_time_and_differently_from_each_other():
    families = [find_fonts(DEJAVU), find_fonts(SERIF)]
    text = "Shape of {3} things"
    drawn = [Hand(families, np.random.default_rng(seed)).write(text, 16) for seed in range(12)]
    again = [Hand(families, np.random.default_rng(seed)).write(text, 16) for seed in range(12)]
    for mask, same in zip(drawn, again):
        assert np.array_equal(mask, same)
        assert mask.max() > 128
        assert 16 < mask.shape[0] < 70
        assert mask.shape[1] > 6 * mask.shape[0] / 2
    assert len({mask.tobytes() for mask in drawn}) == 12


def test_a_pen_draws_the_middles_of_strokes():
    bar = np.zeros((60, 40), np.uint8)
    bar[10:50, 12:24] = 255
    thin = _middles(bar)
    assert set(np.unique(thin)) == {0, 255}
    assert (thin.sum(1) // 255 <= 3).all()
    assert (thin[20:40].sum(1) == 255).all()  # one pixel wide, unbroken
    assert 14 <= np.flatnonzero(thin[30])[0] <= 21


def test_hands_refuse_what_their_fonts_lack():
    hand = Hand([find_fonts(LATIN_ONLY)], np.random.default_rng(0))
    assert hand.holds("abc")
    assert not hand.holds("Ω")
    with pytest.raises(ValueError, match="found 'Ω'"):
        hand.write("Ω", 16)


def test_a_share_of_lines_is_in_made_up_hands_and_the_others_stay():
    plain, mixed = lines(60, seed=5), lines(60, seed=5, hands=0.5)
    made_up = [row for row in range(60) if mixed.hand_of(row)]
    assert 15 < len(made_up) < 45
    for row in range(60):
        assert mixed.line(row).text == plain.line(row).text
        assert (mixed.font_of(row) == "made-up") == (row in made_up)
        if row not in made_up:
            assert np.array_equal(mixed.image(row), plain.image(row))
    with pytest.raises(BadSource, match="hands from 0 to 1, found 2"):
        lines(hands=2)
    assert open_source(f"lines:3:fonts={DEJAVU}:hands=1").hand_of(0)


def test_hands_leave_joining_scripts_to_their_fonts(tmp_path):
    alphabet = tmp_path / "arabic.txt"
    alphabet.write_text("ابتثجح", encoding="utf-8")
    text_file = tmp_path / "text.txt"
    text_file.write_text("\n".join(["اب تث", "جح اب", "ثت با", "حج اب"] * 8), encoding="utf-8")
    source = lines(8, characters=characters_of(str(alphabet)), text=str(text_file), hands=1, made=0)
    assert not any(source.hand_of(row) for row in range(8))


def test_clean_lines_are_black_on_white():
    pixels = draw(DrawnLine("H", find_fonts(DEJAVU)[0], "clean"), np.random.default_rng(0))
    assert pixels.max() == 255
    assert pixels.min() < 30
    assert (pixels[..., 0] == pixels[..., 2]).all()


@pytest.mark.slow
def test_splits_share_no_line_and_reserved_ones_are_never_drawn():
    drawn = {
        split: {lines(200, split=split).line(row).text for row in range(200)}
        for split in ("train", "validation")
    }
    assert not drawn["train"] & drawn["validation"]
    for split, texts in drawn.items():
        assert {split_of(line) for line in texts} == {split}


def test_split_goes_by_the_first_digit_of_the_md5_of_the_joined_line():
    import hashlib

    for line in ("a", "one two", "b  c", "x" * 50):
        digit = hashlib.md5(" ".join(line.split()).encode()).hexdigest()[0]
        expected = {"0": "reserved", "1": "validation"}.get(digit, "train")
        assert split_of(line) == expected


def test_written_lines_hold_every_character_of_the_alphabet_sooner_or_later():
    sampler = TextSampler(["a plain line of words"], ASCII + MARKS, "train")
    dice = Random(0)
    seen = {c for _ in range(6000) for c in sampler(dice)}
    assert seen == set(ASCII + MARKS)


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_lines_keep_to_their_alphabet_and_their_fonts(alphabet):
    source = lines(40, characters=ALPHABETS[alphabet])
    for row in range(40):
        line = source.line(row)
        assert set(line.text) <= set(ALPHABETS[alphabet])
        assert line.font.holds(line.text)
        assert 1 <= len(line.text) <= text.LONGEST


def test_fonts_that_lack_letters_are_skipped():
    source = Lines(3, fonts=f"{LATIN_ONLY},{DEJAVU}", characters=ALPHABETS["greek"])
    assert {font.family for font in source.fonts} == {"dejavu-sans"}
    with pytest.raises(BadFont, match=r"holds 'AB.*lack.*cmr10"):
        Lines(3, fonts=LATIN_ONLY, characters=ALPHABETS["greek"])


def test_unknown_fonts_say_how_to_get_them():
    with pytest.raises(BadFont, match="pip install fontpkg-nowhere"):
        find_fonts("nowhere")


def test_a_folder_without_fonts_is_named(tmp_path):
    with pytest.raises(BadFont, match=r"expected font files \(\.ttf"):
        find_fonts(str(tmp_path))
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    with pytest.raises(BadFont, match=r"broken\.ttf: expected a font file"):
        find_fonts(str(tmp_path))


def test_variable_fonts_open_at_the_weight_that_is_asked_for():
    pytest.importorskip("fontpkg_montserrat", reason="needs fontpkg-montserrat")
    family = [font for font in find_fonts("montserrat") if font.style == "normal"]
    inked = [np.asarray(font.at(60).getmask("Hamburg")).mean() for font in family]
    assert [font.weight for font in family] == sorted(font.weight for font in family)
    assert inked == sorted(inked)
    assert inked[-1] > 1.5 * inked[0]


def test_held_out_families_are_not_among_any():
    families = {font.family for font in find_fonts("any")}
    assert families
    assert not families & set(fonts.HELD_OUT_FAMILIES)
    assert not set(fonts.TRAIN_FAMILIES) & set(fonts.HELD_OUT_FAMILIES)


def test_text_of_a_file_is_drawn_from(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\ufeffжили были старик со старухой\n" * 2 + "у самого синего моря\n" * 2)
    source = lines(60, characters=ALPHABETS["cyrillic"], text=str(path), made=0.0)
    known = {"жили", "были", "старик", "со", "старухой", "у", "самого", "синего", "моря"}
    words = {word.lower() for row in range(60) for word in source.line(row).text.split()}
    assert len({word.strip("«»\"'()[]“”‘’") for word in words} & known) > 4


def test_text_in_other_letters_than_the_alphabet_is_refused(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join(f"у самого синего моря {word}" for word in "абвгдежзик"))
    with pytest.raises(BadText, match=r"found none among .* such as 'у самого"):
        lines(text=str(path))


def test_alphabet_is_a_name_or_what_a_file_holds(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("ba\nce\u0301")
    assert characters_of(str(path)) == " abc\xe9"
    spec = f"lines:40:fonts={DEJAVU}:alphabet={path}:text=english:made=1"
    with pytest.raises(BadSource, match="of the letters 'abcé', found none"):
        open_source(spec)
    words = tmp_path / "words.txt"
    words.write_text("\n".join(f"{a}{b}{c}" for a in "abcé" for b in "abcé" for c in "abcé"))
    source = open_source(spec.replace("english", str(words)))
    assert {c for row in range(40) for c in source[row].answer} <= set(" abcé")
    path.write_bytes("caf\xe9".encode("latin1"))
    with pytest.raises(ValueError, match=r"own\.txt: expected UTF-8, found byte 3"):
        characters_of(str(path))


def test_letters_that_join_are_not_set_apart():
    """Arabic, and marks upon letters: one by one they would be others."""
    assert not any(map(_joins, ALPHABETS["latin"] + ALPHABETS["greek"] + ALPHABETS["cyrillic"]))
    assert all(map(_joins, "\u0634\u05e9\u0301\u093f"))


def test_text_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("caf\xe9".encode("latin1"))
    with pytest.raises(BadText, match=r"latin1\.txt: expected UTF-8, found byte 3"):
        lines(text=str(path))
    with pytest.raises(BadText, match=r"nowhere\.txt: expected a text file"):
        lines(text=str(tmp_path / "nowhere.txt"))


@pytest.mark.parametrize("locale", ["ru_RU", "el_GR"])
def test_words_of_a_language_are_drawn_from(locale):
    characters = ALPHABETS["cyrillic" if locale == "ru_RU" else "greek"]
    source = lines(40, characters=characters, text=locale)
    letters = "".join(source.line(row).text for row in range(40))
    assert sum(ord(c) > 0x370 for c in letters) > 100


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lines:ten", "expected lines:COUNT"),
        ("lines:10:colour=red", "expected lines:COUNT"),
        ("lines:10:alphabet=klingon", "alphabet=english"),
        ("lines:10:kind=fax", "expected a kind of clean"),
        ("lines:10:fonts=nowhere", "pip install fontpkg-nowhere"),
        ("lines:0", "at least one row"),
        ("lines:10:text=xx_XX", "faker has no language 'xx_XX'"),
    ],
)
def test_bad_specs_are_named(spec, message):
    with pytest.raises(BadSource, match=message):
        open_source(spec)


def test_lines_are_no_longer_than_is_asked_for():
    source = lines(60, longest=9)
    assert {len(source.line(row).text) <= 9 for row in range(60)} == {True}
    with pytest.raises(BadText, match="1 to 60 characters, found 61"):
        lines(longest=61)


def test_a_spec_opens_lines():
    source = open_source(f"lines:5:seed=2:fonts={DEJAVU}:kind=clean:made=1")
    assert len(source) == 5
    assert source.font_of(0) == "dejavu-sans"
    assert source.hand_of(0) is False


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_alphabets_hold_each_character_once(alphabet):
    assert len(set(ALPHABETS[alphabet])) == len(ALPHABETS[alphabet])
