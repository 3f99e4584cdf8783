"""Tiny random folders of Idefics v1, written by transformers' own classes."""

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.reference.images_in_text import batch_of, examples_of
from tests.tiny import image

KINDS = ("instruct", "base", "plain")
"""An instruct model with a perceiver; a base model, which has no end of turns; one without a
perceiver or normed heads, its gates as wide as its states."""
SIDE = 32
FENCE, MARK, TURN_ENDS = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
VISION = dict(embed_dim=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
              image_size=SIDE, patch_size=8, layer_norm_eps=1e-3)  # fmt: skip
PERCEIVER = dict(resampler_n_latents=5, resampler_depth=2, resampler_n_heads=2,
                 resampler_head_dim=6, qk_layer_norms_perceiver=True)  # fmt: skip
TEXT = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=512, cross_layer_interval=2, rms_norm_eps=1e-5,
            qk_layer_norms=True, use_resampler=True)  # fmt: skip
PLAIN = dict(use_resampler=False, qk_layer_norms=False, alpha_type="vector")


def text_tokenizer(kind="instruct"):
    """Byte-level BPE that begins texts with a token; the marks of images are the last tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(["User: what is it? a cat", "\nAssistant: two dogs"], trainer)
    marks = [FENCE, MARK] + [TURN_ENDS] * (kind != "base")
    core.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def write_folder(folder, kind="instruct", seed=0, tied=False, **more):
    """A tiny random folder with open gates; returns its model in fp32. more: other fields."""
    tokenizer = text_tokenizer(kind)
    last = 2 + (kind != "base")
    config = transformers.IdeficsConfig(
        **TEXT | (PLAIN if kind == "plain" else {}) | more,
        vision_config=VISION,
        perceiver_config=PERCEIVER,
        vocab_size=len(tokenizer) - last,
        additional_vocab_size=last,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied,
        freeze_text_layers=False,
        freeze_vision_layers=False,
    )
    torch.manual_seed(seed)
    model = transformers.IdeficsForVisionText2Text(config).float().eval()
    with torch.no_grad():  # gates and biases start at 0, norms at 1: move them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    images = transformers.IdeficsImageProcessor(image_size=SIDE)
    transformers.IdeficsProcessor(images, tokenizer, image_size=SIDE).save_pretrained(folder)
    return model


SIZES = {
    "portrait 3:1": (90, 30),
    "landscape": (40, 90),
    "tiny": (20, 20),
    "large": (300, 210),
    "narrow": (5, 200),
}
ROWS = [
    ([image(1, SIZES["portrait 3:1"])], (None, "what is it?"), "a cat"),
    ([image(2, SIZES["landscape"]), image(3, SIZES["tiny"])],
     ("what is ", None, "and", None, "?"), "two dogs, a cat"),
    ([], ("what is a cat?",), "it"),
    ([image(4, SIZES["large"]), image(5, SIZES["narrow"])], (None, None, "what is it?"), "a dog"),
]  # fmt: skip
"""Images that are not square, before, after and between texts, side by side; text alone."""


def examples(answers=True):
    return examples_of(ROWS, answers)


def prompt_of(content, images, answer=None, ends=(TURN_ENDS, TURN_ENDS)):
    """A conversation as the list of texts and images that transformers' processor takes. ends: what
    ends the question and the answer."""
    images, items = iter(images), ["User:"]
    for number, part in enumerate(content):
        if part is None:
            items.append(next(images))
        elif isinstance(items[-1], str):
            items[-1] += part if number else f" {part}"
        else:
            items.append(part)
    rest = f"{ends[0]}\nAssistant:" + ("" if answer is None else f" {answer}{ends[1]}")
    if isinstance(items[-1], str):
        items[-1] += rest
    else:
        items.append(rest)
    return items


def their_inputs(processor, rows=ROWS, answers=False, padding_side="left"):
    """transformers' inputs of rows, answers included or asked for."""
    knows = TURN_ENDS in processor.tokenizer.get_vocab()
    ends = (TURN_ENDS, TURN_ENDS) if knows else ("", "</s>")
    prompts = [
        prompt_of(content, images, answer if answers else None, ends)
        for images, content, answer in rows
    ]
    return processor(
        text=prompts, add_end_of_utterance_token=False, padding_side=padding_side,
        return_tensors="pt",
    )  # fmt: skip


def our_batch(model, answers=False, padding="left"):
    return batch_of(model, examples(answers), answers, padding)
