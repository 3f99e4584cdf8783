"""Tiny encoder-decoder models, and rows for them."""

import dataclasses

import torch
import transformers

from tests import tiny
from tests.tiny import image
from vlm import adaptors
from vlm.data.example import caption_example
from vlm.families.encoder_decoder.module import EncoderDecoder
from vlm.families.encoder_decoder.processor import LineProcessor
from vlm.text.decoders import build

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
POSITIONS = dict(vocab_size=300, max_position_embeddings=64)
IDS = dict(pad_token_id=256, bos_token_id=257, eos_token_id=258)
SHAPES = {
    "trocr": dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48),
    "sinusoidal": dict(
        d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
        use_learned_position_embeddings=False, layernorm_embedding=False,
        tie_word_embeddings=False,
    ),
    "mbart": dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
                  scale_embedding=True),
    "bert": SIZES,
    "roberta": SIZES,
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4),
}  # fmt: skip


def text_config(kind, **more):
    name = "trocr" if kind == "sinusoidal" else kind
    positions = dict(POSITIONS)
    if kind == "roberta":
        positions["max_position_embeddings"] = 64 + 257  # counted from after the pad id
    values = dict(is_decoder=True, add_cross_attention=True) | SHAPES[kind] | positions | IDS
    return transformers.AutoConfig.for_model(name, **(values | more))


def model(kind="trocr", seed=0, size_hw=(8, 12), noise=0.5, **more):
    """A tiny EncoderDecoder in fp32; a picture of 8 x 12 pixels gives 6 tokens."""
    torch.manual_seed(seed)
    text = build(text_config(kind, **more)).eval()
    with torch.no_grad():  # larger than the usual start, so that greedy ids are varied
        for parameter in text.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    torch.manual_seed(seed)
    tokenizer = tiny.Patches(size_hw=size_hw)
    adaptor = adaptors.build(dict(kind="mlp", in_width=12, out_width=32, depth=1, hidden_width=32))
    with torch.no_grad():
        adaptor.layers[0].weight.mul_(4.0)
    return EncoderDecoder(tokenizer, adaptor, text).eval()


def processor(module, **options):
    """Start id 257, end id 258, pad id 256."""
    given = dict(start_ids=(257,), end_id=258, pad_id=256, max_tokens=64) | options
    tokenizer = given.pop("text_tokenizer", None) or tiny.text_tokenizer()
    return LineProcessor(tokenizer, module.tokenizer.pixel_spec, **given)


def rows(processor, *texts):
    return [
        processor.encode(caption_example(f"r{i}", image(i), text, ""))
        for i, text in enumerate(texts)
    ]


def wide(module, size_hw):
    """A processor for views of another size."""
    spec = dataclasses.replace(module.tokenizer.pixel_spec, size_hw=size_hw)
    chosen = processor(module)
    chosen.pixel_spec = spec
    return chosen
