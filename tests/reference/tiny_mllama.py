"""Tiny random folders of Mllama, written by transformers' own classes."""

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.reference.images_in_text import batch_of, examples_of
from tests.tiny import image

SIDE, PLACES = 28, 17  # of a tile: pixels, and patches with the class token
BEGINS, ENDS, TURN_ENDS, PAD = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>",
)  # fmt: skip
HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
MARK = "<|image|>"
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_global_layers=2,
              attention_heads=2, intermediate_layers_indices=[0, 2], vision_output_dim=48,
              image_size=SIDE, patch_size=7, norm_eps=1e-3)  # fmt: skip
TEXT = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, cross_attention_layers=[1, 3], max_position_embeddings=1024,
            rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
                             "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 64})  # fmt: skip
# The jinja of published folders, without tools and dates; its text is a fact of the system.
PUBLISHED_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}{%- else %}"
    "{%- for content in message['content'] %}"
    "{%- if content['type'] == 'image' %}{{- '<|image|>' }}"
    "{%- elif content['type'] == 'text' %}{{- content['text'] }}{%- endif %}"
    "{%- endfor %}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def text_tokenizer(adds_bos=False):
    """Byte-level BPE; the image's mark is the last token, past the head's rows. adds_bos: whether
    it begins every text with a token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BEGINS, ENDS, TURN_ENDS, PAD, *HEADERS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(["user what is it? a cat\n\n", "assistant two dogs"], trainer)
    core.add_special_tokens([AddedToken(MARK, special=True, normalized=False)])
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{BEGINS} $A", special_tokens=[(BEGINS, core.token_to_id(BEGINS))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BEGINS, eos_token=TURN_ENDS, pad_token=PAD
    )


def write_folder(
    folder, kind="mllama", seed=0, adds_bos=False, template=PUBLISHED_TEMPLATE, text=(), **more
):
    """A tiny random folder with open gates; returns its model in fp32. text: other fields of the
    language model. more: other settings of the image processor."""
    tokenizer = text_tokenizer(adds_bos)
    vocabulary = len(tokenizer) - 1
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    config = transformers.MllamaConfig(
        vision_config=VISION,
        text_config=TEXT | {"vocab_size": vocabulary, **ids} | dict(text),
        image_token_index=vocabulary,
    )
    torch.manual_seed(seed)
    model = transformers.MllamaForConditionalGeneration(config).float().eval()
    with torch.no_grad():  # gates and biases start at 0, norms at 1: move them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    processor_of(tokenizer, template, **more).save_pretrained(folder)
    return model


def processor_of(tokenizer, template=PUBLISHED_TEMPLATE, **settings):
    """transformers' processor."""
    values = dict(size={"height": SIDE, "width": SIDE}, max_image_tiles=4,
                  image_mean=[0.5] * 3, image_std=[0.5] * 3) | settings  # fmt: skip
    return transformers.MllamaProcessor(
        transformers.MllamaImageProcessor(**values), tokenizer, chat_template=template
    )


SIZES = {
    "portrait 3:1": (90, 30),
    "landscape": (40, 90),
    "tiny": (20, 20),
    "large": (300, 210),
    "narrow": (5, 200),
    "square": (56, 56),
}
ROWS = [
    ([image(1, SIZES["portrait 3:1"])], (None, "what is it?"), "a cat"),
    ([image(2, SIZES["landscape"]), image(3, SIZES["tiny"])],
     ("what is ", None, "and", None, "?"), "two dogs, a cat"),
    ([], ("what is a cat?",), "it"),
]  # fmt: skip
"""Images that are not square, prompts and answers of unequal length, and text alone."""
MORE_ROWS = [
    ([image(4, SIZES["large"]), image(5, SIZES["narrow"])], (None, None, "what is it?"), "a dog"),
    ([image(6, SIZES["square"])], ("what is a cat? it is ", None, " a cat."), "it"),
]
"""Two images side by side, and an image after text."""


def examples(answers=True, rows=ROWS):
    return examples_of(rows, answers)


def their_inputs(processor, rows=ROWS[:1], answers=False, padding_side="left"):
    """transformers' inputs of rows, answers included or asked for. Its processor takes no batch in
    which rows with and without images meet."""
    texts, images = [], []
    for image_list, content, answer in rows:
        parts = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in content]
        messages = [{"role": "user", "content": parts}]
        if answers:
            said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            messages.append(said)
        texts.append(
            processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not answers
            )
        )
        images.append(image_list)
    return processor(
        text=texts, images=images if any(images) else None, add_special_tokens=False,
        return_tensors="pt", padding=True, padding_side=padding_side,
    )  # fmt: skip


def our_batch(model, answers=False, padding="left", rows=ROWS):
    return batch_of(model, examples(answers, rows), answers, padding)
