"""The text tokenizers of open_clip's layout beside open_clip's own."""

import open_clip
import pytest
from open_clip.tokenizer import SimpleTokenizer
from transformers import (
    AutoTokenizer,
    GemmaTokenizer,
)

from tests.reference.tiny_open_clip import CLIP, SIGLIP, changed, sentence_pieces, write_folder
from vlm.systems.open_clip import layout

SAME = [
    "A photo of a CAT.",
    "don't you'll we've I'd it's HE'S THEY'RE I'm",
    "naïve café über Straße, Здравствуй, МИР! İstanbul",
    "cafe\u0301 in two code points, a\u00a0space and\u2003another, zero\u200bwidth",
    "日本語 テキスト 😀👍🏽 한국어 العربية",
    "3.14 12345 items!!! (50%) #tag @me ?!'s ''s",
    "  many   spaces\tand\nlines  ",
    "__init__ a_b-c [x] {y} ~`^\\|",
    "!",
    "",
]
OTHER = {
    "repair of broken text": "donâ€™t",
    "curly quotes": "“curly” ‘quotes’",
    "ligatures and full width": "ﬁne ＡＢＣ",
    "HTML": "salt &amp; pepper",
    "a capital sigma at a word's end": "ΟΔΟΣ",
    "what a special token is called": "<start_of_text>",
}
"""Where open_clip's text tokenizer and transformers' CLIP tokenizer part."""


def test_clip_tokenizer_gives_open_clips_ids():
    theirs, ours = SimpleTokenizer(), layout.clip_tokenizer()
    assert len(ours) == theirs.vocab_size == 49408
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.sot_token_id, theirs.eot_token_id)

    def their_ids(text):
        return [theirs.sot_token_id, *theirs.encode(text), theirs.eot_token_id]

    for text in SAME:
        assert ours(text)["input_ids"] == their_ids(text), text
    for difference, text in OTHER.items():
        assert ours(text)["input_ids"] != their_ids(text), difference
    # Cut to the context, both keep the end; what stands after it differs and is never seen.
    (row,) = theirs(" ".join(["cat"] * 90)).tolist()
    assert ours(" ".join(["cat"] * 90), truncation=True)["input_ids"] == row
    (row,) = theirs("a cat").tolist()
    assert row[:4] == ours("a cat")["input_ids"]
    assert set(row[4:]) == {0}
    padded = ours("a cat", padding="max_length")["input_ids"]
    assert set(padded[4:]) == {theirs.eot_token_id}


def test_clip_tokenizer_survives_saving(tmp_path):
    ours = layout.clip_tokenizer()
    ours.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [again(text)["input_ids"] for text in SAME] == [ours(text)["input_ids"] for text in SAME]


def gemma_pieces():
    """A tiny Gemma tokenizer as SigLIP 2's folders set it: texts end and do not begin."""
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"▁abcdefghijklmnopqrstuvwxyzAC'.,_&é"]
    pieces = {piece: id for id, piece in enumerate([*letters, "ca", "cat"])}
    merges = [("c", "a"), ("ca", "t")]
    ends = {"add_bos_token": False, "add_eos_token": True}
    return GemmaTokenizer(vocab=pieces, merges=merges, padding_side="right", **ends)


@pytest.mark.parametrize("tokenizer", [sentence_pieces, gemma_pieces])
@pytest.mark.parametrize("clean", ["canonicalize", "lower", "whitespace", None])
def test_folder_tokenizer_gives_open_clips_ids(tmp_path, clean, tokenizer):
    """Cleaning is done by the tokenizer itself, and stays when it is saved anew."""
    cfg = changed(SIGLIP, text={"tokenizer_kwargs": {"clean": clean} if clean else {}})
    write_folder(tmp_path / "a", cfg, tokenizer=tokenizer())
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'a'}")
    ours = layout.folder_tokenizer(tmp_path / "a", cfg)
    ours.save_pretrained(tmp_path / "b")
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    length = cfg["text_cfg"]["context_length"]
    for text in ("A  Cat", "a_cat, don't!", "é\n dog", "cat " * 20, ""):
        (expected,) = theirs(text).tolist()
        for opened in (ours, again):
            row = opened(text, padding="max_length", truncation=True, max_length=length)
            assert row["input_ids"] == expected, text


def test_folder_without_its_tokenizer_is_refused(tmp_path):
    write_folder(tmp_path, SIGLIP)
    for path in tmp_path.glob("*token*"):
        path.unlink()
    with pytest.raises(
        OSError, match="'some/tokenizer': expected the files of this tokenizer here"
    ):
        layout.folder_tokenizer(tmp_path, SIGLIP)


def test_tokenizer_options_that_cannot_be_done_are_refused(tmp_path):
    write_folder(tmp_path, SIGLIP)
    for cfg, key in (
        (changed(SIGLIP, text={"tokenizer_kwargs": {"strip_sep_token": True}}), "tokenizer_kwargs"),
        (changed(SIGLIP, text={"tokenizer_mode": "clips"}), "tokenizer_mode"),
        (changed(SIGLIP, text={"vocab_size": 20}), "vocab_size"),
        (
            changed(CLIP, text={"tokenizer_kwargs": {"reduction_mask": "random"}}),
            "tokenizer_kwargs",
        ),
        (CLIP, "vocab_size"),
        (changed(SIGLIP, text={"hf_tokenizer_name": None}), "hf_tokenizer_name"),
    ):
        with pytest.raises(ValueError, match=rf"^text_cfg.{key}: expected .* found"):
            layout.folder_tokenizer(tmp_path, cfg)
