"""Tiny CLIP folders, as transformers writes them."""

import torch
import transformers
from tokenizers import pre_tokenizers

VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
              image_size=32, patch_size=8, layer_norm_eps=1e-3)  # fmt: skip
TEXT = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
            max_position_embeddings=20, layer_norm_eps=1e-3)  # fmt: skip


def text_tokenizer(length=20):
    """CLIP's tokenizer class over single bytes: no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"{c}</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(names)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length)


def write_folder(
    folder, seed=0, act="quick_gelu", old_end=False, dtype=torch.float32, text=TEXT, noise=0.1,
    width=12, **sizes,
):  # fmt: skip
    """A tiny random folder, written by transformers' own classes; returns its model in fp32."""
    tokenizer = text_tokenizer(text["max_position_embeddings"])
    end = 2 if old_end else tokenizer.eos_token_id
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=1)
    config = transformers.CLIPConfig(
        text_config=text | ids | {"vocab_size": len(tokenizer), "hidden_act": act},
        vision_config=VISION | {"hidden_act": act} | sizes,
        projection_dim=width,
        logit_scale_init_value=3.1,
    )
    torch.manual_seed(seed)
    model = transformers.CLIPModel(config).float().eval()
    with torch.no_grad():  # biases and norms start at 0 and 1: move them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    side = config.vision_config.image_size
    image_processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    model.to(dtype).save_pretrained(folder)
    transformers.CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return model.float()
