import pickle

import pytest
import torch
from tokenizers import Regex, normalizers

from tests import tiny
from tests.contrastive_models import END, text_tokenizer
from vlm.data.example import BadRow, Example, Turn, caption_example
from vlm.families.contrastive.batch import Pair, PairBatch, collate_pairs
from vlm.families.contrastive.processor import PairProcessor
from vlm.pixels import BadImage
from vlm.pixels.image_ref import ImageRef

SPEC = tiny.Patches().pixel_spec


def words_only(tokenizer):
    """The tokenizer, punctuation skipped as SigLIP's does."""
    parts = [normalizers.Replace(Regex(r"[^\w\s]"), ""), normalizers.Strip()]
    tokenizer._tokenizer.normalizer = normalizers.Sequence(parts)
    return tokenizer


def processor(length=10, pad_to_length=False, **options):
    tokenizer = options.pop("text_tokenizer", None) or text_tokenizer()
    return PairProcessor(tokenizer, SPEC, length=length, pad_to_length=pad_to_length, **options)


def example(caption="a cat", images=1, name="t.jsonl:3"):
    content = (*[None] * images, "What is this?")
    image_list = tuple(tiny.image(i) for i in range(images))
    return Example(name, (Turn("user", content), Turn("assistant", (caption,))), image_list)


def test_pair_holds_caption_and_pixels():
    pair = processor().encode(example())
    assert pair.ids.tolist() == processor().text_tokenizer("a cat")["input_ids"]
    assert pair.ids[-1] == END
    assert pair.cut == 0
    ((pixels, place),) = pair.views
    assert place == (0, 0)
    assert torch.equal(pixels, SPEC(tiny.image(0))[0])


def test_long_text_is_cut_with_its_end_token_and_counted():
    pair = processor().encode(example("a cat and a dog"))
    assert len(pair.ids) == 10
    assert pair.ids[-1] == END
    assert pair.cut == len("a cat and a dog") + 1 - 10
    ids, valid, cut = processor().texts(["a cat", "a cat and a dog"])
    assert cut == (0, 6)
    assert ids.shape == valid.shape == (2, 10)
    assert ids[1, -1] == END


def test_texts_are_padded_behind_to_the_longest():
    ids, valid, cut = processor().texts(["ab", "a"])
    assert valid.tolist() == [[True] * 3, [True, True, False]]
    assert ids[1, 2] == processor().text_tokenizer.pad_token_id
    assert cut == (0, 0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_of_a_fixed_length_always_have_it(side):
    """Alone, in a batch, and as a pair."""
    pairs = processor(text_tokenizer=text_tokenizer(side), pad_to_length=True)
    ids, valid, _ = pairs.texts(["ab"])
    theirs = pairs.text_tokenizer("ab", padding="max_length", max_length=10)
    assert ids[0].tolist() == theirs["input_ids"]
    assert valid[0].tolist() == [bool(flag) for flag in theirs["attention_mask"]]
    batch = collate_pairs([pairs.encode(example("ab"))])
    assert torch.equal(batch.ids, ids)
    assert torch.equal(batch.valid, valid)
    assert pairs.texts([]).ids.shape == (0, 10)


def test_lower_case_comes_before_the_tokenizer():
    given = processor(lower_case=True).texts(["A CAT"])
    assert torch.equal(given.ids, processor().texts(["a cat"]).ids)
    assert processor().texts(["A CAT"]).ids.tolist() != given.ids.tolist()


def test_an_end_id_is_put_behind_texts_that_get_none():
    pairs = processor(text_tokenizer=tiny.text_tokenizer(), end_id=END, length=5)
    ids, valid, cut = pairs.texts(["ab", "abcdefg"])
    assert ids[0, 2] == ids[1, 4] == END
    assert valid.sum(1).tolist() == [3, 5]
    assert cut == (0, 3)


def test_batch_keeps_the_order_of_pairs():
    pairs = processor()
    rows = [pairs.encode(example(caption, name=caption)) for caption in ("abc", "a")]
    batch = collate_pairs(rows)
    assert batch.names == ("abc", "a")
    assert batch.valid.sum(1).tolist() == [4, 2]
    (group,) = batch.groups
    assert group.owner.tolist() == [[0, 0, 0], [1, 0, 0]]
    moved = batch.to("cpu", torch.bfloat16)
    assert isinstance(moved, PairBatch)
    assert moved.groups[0].pixels.dtype == torch.bfloat16
    assert moved.ids.dtype == torch.int64


def test_bare_pairs_batch_without_saying_their_pads():
    rows = [
        Pair(
            name=str(n), ids=torch.ones(n, dtype=torch.long), views=[(torch.zeros(3, 4, 4), (0, 0))]
        )
        for n in (2, 3)
    ]
    batch = collate_pairs(rows)
    assert batch.ids.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.valid.tolist() == [[True, True, False], [True] * 3]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (example(""), "t.jsonl:3: expected a caption, found an empty text"),
        (example(" \n"), "t.jsonl:3: expected a caption, found an empty text"),
        (example(images=0), "t.jsonl:3: expected one image, found 0"),
        (example(images=2), "t.jsonl:3: expected one image, found 2"),
        (example().question(), "t.jsonl:3: expected one caption, found 0"),
        (Example("d:1", (Turn("text", ("words",)),)), "d:1: expected one caption, found 0"),
        (
            Example(
                "c:2",
                (
                    Turn("user", (None,)),
                    Turn("assistant", ("a",)),
                    Turn("user", ("b",)),
                    Turn("assistant", ("c",)),
                ),
                (tiny.image(),),
            ),
            "c:2: expected one caption, found 2",
        ),
    ],
    ids=["empty", "blank", "no image", "two images", "no caption", "document", "two captions"],
)
def test_a_row_that_is_no_pair_is_named(row, message):
    with pytest.raises(BadRow, match=message):
        processor().encode(row)


