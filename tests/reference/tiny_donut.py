"""Tiny Donut folders, as transformers writes them."""

import torch
import transformers

from tests.reference.tiny_trocr import text_tokenizer

TAGS = ["<s_cord-v2>", "<s_menu>", "</s_menu>", "<s_nm>", "</s_nm>", "<s_sum>", "</s_sum>",
        "<sep/>", "<yes/>"]  # fmt: skip
SWIN = dict(image_size=[64, 48], patch_size=4, embed_dim=16, depths=[2, 3], num_heads=[2, 4],
            window_size=4, layer_norm_eps=1e-3)  # fmt: skip
MBART = dict(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
             max_position_embeddings=40, scale_embedding=True, add_final_layer_norm=True,
             is_decoder=True, add_cross_attention=True, pad_token_id=1, eos_token_id=2)  # fmt: skip


def write_folder(folder, seed=0, swin=SWIN, **preprocessing):
    """A tiny random folder, written by transformers' own classes."""
    tokenizer = text_tokenizer(additional_special_tokens=[])
    tokenizer.add_tokens(TAGS)
    torch.manual_seed(seed)
    config = transformers.VisionEncoderDecoderConfig(
        encoder=transformers.DonutSwinConfig(**swin).to_dict(),
        decoder=transformers.MBartConfig(**MBART, vocab_size=len(tokenizer)).to_dict(),
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<s_cord-v2>"),
        pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.VisionEncoderDecoderModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id, pad_token_id=1, eos_token_id=2
    )
    model.save_pretrained(folder)
    height, width = swin["image_size"]
    image_processor = transformers.DonutImageProcessor(
        **({"size": {"height": height, "width": width}} | preprocessing)
    )
    transformers.DonutProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder
