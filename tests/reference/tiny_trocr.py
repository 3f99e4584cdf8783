"""Tiny TrOCR folders, as transformers writes them."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from vlm import systems

VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
              image_size=32, patch_size=8, layer_norm_eps=1e-3)  # fmt: skip
TEXT = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
            vocab_size=270, max_position_embeddings=24, pad_token_id=1, bos_token_id=0,
            eos_token_id=2, decoder_start_token_id=2, cross_attention_hidden_size=24)  # fmt: skip
RELU = dict(activation_function="relu", scale_embedding=True, tie_word_embeddings=False)
BEIT = dict(use_absolute_position_embeddings=False, use_relative_position_bias=True,
            layer_scale_init_value=0.1)  # fmt: skip
KINDS = {
    "small": ("deit", {}, RELU),
    "base": ("vit", dict(qkv_bias=False), dict(activation_function="gelu")),
    "printed": (
        "vit",
        dict(qkv_bias=False),
        RELU | dict(use_learned_position_embeddings=False, layernorm_embedding=False),
    ),
    "beit": ("beit", BEIT, {}),
    "beit-shared": (
        "beit",
        BEIT | dict(use_relative_position_bias=False, use_shared_relative_position_bias=True),
        {},
    ),
    "projected": ("vit", {}, dict(cross_attention_hidden_size=None)),
}


def text_tokenizer(**special):
    """Bytes after TrOCR's four special tokens; its own calls put <s> and </s> around a text."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    named = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **(named | special))


def write_folder(folder, kind="small", seed=0, dtype=torch.float32, text=None, **generation):
    """A tiny random folder, written by transformers' own classes."""
    encoder, vision, changes = KINDS[kind]
    torch.manual_seed(seed)
    config = transformers.VisionEncoderDecoderConfig(
        encoder=transformers.AutoConfig.for_model(encoder, **VISION, **vision).to_dict(),
        decoder=transformers.TrOCRConfig(**(TEXT | changes | (text or {}))).to_dict(),
        decoder_start_token_id=2, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.VisionEncoderDecoderModel(config).eval()
    with torch.no_grad():  # biases, tables and norms start at 0 and 1: move them
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 if "decoder" in name else 0.3)
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=2, pad_token_id=1, eos_token_id=2, **generation
    )
    model.to(dtype).save_pretrained(folder)
    image_processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    transformers.TrOCRProcessor(image_processor, text_tokenizer()).save_pretrained(folder)
    return folder


def load(folder, dtype="float32"):
    return systems.load(folder, "cpu", dtype)
