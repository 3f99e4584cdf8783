"""A tiny random folder of Kosmos-2, written by transformers' own classes."""

import string

import torch
import transformers

from tests.reference.images_in_text import batch_of, examples_of
from tests.tiny import image

KINDS = ("kosmos-2",)
SIDE, LATENTS = 16, 3
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
              image_size=SIDE, patch_size=8, layer_norm_eps=1e-3)  # fmt: skip
TEXT = dict(embed_dim=24, layers=2, ffn_dim=40, attention_heads=3, max_position_embeddings=512,
            layer_norm_eps=1e-4)  # fmt: skip
WORDS = ("a", "cat", "two", "dogs", "what", "is", "it", "and", "An", "image", "of")
MARK, END = "<image>", "</image>"


def text_tokenizer():
    """SentencePiece's Unigram, as XLM-RoBERTa's: words, letters, and what begins a word."""
    scores = dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>"], 0.0)
    scores |= {f"\u2581{word}": -1.0 - 0.1 * i for i, word in enumerate(WORDS)}
    scores |= {"\u2581": -3.0} | dict.fromkeys(string.ascii_letters + string.punctuation, -5.0)
    return transformers.XLMRobertaTokenizer(vocab=list(scores.items()))


def write_folder(folder, kind="kosmos-2", seed=0, tied=True, side=SIDE, more_rows=3, **more):
    """A tiny random folder, written by transformers' own classes; returns its model in fp32."""
    size = {"height": side, "width": side}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size)
    processor = transformers.Kosmos2Processor(images, text_tokenizer())
    config = transformers.Kosmos2Config(
        vision_config=VISION,
        text_config=TEXT | {"vocab_size": len(processor.tokenizer) + more_rows} | more,
        latent_query_num=LATENTS,
        tie_word_embeddings=tied,
    )
    config.text_config.tie_word_embeddings = tied
    torch.manual_seed(seed)
    model = transformers.Kosmos2ForConditionalGeneration(config).float().eval()
    with torch.no_grad():  # biases and norms start at 0 and 1, the tables near 0: move them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


ROWS = [
    ([image(1, (75, 40))], (None, "what is it?"), "a cat"),
    ([image(2, (40, 90)), image(3, (9, 7))], ("what is ", None, "and", None, "?"),
     "two dogs, a cat"),
    ([], ("what is a cat?",), "it"),
]  # fmt: skip
"""Images that are not square, prompts and answers of unequal length, and text alone."""


def examples(answers=True):
    return examples_of(ROWS, answers)


def their_inputs(processor, rows=ROWS, answers=False, padding_side="left"):
    """transformers' inputs of rows, answers included or asked for. Its processor takes one image,
    before the text; its model any number, anywhere, so that ids are made here."""
    tokenizer, seen, texts = processor.tokenizer, [], []
    for images, content, answer in rows:
        run = f" {MARK}{MARK * LATENTS}{END} "
        text = tokenizer.bos_token + "".join(run if part is None else part for part in content)
        texts.append(f"{text} {answer}{tokenizer.eos_token}" if answers else text)
        seen += images
    inputs = tokenizer(
        texts, add_special_tokens=False, return_tensors="pt", padding=True,
        padding_side=padding_side,
    )  # fmt: skip
    ids = inputs["input_ids"]
    is_mark = ids == tokenizer.convert_tokens_to_ids(MARK)
    opens = is_mark & ~torch.nn.functional.pad(is_mark, (1, 0))[:, :-1]
    given = {
        "input_ids": ids,
        "attention_mask": inputs["attention_mask"],
        "image_embeds_position_mask": is_mark & ~opens,
    }
    if seen:
        pixels = processor.image_processor(seen, return_tensors="pt")["pixel_values"]
        return given | {"pixel_values": pixels}
    return given | {"image_embeds": torch.zeros(0, LATENTS, TEXT["embed_dim"])}


def our_batch(model, answers=False, padding="left"):
    return batch_of(model, examples(answers), answers, padding)
