"""Tiny random parts for laws: a byte tokenizer with a chat template, text and image models."""

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import CONFIG_MAPPING as CONFIGS
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from vlm import adaptors
from vlm.data.example import Example, Turn
from vlm.families.cross_attended.blocks import GatedBlockConfig
from vlm.families.cross_attended.module import Cross, CrossAttended, CrossConfig
from vlm.families.decoder_only.module import DecoderOnly, ImageLayouts
from vlm.families.decoder_only.processor import Processor
from vlm.families.decoder_only.view_order import InTurn, Marked
from vlm.families.prefix_decoder.module import PrefixDecoder
from vlm.image_tokens import ImageTokenizer, ImageTokens
from vlm.pixels import PixelSpec

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]


def text_tokenizer(special=(), chat_template=CHAT_TEMPLATE):
    """One id for each byte, then the special tokens: 259 ids and those of `special`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*SPECIAL, *special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


TEXT_SHAPES = {
    "llama": dict(tie_word_embeddings=True),
    "qwen2": dict(),
    "qwen3": dict(head_dim=8),
    "gemma": dict(head_dim=8),
    "gemma2": dict(head_dim=8, sliding_window=16),
    "gemma3_text": dict(head_dim=8, sliding_window=16),
    "granite": dict(logits_scaling=3.0),
    "cohere": dict(logit_scale=0.5),
}


def text_model(kind="llama", seed=0, width=32, vocab=300, **more):
    """A random causal language model of a published shape, in fp32."""
    config = CONFIGS[kind](
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
        **{**TEXT_SHAPES.get(kind, {}), **more},
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # larger than the usual start, so that greedy ids are varied
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model


class Patches(ImageTokenizer):
    """A patch convolution alone: pixels of any multiple of 4 become (H / 4) x (W / 4) tokens."""

    def __init__(self, dim=12, size_hw=(8, 12)):
        super().__init__()
        self.dim = dim
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.pixel_spec = PixelSpec(
            size_hw=size_hw, fit="stretch", resample="bilinear", backend="pil",
            mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        )  # fmt: skip

    def forward(self, pixels):
        patches = self.patch(pixels)
        return ImageTokens(
            tokens=patches.flatten(2).transpose(1, 2), grid_hw=tuple(patches.shape[-2:])
        )

    def parts(self):
        return {"patch": self.patch}


def decoder_only(kind="llama", seed=0, size_hw=(8, 12), **more):
    """A tiny DecoderOnly in fp32 and evaluation mode; an image of 8 x 12 pixels is 6 tokens."""
    text = text_model(kind, seed, **more)
    torch.manual_seed(seed)
    tokenizer = Patches(size_hw=size_hw)
    adaptor = adaptors.build(
        dict(kind="mlp", in_width=12, out_width=text.config.hidden_size, depth=2, hidden_width=32)
    )
    return DecoderOnly(tokenizer, adaptor, text).eval()


def processor(model, **options):
    """The processor of a tiny model."""
    views = Marked() if model.family == "cross_attended" else InTurn()
    return Processor(
        options.pop("text_tokenizer", None) or text_tokenizer(),
        model.tokenizer.pixel_spec,
        ImageLayouts(model.tokenizer, model.adaptor, views),
        **options,
    )


def image(seed=0, size_hw=(9, 17)):
    """A noisy non-square image."""
    noise = torch.randint(
        0, 256, (*size_hw, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return Image.fromarray(noise.numpy())


def example(name="row", content=(None, "what?"), answer="a cat", images=None):
    """One question, with None where an image stands, and its answer."""
    slots = sum(part is None for part in content)
    image_list = tuple(image(i) for i in range(slots)) if images is None else tuple(images)
    return Example(name, (Turn("user", tuple(content)), Turn("assistant", (answer,))), image_list)


GATED = dict(heads=4, kv_heads=2, head_width=8, mlp_width=48, eps=1e-5)
"""Blocks like Mllama's."""


def cross_attended(kind="llama", before=(0, 1), gates=0.7, mark_id=None, block=(), **rule):
    """A tiny CrossAttended in fp32 and evaluation mode, its gates open; an image is 6 tokens."""
    made = decoder_only(kind)
    width = made.text.config.hidden_size
    adaptor = adaptors.build(dict(kind="mlp", in_width=12, out_width=20, depth=2, hidden_width=32))
    config = GatedBlockConfig(width=width, memory_width=20, **{**GATED, **dict(block)})
    rule = {"sees": "latest_group", **rule}
    cross = Cross(CrossConfig(block=config, before=before, mark_id=mark_id, **rule))
    with torch.no_grad():
        for name, parameter in cross.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(gates)
            elif parameter.dim() > 1 or name == "mark":
                parameter.normal_(std=0.5)
    return CrossAttended(made.tokenizer, adaptor, cross, made.text).eval()


def prefix_decoder(kind="llama", **options):
    made = decoder_only(kind, **options)
    return PrefixDecoder(made.tokenizer, made.adaptor, made.text).eval()
