"""Tiny random folders of Qwen-VL, as its authors lay them out: no library can write one."""

import base64
import json
import math

import torch
from safetensors.torch import save_file

from tests.reference.images_in_text import batch_of, examples_of
from tests.tiny import image

KINDS = ("chatml", "raw")
"""`chat_format`: of Qwen-VL-Chat and of Qwen-VL."""
WIDTH, QUERIES_SIDE = 256, 3
MERGED = (
    b"at| a|wh|is|cat|what| it| cat|us|er|user|ss| t|ass|12|aa|aaa| \n|ic|"
    b"\xe4\xbd|\xe4\xbd\xa0|\xc3\xa9"
).split(b"|")
"""Tokens of more than one byte, by rank. "12" is one that no text has: digits stand alone."""
RANKS = {token: rank for rank, token in enumerate([*(bytes([b]) for b in range(256)), *MERGED])}
BOXES = ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"]
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)),
         *BOXES, "<img>", "</img>", "<imgpad>"]  # fmt: skip
IDS = {token: len(RANKS) + number for number, token in enumerate(ADDED)}
CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": 192,
    "kv_channels": 64,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 192,
    "tie_word_embeddings": False,
    "tokenizer_type": "QWenTokenizer",
    "torch_dtype": "float32",
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": False,
    "use_logn_attn": True,
    "visual": {
        "heads": 2,
        "image_size": 70,
        "image_start_id": IDS["<img>"],
        "layers": 2,
        "mlp_ratio": 1.7,
        "n_queries": QUERIES_SIDE**2,
        "output_dim": WIDTH,
        "patch_size": 14,
        "width": 32,
    },
    "vocab_size": len(RANKS) + len(ADDED) + 5,
}
GENERATION = {"do_sample": True, "eos_token_id": IDS["<|endoftext|>"], "max_new_tokens": 512,
              "max_window_size": 6144, "pad_token_id": IDS["<|endoftext|>"], "top_k": 0,
              "top_p": 0.3, "transformers_version": "4.31.0"}  # fmt: skip
CODE = "raise RuntimeError('the code of the folder was run')\n"


def sines(side, width):
    """The queries' table of positions, a number at a time."""
    table = torch.zeros(side * side, width)
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                rate = 10000 ** (-i / quarter)
                for part, place in ((0, column), (2, row)):
                    cell = table[row * side + column]
                    cell[part * quarter + i] = math.sin(place * rate)
                    cell[(part + 1) * quarter + i] = math.cos(place * rate)
    return table


def random_state(config=CONFIG, seed=0):
    """Weights by their published names, in fp32: no bias 0, no norm 1."""
    visual, d, z = config["visual"], config["hidden_size"], config["vocab_size"]
    e, patch, inner = visual["width"], visual["patch_size"], config["intermediate_size"] // 2
    mlp = int(e * visual["mlp_ratio"])
    torch.manual_seed(seed)
    state = {}

    def matrix(name, *shape):
        state[name] = torch.randn(*shape) * math.prod(shape[1:]) ** -0.5 * 0.8

    def linear(name, rows, columns, dot="."):
        matrix(f"{name}{dot}weight", rows, columns)
        state[f"{name}{dot}bias"] = torch.randn(rows) * 0.3

    def norm(name, width, bias=True):
        state[f"{name}.weight"] = 1 + torch.randn(width) * 0.3
        if bias:
            state[f"{name}.bias"] = torch.randn(width) * 0.3

    state["transformer.wte.weight"] = torch.randn(z, d)
    for n in range(config["num_hidden_layers"]):
        h = f"transformer.h.{n}"
        norm(f"{h}.ln_1", d, bias=False)
        linear(f"{h}.attn.c_attn", 3 * d, d)
        matrix(f"{h}.attn.c_proj.weight", d, d)
        norm(f"{h}.ln_2", d, bias=False)
        matrix(f"{h}.mlp.w1.weight", inner, d)
        matrix(f"{h}.mlp.w2.weight", inner, d)
        matrix(f"{h}.mlp.c_proj.weight", d, inner)
    norm("transformer.ln_f", d, bias=False)
    matrix("lm_head.weight", z, d)
    v = "transformer.visual"
    matrix(f"{v}.conv1.weight", e, 3, patch, patch)
    state[f"{v}.positional_embedding"] = torch.randn(256, e) * 0.5
    norm(f"{v}.ln_pre", e)
    for n in range(visual["layers"]):
        block = f"{v}.transformer.resblocks.{n}"
        norm(f"{block}.ln_1", e)
        norm(f"{block}.ln_2", e)
        linear(f"{block}.attn.in_proj", 3 * e, e)
        linear(f"{block}.attn.out_proj", e, e)
        linear(f"{block}.mlp.c_fc", mlp, e)
        linear(f"{block}.mlp.c_proj", e, mlp)
    pool = f"{v}.attn_pool"
    state[f"{pool}.query"] = torch.randn(visual["n_queries"], d)
    state[f"{pool}.pos_embed"] = sines(math.isqrt(visual["n_queries"]), d)
    matrix(f"{pool}.kv_proj.weight", d, e)
    linear(f"{pool}.attn.in_proj", 3 * d, d, dot="_")
    linear(f"{pool}.attn.out_proj", d, d)
    norm(f"{pool}.ln_q", d)
    norm(f"{pool}.ln_kv", d)
    norm(f"{v}.ln_post", d)
    matrix(f"{v}.proj", d, d)
    return state


def write_folder(folder, kind, seed=0, sharded=False):
    """A tiny random folder; returns its weights. sharded: in pickled shards, as on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    state = random_state(seed=seed)
    if sharded:
        names = sorted(state)
        files = {"pytorch_model-00001-of-00002.bin": names[::2],
                 "pytorch_model-00002-of-00002.bin": names[1::2]}  # fmt: skip
        for file, keys in files.items():
            torch.save({key: state[key] for key in keys}, folder / file)
        weight_map = {key: file for file, keys in files.items() for key in keys}
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    else:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": kind} | GENERATION))
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in RANKS.items()]
    (folder / "qwen.tiktoken").write_text("".join(lines))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 8192}))
    for name in ("configuration_qwen", "modeling_qwen", "tokenization_qwen", "visual"):
        (folder / f"{name}.py").write_text(CODE)
    (folder / "LICENSE").write_text("a licence\n")
    return state


ROWS = [
    ([image(1, (75, 40))], (None, "what is it?"), "a cat"),
    ([image(2, (40, 90)), image(3, (9, 7))], ("what is ", None, "and", None, "?"),
     "two dogs, a cat"),
    ([], ("what is a cat?",), "it"),
]  # fmt: skip
"""Images that are not square, prompts and answers of unequal length, and text alone."""


def examples(answers=True):
    return examples_of(ROWS, answers)


def our_batch(model, answers=False, padding="left"):
    return batch_of(model, examples(answers), answers, padding)
