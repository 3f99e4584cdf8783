"""Text tokenizers that write characters outside their vocabulary byte by byte, as LLaMA's does."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from vlm.data.example import Example, Turn

LETTERS = "▁\nabcdefghijklmnopqrstuvwxyz.?:"
MERGES = [("▁", "c"), ("▁c", "a"), ("▁ca", "t")]


def text_tokenizer(kind):
    """Of both ways in which LLaMA's spaces are written in tokenizer.json files."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    names += [a + b for a, b in MERGES]
    core = Tokenizer(
        models.BPE(
            {name: i for i, name in enumerate(names)},
            MERGES,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if kind == "normalizer":
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens(["<s>", "</s>"])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}user: {{ m['content'] }}\nbot:"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    return made


ANSWERS = ["😀", "a cat 😀", "😀 cat", "é😀 ß cat.", "👩‍👩‍👧", "cat"]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kind", ["normalizer", "metaspace"])
@pytest.mark.parametrize("image", [None, tiny.image()])
def test_all_bytes_of_answers_are_scored_and_none_of_prompts(kind, prefix, image):
    """Emoji stand before, in and after answers; in some the answer is nothing else."""
    module = (tiny.prefix_decoder if prefix else tiny.decoder_only)()
    tokenizer = text_tokenizer(kind)
    processor = tiny.processor(module, text_tokenizer=tokenizer, prefix=prefix)
    ask = ("what 😀",) if image is None else (None, "what 😀")
    images = () if image is None else (image,)
    for answer in ANSWERS:
        turns = [Turn("user", ask), Turn("assistant", (answer,))]
        if not prefix:
            turns += [Turn("user", ("é?",)), Turn("assistant", (answer, "😀"))]
        row = processor.encode(Example("row", tuple(turns), images))
        said = tokenizer.decode(row.ids[row.scored].tolist())
        expected = [f"{answer}</s>"] if prefix else [f"{answer}</s>", f"{answer}😀</s>"]
        assert said.replace(" ", "") == "".join(expected).replace(" ", "")
        asked = tokenizer.decode(row.ids[~row.scored & (row.ids >= 0)].tolist())
        assert asked.count("😀") == 1
        assert "�" not in said + asked
