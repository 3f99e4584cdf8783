"""Tiny random folders of LLaVA 1.5 and LLaVA-NeXT, written by transformers' own classes."""

import torch
import transformers
from tokenizers import processors

from tests.reference.images_in_text import batch_of, examples_of
from tests.tiny import image

KINDS = ("llava", "llava_next")
SIDE_PX, PATCH_PX = 32, 8
GRID = SIDE_PX // PATCH_PX
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
CLIP = dict(model_type="clip_vision_model", hidden_size=16, intermediate_size=24,
            num_hidden_layers=3, num_attention_heads=2, image_size=SIDE_PX, patch_size=PATCH_PX,
            projection_dim=8, layer_norm_eps=1e-3)  # fmt: skip
TEXT = dict(model_type="llama", hidden_size=24, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=2048,
            rms_norm_eps=1e-5)  # fmt: skip
MERGES = [("c", "a"), ("ca", "t"), ("▁", "a"), ("▁", "i"), ("d", "o"), ("S", "E"), ("▁", "U")]
VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s>'}}"
    "{% endif %}{% endfor %}"
)
TEMPLATES = {"llava": VICUNA, "llava_next": MISTRAL}
"""The jinja that published folders hold, for contents in parts; their texts are facts of the
systems. Vicuna's ends no answer."""


def text_tokenizer():
    """LLaMA's own kind, of single characters and a few merges; it begins every text with a token,
    and words with a mark."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab += ["▁", "\n", *map(chr, range(33, 127)), *("".join(pair) for pair in MERGES)]
    tokenizer = transformers.LlamaTokenizer(
        vocab={token: id for id, token in enumerate(vocab)},
        merges=MERGES,
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def write_folder(folder, kind, seed=0, images=(), text=(), **more):
    """A tiny random folder, written by transformers' own classes; returns its model in fp32.

    images: settings of the image processor. text: of the language model. more: of the whole."""
    strategy = more.setdefault("vision_feature_select_strategy", "default")
    tokenizer = text_tokenizer()
    names = {"llava": "Llava", "llava_next": "LlavaNext"}[kind]
    crop = {"height": SIDE_PX, "width": SIDE_PX}
    values = {"size": {"shortest_edge": SIDE_PX}, "crop_size": crop}
    if kind == "llava_next":
        more["image_grid_pinpoints"] = PINPOINTS
        values["image_grid_pinpoints"] = PINPOINTS
        image_processor = transformers.LlavaNextImageProcessor(**values | dict(images))
    else:
        name = dict(images).get("name", "CLIPImageProcessor")
        image_processor = getattr(transformers, name)(**values)
    config = getattr(transformers, f"{names}Config")(
        vision_config=CLIP | more.pop("vision", {}),
        text_config=TEXT | {"vocab_size": len(tokenizer) + 5} | dict(text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **more,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{names}ForConditionalGeneration")(config).float().eval()
    with torch.no_grad():  # biases and norms start at 0 and 1: move them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    processor = getattr(transformers, f"{names}Processor")(
        image_processor,
        tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=TEMPLATES[kind],
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


SIZES = {
    "portrait": (75, 40),
    "landscape": (40, 90),
    "small": (9, 7),
    "large": (300, 210),
    "narrow": (5, 90),
    "tall": (97, 30),
    "one view": (32, 32),
}
ROWS = [
    ([image(1, SIZES["portrait"])], (None, "what is it?"), "a cat"),
    ([image(2, SIZES["landscape"]), image(3, SIZES["small"])],
     (None, None, "is it a cat or a dog?"), "two dogs, a cat"),
    ([], ("what is a cat?",), "it"),
]  # fmt: skip
"""Images that are not square, prompts and answers of unequal length, and text alone."""


def examples(answers=True):
    return examples_of(ROWS, answers)


def their_inputs(processor, rows=ROWS, answers=False, padding_side="left"):
    """transformers' inputs of rows, answers and their ends included or asked for."""
    texts, images = [], []
    for image_list, content, answer in rows:
        parts = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in content]
        messages = [{"role": "user", "content": parts}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        texts.append(f"{text} {answer}</s>" if answers else text)
        images += image_list
    return processor(
        text=texts, images=images or None, return_tensors="pt", padding=True,
        padding_side=padding_side,
    )  # fmt: skip


def our_batch(model, answers=False, padding="left"):
    return batch_of(model, examples(answers), answers, padding)