@pytest.mark.parametrize("own", [text_tokenizer, tiny.text_tokenizer], ids=["end", "no token"])
def test_a_caption_of_which_nothing_is_read_is_named(own):
    """Whether or not an empty text has tokens of the tokenizer's own."""
    pairs = processor(text_tokenizer=words_only(own()))
    assert pairs.unread(["!", "a!", "", " ?\n", "b"]) == [0, 2, 3]
    assert pairs.unread([]) == []
    with pytest.raises(BadRow, match=r"^t\.jsonl:3: expected a caption, found '\?!', of which the"):
        pairs.encode(example("?!"))
    assert torch.equal(pairs.encode(example("a!")).ids, pairs.encode(example("a")).ids)


def test_a_broken_image_is_named_with_its_row():
    row = caption_example("t.tar:7", ImageRef(b"no image", "t.tar: x.png"), "a cat", "")
    with pytest.raises(BadImage, match=r"t.tar:7: t.tar: x.png: expected an image"):
        processor().encode(row)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a cat", "texts is a list"),
        (["a", 3], r"texts\[1\]: expected a text, found int"),
        (["a", ""], r"texts\[1\]: expected a text, found '', without tokens"),
    ],
)
def test_texts_that_are_none_are_named(texts, message):
    with pytest.raises(ValueError, match=message):
        processor(text_tokenizer=tiny.text_tokenizer()).texts(texts)


def test_processor_refuses_lengths_without_room():
    with pytest.raises(ValueError, match="length 1 leaves no token beside 1 tokens of every text"):
        processor(length=1)


def test_processor_of_a_fixed_length_needs_a_pad_token():
    tokenizer = text_tokenizer()
    tokenizer.pad_token = None
    assert processor(text_tokenizer=tokenizer).pad_id == 0
    with pytest.raises(ValueError, match="padded to 10 tokens, but the tokenizer has no pad token"):
        processor(text_tokenizer=tokenizer, pad_to_length=True)


def test_processor_travels_to_workers():
    pairs = processor(pad_to_length=True)
    again = pickle.loads(pickle.dumps(pairs))
    assert torch.equal(again.encode(example()).ids, pairs.encode(example()).ids)
