"""Tiny SigLIP 2 folders of native resolution."""

import string

import torch
import transformers

from tests.reference.tiny_naflex import TINY

LENGTH = 64
"""Of a text in the published models, which transformers' processor always pads to."""


def text_tokenizer(**options):
    """Letters and a few pairs of them, in the class and with the settings of published folders."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "▁": 5}
    pairs = [("t", "h"), ("c", "a"), ("o", "n")]
    for token in [*string.ascii_letters, ".", *map("".join, pairs)]:
        vocabulary[token] = len(vocabulary)
    published = {
        "add_bos_token": False,
        "add_eos_token": True,
        "padding_side": "right",
        "model_input_names": ["input_ids"],
        "model_max_length": LENGTH,
    }
    return transformers.Siglip2Tokenizer(vocab=vocabulary, merges=pairs, **published | options)


def saved(folder, max_num_patches=256, **options):
    """A tiny Siglip2Model with its processor in `folder`; returns the model."""
    torch.manual_seed(0)
    text = {key: TINY[key] for key in TINY if "patch" not in key}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = transformers.Siglip2Config(
        vision_config=TINY,
        text_config=text | ids | {"vocab_size": 70, "max_position_embeddings": LENGTH},
    )
    model = transformers.Siglip2Model(config).eval()
    for parameter in model.parameters():  # biases and norms start at 0 and 1: move them
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    transformers.Siglip2Processor(
        image_processor=transformers.Siglip2ImageProcessor(max_num_patches=max_num_patches),
        tokenizer=text_tokenizer(**options),
    ).save_pretrained(folder)
    return model
