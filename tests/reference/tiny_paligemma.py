"""Tiny random PaliGemma 1 and 2 folders, written by transformers' own classes."""

import torch
import transformers

from tests.reference.images_in_text import batch_of, examples_of
from tests.tiny import image as one_image

SIDE_PX, IMAGE_TOKENS = 32, 16
SIGLIP = dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=24,
              num_hidden_layers=2, num_attention_heads=2, image_size=SIDE_PX, patch_size=8,
              hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-3,
              vision_use_head=False)  # fmt: skip
TEXT = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=512)  # fmt: skip
TEXTS = {
    "gemma": TEXT | {"model_type": "gemma"},
    "gemma2": TEXT | {"model_type": "gemma2", "sliding_window": 12, "query_pre_attn_scalar": 11},
}
"""The sliding window is shorter than a prompt."""
MERGES = [("c", "a"), ("ca", "t"), ("▁", "a"), ("\n", "\n"), ("e", "n"), ("\n", "c"), ("d", "o")]
"""One of them would join a prompt's line break with an answer's first letter."""


def text_tokenizer():
    """Gemma's own kind, of single characters and a few merges."""
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab += ["▁", "\n", *map(chr, range(33, 127)), *("".join(pair) for pair in MERGES)]
    return transformers.GemmaTokenizer(
        vocab={token: id for id, token in enumerate(vocab)},
        merges=MERGES,
        extra_special_tokens={"image_token": "<image>"},
    )


def write_folder(folder, kind, seed=0, **more):
    """A tiny random folder, written by transformers' own classes; returns its model in fp32."""
    image_processor = transformers.SiglipImageProcessor(
        size={"height": SIDE_PX, "width": SIDE_PX}, resample=3, image_seq_length=IMAGE_TOKENS,
        image_mean=[0.5] * 3, image_std=[0.5] * 3, **more.pop("image_processor", {}),
    )  # fmt: skip
    processor = transformers.PaliGemmaProcessor(image_processor, text_tokenizer())
    config = transformers.PaliGemmaConfig(
        vision_config=SIGLIP | more.pop("vision", {}),
        text_config=TEXTS[kind] | {"vocab_size": len(processor.tokenizer) + more.pop("spare", 7)},
        image_token_index=processor.image_token_id,
        projection_dim=TEXT["hidden_size"],
    )
    torch.manual_seed(seed)
    model = transformers.PaliGemmaForConditionalGeneration(config).float().eval()
    with torch.no_grad():  # biases and norms start at 0 and 1: move them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


ROWS = [
    (one_image(1, (20, 45)), "caption en", "cat on a dog"),
    (one_image(2, (50, 30)), "answer en where is the cat? it is\nlate", "<loc0001><seg007> do"),
    (one_image(3, (64, 9)), "ocr", "c"),
]
"""Images that are not square, prompts and answers of unequal length."""


def examples(answers=True):
    return examples_of(
        [([image], (None, prompt), answer) for image, prompt, answer in ROWS], answers
    )


def their_inputs(processor, rows=ROWS, answers=True):
    images, prompts, suffixes = zip(*rows)
    return processor(
        images=list(images),
        text=[f"<image>{prompt}" for prompt in prompts],
        suffix=list(suffixes) if answers else None,
        return_tensors="pt",
        padding="longest",
    )


def our_batch(model, answers=True, padding="left"):
    return batch_of(model, examples(answers), answers, padding)
