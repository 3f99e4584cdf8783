"""Tiny decoder-only models with a docked text encoder, a BERT with a tokenizer of its own."""

import string

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests import tiny, training
from vlm.data.example import Example, NonCausal, Turn
from vlm.data.spans import DrawSpans
from vlm.families.decoder_only.docked_text import DockedText, SpanTokenizer
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.text.encoders import TextEncoder

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LETTERS = string.ascii_lowercase + string.digits + string.punctuation
LONGEST = 48


def text_tokenizer():
    """WordPiece of letters, each text between [CLS] and [SEP]."""
    names = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    core = Tokenizer(
        models.WordPiece({name: id for id, name in enumerate(names)}, unk_token="[UNK]")
    )
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    )  # fmt: skip


def bert(seed=0):
    """A random BERT without dropout."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(text_tokenizer()), hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=24, max_position_embeddings=LONGEST,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    backbone = BertModel(config).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return backbone


def model(module=None, **options):
    """A tiny model with a docked BERT. module: what it is docked to; None takes the tiny one."""
    module = module or tiny.decoder_only(**options)
    torch.manual_seed(1)
    encoder = TextEncoder(bert(), "mean", masked=True)
    module.docked = DockedText(encoder, module.text.config.hidden_size).eval()
    with torch.no_grad():
        module.docked.connector.weight.mul_(4.0)
    processor = tiny.processor(module, docked=SpanTokenizer(text_tokenizer(), LONGEST))
    return DecoderOnlyModel(module=module, processor=processor, stop_ids=(processor.end_id,))


def example(name, question, answer, images=None):
    """One question and its answer, each in parts; None stands for an image."""
    slots = sum(part is None for part in question)
    image_list = tuple(tiny.image(i) for i in range(slots)) if images is None else tuple(images)
    return Example(name, (Turn("user", tuple(question)), Turn("assistant", tuple(answer))),
                   image_list)  # fmt: skip


def examples():
    """Spans in questions, in the middle and at either end of answers, beside images and alone."""
    span = NonCausal
    return [
        example("both", (None, "what is", span(" in it"), "?"), ("a cat", span(" sat on"), " mat")),
        example("ends", ("and", None, "?"), (span("two dogs"), " ran over there ", span("and on"))),
        example("plain", ("say it",), ("yes",)),
        example("asked", (span("what is this at all, please"), None, span(" now")), ("a horse",)),
    ]


def split_by_kind(second="plain"):
    """Rows of which, in batches of 4 over 2 ranks, rank 0 has images and spans, drawn at several
    lengths, and rank 1 neither ("plain"), or spans alone ("spans")."""
    words = "once upon a time there was a cat that sat on the mat and then went away again"
    long = [example(f"l{i}", (None, "what?"), (f"{i} {words * (1 + i)}",)) for i in range(2)]
    begin = (NonCausal("it is said that "),) if second == "spans" else ()
    short = [example(f"s{i}", ("say",), (*begin, word)) for i, word in enumerate(("yes", "no"))]
    data = training.in_order([*long, *short])
    data.augment = DrawSpans(share=0.4, longest=6)
    return data
