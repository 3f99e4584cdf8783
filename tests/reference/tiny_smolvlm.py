"""Tiny random folders of Idefics3 and SmolVLM, written by transformers' own classes."""

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.smolvlm import processing_smolvlm

from tests.reference.images_in_text import batch_of, examples_of
from tests.tiny import image

KINDS = ("idefics3", "smolvlm")
TILE, LONG, IMAGE_TOKENS = 32, 96, 4
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
              image_size=TILE, patch_size=8, layer_norm_eps=1e-3)  # fmt: skip
TEXT = dict(model_type="llama", hidden_size=24, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=2048,
            rms_norm_eps=1e-5)  # fmt: skip
MARKS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
TAGS = ["<global-img>", *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))]
BEGINS = {"idefics3": "<|begin_of_text|>", "smolvlm": "<|im_start|>"}
# The jinja that published folders hold, for contents in parts; its text is a fact of the systems.
PUBLISHED_TEMPLATE = (
    "%s{%% for message in messages %%}{{message['role'] | capitalize}}"
    "{%% if message['content'][0]['type'] == 'image' %%}{{':'}}{%% else %%}{{': '}}{%% endif %%}"
    "{%% for line in message['content'] %%}{%% if line['type'] == 'text' %%}{{line['text']}}"
    "{%% elif line['type'] == 'image' %%}{{ '<image>' }}{%% endif %%}{%% endfor %%}"
    "<end_of_utterance>\n{%% endfor %%}{%% if add_generation_prompt %%}{{ 'Assistant:' }}"
    "{%% endif %%}"
)

# SmolVLM's processor asks for a package that spells the numbers of video frames; no image needs it.
processing_smolvlm.num2words = processing_smolvlm.num2words or str


def text_tokenizer(kind):
    """Byte-level BPE. SmolVLM's tags are special tokens, Idefics3's are plain text; Idefics3's
    begins every text with a token."""
    begins = BEGINS[kind]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end_of_text|>", begins, *MARKS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(["User: what is it? a cat\n\n", "Assistant: two dogs", *TAGS], trainer)
    if kind == "smolvlm":
        core.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in TAGS])
    else:
        core.post_processor = processors.TemplateProcessing(
            single=f"{begins} $A", special_tokens=[(begins, core.token_to_id(begins))]
        )
    named = dict(zip(("fake_image_token", "image_token", "end_of_utterance_token"), MARKS))
    if kind == "smolvlm":
        named["global_image_token"] = TAGS[0]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=begins, eos_token=MARKS[2], pad_token="<|end_of_text|>",
        extra_special_tokens=named,
    )  # fmt: skip


def write_folder(folder, kind, seed=0, image_processor=(), tied=False, patch=8, **more):
    """A tiny random folder, written by transformers' own classes; returns its model in fp32."""
    tokenizer = text_tokenizer(kind)
    names = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[kind]
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, f"{names}Config")(
        vision_config=VISION | {"patch_size": patch},
        text_config=TEXT | {"vocab_size": len(tokenizer) + 3, "pad_token_id": 0, **ids},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
        scale_factor=2,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{names}ForConditionalGeneration")(config).float().eval()
    with torch.no_grad():  # biases and norms start at 0 and 1: move them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    processor_of(kind, tokenizer, **dict(image_processor)).save_pretrained(folder)
    return model


def processor_of(kind, tokenizer, **settings):
    """transformers' processor."""
    values = dict(size={"longest_edge": LONG}, max_image_size={"longest_edge": TILE},
                  image_mean=[0.5] * 3, image_std=[0.5] * 3) | settings  # fmt: skip
    template = PUBLISHED_TEMPLATE % BEGINS[kind]
    if kind == "idefics3":
        images = transformers.Idefics3ImageProcessor(**values)
        return transformers.Idefics3Processor(
            images, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=template
        )
    images = transformers.SmolVLMImageProcessor(**values)
    videos = transformers.SmolVLMVideoProcessor(**values)
    return transformers.SmolVLMProcessor(
        images, tokenizer, videos, image_seq_len=IMAGE_TOKENS, chat_template=template
    )


SIZES = {
    "portrait": (75, 40),
    "landscape": (40, 90),
    "small": (9, 7),
    "large": (300, 210),
    "narrow": (5, 200),
    "square": (64, 64),
}
ROWS = [
    ([image(1, SIZES["portrait"])], (None, "what is it?"), "a cat"),
    ([image(2, SIZES["landscape"]), image(3, SIZES["small"])],
     ("what is ", None, "and", None, "?"), "two dogs, a cat"),
    ([], ("what is a cat?",), "it"),
]  # fmt: skip
"""Images that are not square, prompts and answers of unequal length, and text alone."""


def examples(answers=True):
    return examples_of(ROWS, answers)


def their_inputs(processor, rows=ROWS, answers=False, padding_side="left"):
    """transformers' inputs of rows, answers included or asked for. Its processor takes no batch in
    which a row has no image beside rows that have some; then pixels are those of the others."""
    texts, images = [], []
    for image_list, content, answer in rows:
        parts = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in content]
        messages = [{"role": "user", "content": parts}]
        if answers:
            said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            messages.append(said)
        text = processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not answers
        )
        texts.append(text.removesuffix("\n"))
        images.append(image_list)
    return processor(
        text=texts, images=images if any(images) else None, add_special_tokens=False,
        return_tensors="pt", padding=True, padding_side=padding_side,
    )  # fmt: skip


def our_batch(model, answers=False, padding="left"):
    return batch_of(model, examples(answers), answers, padding)
