"""Tiny random folders of Qwen2-VL and Qwen2.5-VL, written by transformers' own classes. Patches,
merged blocks, windows and limits of pixels are the published ones, but for the largest image."""

import json
import shutil

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.reference.images_in_text import batch_of, examples_of
from tests.tiny import image

KINDS = ("qwen2_vl", "qwen2_5_vl")
NAMES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 80
VISION = {
    "qwen2_vl": dict(depth=3, embed_dim=32, hidden_size=32, num_heads=2),
    "qwen2_5_vl": dict(depth=3, hidden_size=32, intermediate_size=44, num_heads=2,
                       out_hidden_size=32, fullatt_block_indexes=[1]),
}  # fmt: skip
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048, rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=[1, 1, 2]),
            )  # fmt: skip
MARKS = ["<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
# The jinja that published folders hold; its text is a fact of the systems.
PUBLISHED_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_folder(folder, kind, seed=0, tied=False, images=(), vision=()):
    """A tiny random folder, written by transformers' own classes; returns its model in fp32.

    images: settings of the image processor. vision: of the image encoder."""
    tokenizer, names = tiny.text_tokenizer(MARKS, PUBLISHED_TEMPLATE), NAMES[kind]
    tokenizer.pad_token = MARKS[0]
    id = tokenizer.convert_tokens_to_ids
    ends = {"bos_token_id": id(MARKS[0]), "eos_token_id": id("<|im_end|>")}
    config = getattr(transformers, f"{names}Config")(
        vision_config=VISION[kind] | dict(vision),
        text_config=TEXT | {"vocab_size": len(tokenizer) + 5, **ends},
        vision_start_token_id=id(MARKS[1]),
        vision_end_token_id=id(MARKS[2]),
        image_token_id=id(MARKS[3]),
        video_token_id=id(MARKS[4]),
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{names}ForConditionalGeneration")(config).float().eval()
    with torch.no_grad():  # biases and norms start at 0 and 1: move them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.generation_config.eos_token_id = [id("<|im_end|>"), id("<|endoftext|>")]
    model.save_pretrained(folder)
    limits = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    getattr(transformers, f"{names}Processor")(
        transformers.Qwen2VLImageProcessor(**{"size": limits} | dict(images)),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(),
        chat_template=PUBLISHED_TEMPLATE,
    ).save_pretrained(folder)
    return model


def published_style(folder, out):
    """The folder as the authors published it, by transformers 4: the images' processor and the
    template apart, text fields in the whole of config.json, weights by their older names."""
    shutil.copytree(folder, out)
    processor = json.loads((out / "processor_config.json").read_text())
    (out / "processor_config.json").unlink()
    images = processor["image_processor"]
    size = images.pop("size")
    images |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    (out / "preprocessor_config.json").write_text(json.dumps(images))
    template = (out / "chat_template.jinja").read_text()
    (out / "chat_template.jinja").unlink()
    (out / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    values = json.loads((out / "config.json").read_text())
    text = values.pop("text_config")
    rotary = text.pop("rope_parameters")
    for part in (values, text, values["vision_config"]):
        part.pop("dtype", None)
    for name in ("model_type", "layer_types", "tie_word_embeddings"):
        text.pop(name, None)
    for name in ("model_type", "rope_parameters", "in_channels"):
        values["vision_config"].pop(name, None)
    values |= text | {
        "torch_dtype": "float32",
        "rope_theta": rotary["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rotary["mrope_section"]},
    }
    values["vision_config"] |= {"in_chans": 3, "spatial_patch_size": 14}
    (out / "config.json").write_text(json.dumps(values))
    state = load_file(out / "model.safetensors")
    older = {older_name(name): tensor for name, tensor in state.items()}
    save_file(older, out / "model.safetensors", {"format": "pt"})
    return out


def older_name(name):
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


SIZES = {
    "portrait": (300, 100),  # the side of 112 divides the window of 112
    "landscape": (90, 250),
    "twenty": (20, 20),
    "narrow": (12, 700),
    "large": (900, 420),
    "two windows": (224, 112),
    "window and a bit": (140, 196),
}
ROWS = [
    ([image(1, SIZES["portrait"])], (None, "what is it?"), "a cat"),
    ([image(2, SIZES["landscape"]), image(3, SIZES["twenty"])],
     ("what is ", None, "and", None, "?"), "two dogs, a cat"),
    ([], ("what is a cat?",), "it"),
]  # fmt: skip
"""Images that are not square, prompts and answers of unequal length, and text alone."""
GREY = Image.fromarray(np.full((70, 120, 3), 127, np.uint8))


def examples(answers=True):
    return examples_of(ROWS, answers)


def their_inputs(processor, rows=ROWS, answers=False, padding_side="left"):
    """transformers' inputs of rows, answers and their ends included or asked for."""
    texts, images = [], []
    for image_list, content, answer in rows:
        parts = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in content]
        messages = [{"role": "user", "content": parts}]
        if answers:
            said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            messages.append(said)
        text = processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answers
        )
        texts.append(text.removesuffix("\n") if answers else text)
        images += image_list
    return processor(
        text=texts, images=images or None, return_tensors="pt", padding=True,
        padding_side=padding_side,
    )  # fmt: skip


def our_batch(model, answers=False, padding="left"):
    return batch_of(model, examples(answers), answers, padding)
