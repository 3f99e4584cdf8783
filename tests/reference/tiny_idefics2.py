"""Tiny random folders of Idefics2, written by transformers' own classes."""

import torch
import transformers
from PIL import Image
from tokenizers import processors

from tests.reference.images_in_text import batch_of, examples_of
from tests.tiny import image

KINDS = ("whole", "split")
"""Without and with quarters."""
PATCH, SHORTEST, LONGEST, IMAGE_TOKENS = 8, 20, 60, 5
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
              image_size=56, patch_size=PATCH, layer_norm_eps=1e-3)  # fmt: skip
TEXT = dict(model_type="mistral", hidden_size=24, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=2048,
            rms_norm_eps=1e-5, sliding_window=None, pad_token_id=0)  # fmt: skip
PERCEIVER = dict(hidden_size=24, rms_norm_eps=1e-3, resampler_n_latents=IMAGE_TOKENS,
                 resampler_depth=2, resampler_n_heads=4, resampler_head_dim=6,
                 num_key_value_heads=2)  # fmt: skip
MERGES = [("c", "a"), ("ca", "t"), ("▁", "a"), ("▁", "i"), ("d", "o"), ("U", "s"), ("▁", "w")]
FENCE, MARK, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The jinja that published folders hold; its text is a fact of the system."""


def text_tokenizer():
    """Mistral's own kind, of single characters and a few merges; it begins every text with a token,
    and the first word with a mark."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab += ["▁", "\n", *map(chr, range(33, 127)), *("".join(pair) for pair in MERGES)]
    tokenizer = transformers.LlamaTokenizer(
        vocab={token: id for id, token in enumerate(vocab)},
        merges=MERGES,
        pad_token="<unk>",
        extra_special_tokens=[FENCE, MARK, END],
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def write_folder(folder, kind="whole", seed=0, images=(), tied=False, perceiver=(), **text):
    """A tiny random folder, written by transformers' own classes; returns its model in fp32.

    images: settings of the image processor. perceiver, text: of these parts.
    """
    tokenizer = text_tokenizer()
    config = transformers.Idefics2Config(
        vision_config=VISION,
        perceiver_config=PERCEIVER | dict(perceiver),
        text_config=TEXT | {"vocab_size": len(tokenizer) + 3} | text,
        image_token_id=tokenizer.convert_tokens_to_ids(MARK),
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = transformers.Idefics2ForConditionalGeneration(config).float().eval()
    with torch.no_grad():  # biases, norms and latents start alike: move them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    values = dict(
        size={"shortest_edge": SHORTEST, "longest_edge": LONGEST},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_image_splitting=kind == "split",
    )
    processor = transformers.Idefics2Processor(
        transformers.Idefics2ImageProcessor(**values | dict(images)),
        tokenizer,
        image_seq_len=IMAGE_TOKENS,
        chat_template=TEMPLATE,
    )
    model.generation_config.eos_token_id = [2, tokenizer.convert_tokens_to_ids(END)]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


GREY = Image.new("RGB", (31, 45), (127, 127, 127))
SIZES = {
    "portrait": (75, 40),
    "landscape": (40, 90),
    "three to one": (180, 60),
    "tiny": (20, 20),
    "smaller than the least": (9, 7),
    "narrow": (3, 200),
    "whole patches": (56, 40),
    "the table's own grid": (56, 56),
    "no whole patches": (33, 47),
}
ROWS = [
    ([image(1, SIZES["three to one"])], (None, "what is it?"), "a cat"),
    ([image(2, SIZES["landscape"]), image(3, SIZES["tiny"])],
     (None, None, "is it a cat or a dog?"), "two dogs, a cat"),
    ([], ("what is a cat?",), "it"),
    ([image(4, SIZES["no whole patches"]), GREY], ("what is ", None, "and", None), "grey"),
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
        if answers:
            said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            messages.append(said)
        text = processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answers
        )
        texts.append(text.removesuffix("\n"))
        images.append(image_list)
    return processor(
        text=texts, images=images if any(images) else None, return_tensors="pt", padding=True,
        padding_side=padding_side,
    )  # fmt: skip


def our_batch(model, answers=False, padding="left"):
    return batch_of(model, examples(answers), answers, padding)
