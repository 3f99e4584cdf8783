"""Arguments that the public models refuse before anything is computed."""

from pathlib import Path

import pytest

from tests import encoder_decoders, line_readers, tiny, training
from vlm.families.encoder_decoder.model import EncoderDecoderModel

IMAGE = tiny.image()


def encoder_decoder():
    module = encoder_decoders.model()
    return EncoderDecoderModel(
        module=module,
        processor=encoder_decoders.processor(module),
        end_ids=(258,),
        max_new_tokens=4,
        reads="lines",
    )


MODELS = {
    "decoder_only": training.model,
    "contrastive": training.contrastive_model,
    "encoder_decoder": encoder_decoder,
    "line_reader": line_readers.parts,
}
SIZED = [
    ("decoder_only", "caption", ([IMAGE],)),
    ("decoder_only", "answer", ([IMAGE], ["what?"])),
    ("decoder_only", "generate", ([IMAGE], ["<image>a"])),
    ("decoder_only", "score", ([IMAGE], ["<image>a"], ["b"])),
    ("decoder_only", "answer_examples", ([tiny.example()],)),
    ("decoder_only", "write_after", ([],)),
    ("contrastive", "embed_images", ([IMAGE],)),
    ("contrastive", "embed_texts", (["a"],)),
    ("contrastive", "classify", ([IMAGE], ["a", "b"])),
    ("encoder_decoder", "ocr", ([IMAGE],)),
    ("encoder_decoder", "read_lines", ([IMAGE],)),
    ("encoder_decoder", "generate", ([IMAGE],)),
    ("encoder_decoder", "score", ([IMAGE], None, ["b"])),
    ("line_reader", "ocr", ([IMAGE],)),
    ("line_reader", "read_lines", ([IMAGE],)),
]
ONE = [
    ("decoder_only", "caption", ("abc",)),
    ("decoder_only", "answer", ("abc", ["x", "y", "z"])),
    ("decoder_only", "answer", ([IMAGE] * 3, "abc")),
    ("decoder_only", "ground", ("abc", ["x", "y", "z"])),
    ("decoder_only", "generate", ([IMAGE] * 3, "abc")),
    ("decoder_only", "score", ([IMAGE] * 3, ["<image>a"] * 3, "abc")),
    ("decoder_only", "score", (b"abc", ["<image>a"] * 3, ["x", "y", "z"])),
    ("contrastive", "embed_images", (Path("abc"),)),
    ("contrastive", "embed_texts", ("abc",)),
    ("contrastive", "classify", ("abc", ["a", "b"])),
    ("contrastive", "classify", ([IMAGE], "ab")),
    ("encoder_decoder", "ocr", ("abc",)),
    ("encoder_decoder", "read_lines", (b"abc",)),
    ("encoder_decoder", "generate", ("abc",)),
    ("encoder_decoder", "generate", ([IMAGE] * 3, "abc")),
    ("encoder_decoder", "score", ("abc", None, ["x", "y", "z"])),
    ("encoder_decoder", "score", ([IMAGE] * 3, "abc", ["x", "y", "z"])),
    ("encoder_decoder", "score", ([IMAGE] * 3, None, "abc")),
    ("encoder_decoder", "fit_temperatures", ([IMAGE] * 3, "abc")),
    ("line_reader", "ocr", (Path("abc"),)),
    ("line_reader", "read_lines", ("abc",)),
    ("line_reader", "fit_temperatures", ("abc", ["x", "y", "z"])),
]


def idle(family):
    """A model that computes nothing."""

    def compute(*_, **__):
        raise AssertionError("something was computed")

    model = MODELS[family]()
    for part in model.module.modules():
        part.forward = compute
    return model


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize(("family", "task", "given"), SIZED)
def test_batch_size_below_1_is_refused(family, task, given, size):
    with pytest.raises(ValueError, match=rf"batch_size.* must be at least 1, found {size}"):
        getattr(idle(family), task)(*given, batch_size=size)


@pytest.mark.parametrize(("family", "task", "given"), ONE)
def test_one_item_in_place_of_a_list_is_refused(family, task, given):
    with pytest.raises(ValueError, match=r"(is a list of|are lists, one entry)"):
        getattr(idle(family), task)(*given)
