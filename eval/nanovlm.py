"""nanoVLM with the weights of one of our models, from a checkout of github.com/huggingface/nanoVLM.

Nothing of it is part of this project: its modules are imported from the checkout's folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from vlm.families.decoder_only.module import DecoderOnly

VISION = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
TEXT = {
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.out_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
"""What we call a part of a block -> what nanoVLM calls it."""


def nanovlm_of(folder: Path, ours: DecoderOnly, image_id: int) -> nn.Module:
    """nanoVLM in fp32 with the weights of a SigLIP, one linear map without shuffling and a Llama.

    image_id: the id that stands for an image token.
    Raises ValueError where the folder holds no nanoVLM.
    """
    if not (folder / "models" / "vision_language_model.py").exists():
        raise ValueError(f"{folder}: expected a checkout of nanoVLM, found no models/")
    # Its data loading needs packages, and its tokenizer the hub; of both the model takes one id.
    processors = ModuleType("data.processors")
    processors.get_tokenizer = lambda *_: SimpleNamespace(image_token_id=image_id)
    sys.modules |= {"data": ModuleType("data"), "data.processors": processors}
    sys.path.insert(0, str(folder))
    from models.config import VLMConfig
    from models.vision_language_model import VisionLanguageModel

    vision, text = ours.tokenizer.backbone.config, ours.text.config
    config = VLMConfig(
        vit_hidden_dim=vision.hidden_size,
        vit_inter_dim=vision.intermediate_size,
        vit_patch_size=vision.patch_size,
        vit_img_size=vision.image_size,
        vit_n_heads=vision.num_attention_heads,
        vit_n_blocks=vision.num_hidden_layers,
        vit_ln_eps=vision.layer_norm_eps,
        lm_hidden_dim=text.hidden_size,
        lm_inter_dim=text.intermediate_size,
        lm_rms_eps=text.rms_norm_eps,
        lm_re_base=text.rope_parameters["rope_theta"],
        lm_vocab_size=text.vocab_size,
        lm_n_heads=text.num_attention_heads,
        lm_n_kv_heads=text.num_key_value_heads,
        lm_n_blocks=text.num_hidden_layers,
        mp_pixel_shuffle_factor=1,
    )
    model = VisionLanguageModel(config, load_backbone=False)
    state = {
        **{f"vision_encoder.{k}": v for k, v in _vision(ours.tokenizer.backbone).items()},
        **{f"decoder.{k}": v for k, v in _text(ours.text).items()},
        "MP.proj.weight": ours.adaptor.layers[0].weight,
    }
    rest = model.load_state_dict({k: v.detach() for k, v in state.items()}, strict=False)
    left = [key for key in rest.missing_keys if not key.endswith("inv_freq")]
    if left or rest.unexpected_keys:
        raise ValueError(f"{folder}: weights {left} and {rest.unexpected_keys} do not fit")
    return model


def _vision(tower: nn.Module) -> dict[str, Tensor]:
    embeddings = tower.embeddings
    state = {
        "patch_embedding.conv.weight": embeddings.patch_embedding.weight,
        "patch_embedding.conv.bias": embeddings.patch_embedding.bias,
        "patch_embedding.position_embedding": embeddings.position_embedding.weight[None],
        "layer_norm.weight": tower.post_layernorm.weight,
        "layer_norm.bias": tower.post_layernorm.bias,
    }
    for number, layer in enumerate(tower.encoder.layers):
        attention = layer.self_attn
        for kind in ("weight", "bias"):
            merged = [
                getattr(p, kind) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            ]
            state[f"blocks.{number}.attn.qkv_proj.{kind}"] = torch.cat(merged)
            for own, name in VISION.items():
                state[f"blocks.{number}.{name}.{kind}"] = getattr(layer.get_submodule(own), kind)
    return state


def _text(text: nn.Module) -> dict[str, Tensor]:
    state = {
        "token_embedding.weight": text.model.embed_tokens.weight,
        "norm.weight": text.model.norm.weight,
        "head.weight": text.lm_head.weight,
    }
    for number, layer in enumerate(text.model.layers):
        for own, name in TEXT.items():
            state[f"blocks.{number}.{name}.weight"] = layer.get_submodule(own).weight
    return state
