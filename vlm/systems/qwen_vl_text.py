"""The texts of Qwen-VL: its tokens, read from a file of tiktoken, and how it writes conversations.

Source: Qwen/Qwen-VL and Qwen/Qwen-VL-Chat on the hub; QwenLM/Qwen-VL, `eval_mm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers.normalizers import NFC
from transformers import PreTrainedTokenizerFast

from vlm.box_codecs import QWEN_VL_PROMPT
from vlm.families.decoder_only.chat_template import SLOT
from vlm.families.decoder_only.model import ANSWER_PROMPT
from vlm.systems.published import read_json
from vlm.text.tiktoken_file import open_tiktoken

IMAGE_MARK = "<imgpad>"
"""Stands for an image in a literal prompt, between <img> and </img>."""

TIKTOKEN = "qwen.tiktoken"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL = (END, TURN, TURN_END, *(f"<|extra_{number}|>" for number in range(205)))
BOXES = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
"""Stay in what is decoded, as in the authors' `chat`."""
IMAGES = ("<img>", "</img>", IMAGE_MARK)
ADDED = [
    AddedToken(token, special=token not in BOXES, normalized=False)
    for token in (*CONTROL, *BOXES, *IMAGES)
]
"""In the order of their ids, after those of `TIKTOKEN`.
Source: Qwen/Qwen-VL on the hub, `tokenization_qwen.py`."""

CHATML = f"""\
{{%- set images = namespace(count=0) -%}}
{{%- if messages[0]['role'] != 'system' -%}}
{{{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}}}
{{%- endif -%}}
{{%- for message in messages -%}}
{{{{ '<|im_start|>' + message['role'] + '\\n' }}}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] == 'image' -%}}
{{%- set images.count = images.count + 1 -%}}
{{{{ 'Picture ' ~ images.count ~ ': <img>{SLOT}</img>\\n' }}}}
{{%- else -%}}{{{{ part['text'] }}}}{{%- endif -%}}
{{%- endfor -%}}
{{{{ '<|im_end|>\\n' }}}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{ '<|im_start|>assistant\\n' }}}}{{%- endif -%}}"""
"""Source: Qwen/Qwen-VL-Chat on the hub, `qwen_generation_utils.py`, `make_context`, and
`tokenization_qwen.py`, `from_list_format`; images are counted through the conversation, as the
authors' README says of data for fine-tuning."""

RAW = f"""\
{{%- for message in messages -%}}
{{%- if message['role'] == 'system' -%}}
{{{{ raise_exception('a raw Qwen-VL takes no system message') }}}}
{{%- endif -%}}
{{%- if message['role'] == 'assistant' -%}}{{{{ ' ' }}}}{{%- endif -%}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] == 'image' -%}}{{{{ '<img>{SLOT}</img>' }}}}
{{%- else -%}}{{{{ part['text'] }}}}{{%- endif -%}}
{{%- endfor -%}}
{{%- if message['role'] == 'assistant' -%}}{{{{ '<|endoftext|>' }}}}{{%- endif -%}}
{{%- endfor -%}}"""
"""A space before an answer that is a token of its own, as it is before a digit, is not scored.
Source: QwenLM/Qwen-VL, `eval_mm/evaluate_caption.py` and `evaluate_vqa.py`."""

FORMATS = {
    "chatml": (CHATML, ANSWER_PROMPT, QWEN_VL_PROMPT),
    "raw": (RAW, "{question} Answer:", "<ref>{phrase}</ref><box>"),
}
"""`chat_format` of generation_config.json -> the chat template, what is written for a question, and
what asks for a phrase. Those of the second are of `eval_mm/evaluate_vqa.py` and
`evaluate_grounding.py`."""


def conversation_format(folder: Path) -> tuple[str, str, str]:
    """The chat template of a folder, what is written for a question, and what asks for a phrase.
    Raises ValueError where generation_config.json names neither format."""
    file = folder / "generation_config.json"
    found = read_json(file).get("chat_format")
    if found not in FORMATS:
        raise ValueError(
            f"{file}: chat_format: expected {' or '.join(map(repr, FORMATS))}, found {found!r}"
        )
    return FORMATS[found]


def read_text_tokenizer(folder: Path, values: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The text tokenizer of a folder; values: of its config.json.

    Raises ValueError where the folder has no file of tokens, or one that does not fit its
    config.json."""
    path = folder / TIKTOKEN
    if not path.is_file():
        found = sorted(p.name for p in folder.iterdir())[:12]
        raise ValueError(f"{folder}: expected {TIKTOKEN}, its text tokenizer, found {found}")
    tokenizer = open_tiktoken(path, pattern=PATTERN, added=ADDED, end=END, normalizer=NFC())
    said = values["visual"]["image_start_id"]
    found = tokenizer.convert_tokens_to_ids(IMAGES[0])
    if found != said or len(tokenizer) > values["vocab_size"]:
        raise ValueError(
            f"{path}: expected {IMAGES[0]} to be token {said} of {values['vocab_size']} at most, "
            f"as config.json says, found token {found} of {len(tokenizer)}"
        )
    return tokenizer
