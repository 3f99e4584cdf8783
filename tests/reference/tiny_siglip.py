"""Tiny SigLIP folders, as transformers writes them."""

import sentencepiece
import torch
import transformers

VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
              image_size=30, patch_size=8, layer_norm_eps=1e-3)  # fmt: skip
TEXT = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
            max_position_embeddings=16, layer_norm_eps=1e-3)  # fmt: skip
WORDS = ["a cat", "a photo of two dogs", "the tree is green and the sky is blue, too", "many words"]


def siglip_tokenizer(folder, length):
    """SigLIP's own: SentencePiece, lower case, no punctuation; its folders ask for no mask."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 3), model_prefix=str(folder / "spiece"), vocab_size=60,
        model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    return transformers.SiglipTokenizer(
        str(folder / "spiece.model"), model_max_length=length, model_input_names=["input_ids"]
    )


def gemma_tokenizer(folder, length):
    """SigLIP 2's, as its fixed-size folders have it: an end token, pads after, capitals stay."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    names += [chr(c) for c in range(33, 127)] + [f"<0x{byte:02X}>" for byte in range(256)]
    return transformers.GemmaTokenizer(
        vocab={name: i for i, name in enumerate(names)}, merges=[], model_max_length=length,
        add_bos_token=False, add_eos_token=True, padding_side="right",
        model_input_names=["input_ids"],
    )  # fmt: skip


TOKENIZERS = {"siglip": siglip_tokenizer, "siglip2": gemma_tokenizer}


def write_folder(folder, kind="siglip", seed=0, dtype=torch.float32, text=TEXT, noise=0.1, **sizes):
    """A tiny random folder, written by transformers' own classes."""
    folder.mkdir(exist_ok=True)
    tokenizer = TOKENIZERS[kind](folder, text["max_position_embeddings"])
    config = transformers.SiglipConfig(
        text_config=text | {"vocab_size": max(len(tokenizer), 64)},
        vision_config=VISION | sizes,
    )
    torch.manual_seed(seed)
    model = transformers.SiglipModel(config).float().eval()
    with torch.no_grad():  # biases, scale and norms start at 0 and 1: move them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-9.0)
    side = config.vision_config.image_size
    image_processor = transformers.SiglipImageProcessor(
        size={"height": side, "width": side}, resample=2 if kind == "siglip2" else 3
    )
    model.to(dtype).save_pretrained(folder)
    transformers.SiglipProcessor(image_processor, tokenizer).save_pretrained(folder)
