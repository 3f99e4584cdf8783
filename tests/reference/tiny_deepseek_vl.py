"""Tiny random DeepSeek-VL folders of both sizes, written by transformers' own classes."""

from functools import partial

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.reference import images_in_text
from tests.tiny import image
from vlm.data.example import Example, Turn
from vlm.systems import deepseek_vl

BOS, EOS, MARK = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", deepseek_vl.IMAGE_MARK
# The jinja that published folders hold, for contents in parts; its text is a fact of the system.
PUBLISHED_TEMPLATE = (
    "{% set seps = ['\n\n', '" + EOS + "'] %}" + deepseek_vl.SYSTEM_MESSAGE + "\n\n"
    "{% for message in messages %}"
    "{{ 'User: ' if message['role'] == 'user' else 'Assistant: ' }}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}" + MARK + "{% else %}"
    "{% set text = content['text'] %}"
    "{% if loop.first %}{% set text = text.lstrip() %}{% endif %}"
    "{% if loop.last %}{% set text = text.rstrip() %}{% endif %}"
    "{{ text }}{% endif %}{% endfor %}"
    "{% if not loop.last or add_generation_prompt %}"
    "{{ seps[0] if message['role'] == 'user' else seps[1] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SIGLIP = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
              image_size=32, patch_size=8, hidden_act="gelu", layer_norm_eps=1e-3,
              vision_use_head=False)  # fmt: skip
SAM = dict(hidden_size=16, output_channels=6, num_hidden_layers=3, num_attention_heads=2,
           image_size=64, patch_size=8, window_size=3, global_attn_indexes=[1, 2],
           mlp_dim=24)  # fmt: skip
LLAMA = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
             num_key_value_heads=3, max_position_embeddings=512, rms_norm_eps=1e-6)  # fmt: skip
KINDS = ("deepseek_vl", "deepseek_vl_hybrid")
SIDE = SIGLIP["image_size"] // SIGLIP["patch_size"]
TEXTS = ["what is it? a cat", "User: Describe the pictures.", "Assistant: two dogs and a tree"]


def text_tokenizer():
    """Byte-level BPE that begins every text with BOS, as the published one."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[BOS, EOS, MARK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([*TEXTS, deepseek_vl.SYSTEM_MESSAGE], trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        extra_special_tokens={"image_token": MARK},
    )


def write_folder(folder, kind, seed=0, **more):
    """A tiny random folder, written by transformers' own classes; returns its model in fp32."""
    tokenizer = text_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    values = dict(
        text_config=LLAMA | {"model_type": "llama", "vocab_size": len(tokenizer), **ids},
        vision_config=SIGLIP | {"model_type": "siglip_vision_model"} | more.pop("vision", {}),
        image_token_id=tokenizer.convert_tokens_to_ids(MARK),
        tie_word_embeddings=more.pop("tied", False),
    )
    size = {"height": 32, "width": 32}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": size}
    if kind == "deepseek_vl":
        image_processor = transformers.DeepseekVLImageProcessor(**half)
        names = "DeepseekVL"
    else:
        values["high_res_vision_config"] = SAM | {"model_type": "sam_vision_model"}
        high = {"high_res_size": {"height": 64, "width": 64}}
        image_processor = transformers.DeepseekVLHybridImageProcessor(**half, **high)
        names = "DeepseekVLHybrid"
    torch.manual_seed(seed)
    config = getattr(transformers, f"{names}Config")(**values)
    model = getattr(transformers, f"{names}ForConditionalGeneration")(config).float().eval()
    with torch.no_grad():  # biases, norms and alpha start at 0 and 1: move them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    processor = getattr(transformers, f"{names}Processor")(
        image_processor,
        tokenizer,
        chat_template=PUBLISHED_TEMPLATE,
        num_image_tokens=SIDE**2,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


CONVERSATIONS = {
    "no image": [("user", ("what is it?",))],
    "one image": [("user", (None, "what is it?"))],
    "two images": [("user", ("Describe ", None, " and", None, " the images. "))],
    "three turns": [
        ("user", (None, "\n  what is it?")),
        ("assistant", ("a cat",)),
        ("user", ("and this?", None)),
        ("assistant", ("two dogs ",)),
        ("user", ("Describe the tree.",)),
    ],
}


def conversation(turns):
    """Our example and theirs, with non-square images."""
    slots = sum(part is None for _, content in turns for part in content)
    images = [image(i, (20 + 30 * (i % 2), 45 - 9 * i)) for i in range(slots)]
    ours = Example("row", tuple(Turn(role, content) for role, content in turns), tuple(images))
    left = iter(images)
    theirs = [
        {
            "role": role,
            "content": [
                {"type": "image", "image": next(left)}
                if part is None
                else {"type": "text", "text": part}
                for part in content
            ],
        }
        for role, content in turns
    ]
    return ours, theirs


def their_inputs(processor, messages, **options):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


with_marks = partial(images_in_text.with_marks, mark=MARK)
