"""Qwen-VL written from its equations, slowly, in float64, over weights by their published names.

Shares no code with ours: loops over heads and positions, products of matrices, nothing of torch.nn.
"""

import itertools
import math
import unicodedata

import regex
import torch


def tower(state, config, pixels):
    """The ViT's tokens [L, E] of pixels [3, H, W]."""
    visual, v = config["visual"], "transformer.visual"
    side, heads = visual["patch_size"], visual["heads"]
    kernel = weight(state, f"{v}.conv1.weight").flatten(1)
    rows, columns = pixels.shape[1] // side, pixels.shape[2] // side
    patches = []
    for y in range(rows):
        for x in range(columns):
            patch = pixels[:, y * side : (y + 1) * side, x * side : (x + 1) * side]
            patches.append(kernel @ patch.double().flatten())
    table = weight(state, f"{v}.positional_embedding")
    x = torch.stack(patches) + resized(table, 16, rows, columns)
    x = layer_norm(state, f"{v}.ln_pre", x)
    for n in range(visual["layers"]):
        block = f"{v}.transformer.resblocks.{n}"
        x = x + self_attention(state, f"{block}.attn", layer_norm(state, f"{block}.ln_1", x), heads)
        hidden = linear(state, f"{block}.mlp.c_fc.", layer_norm(state, f"{block}.ln_2", x))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(state, f"{block}.mlp.c_proj.", hidden)
    return x, (rows, columns)


def self_attention(state, name, x, heads):
    """Rows of the fused matrix: query, key and value of the first head, then of the second."""
    fused = linear(state, f"{name}.in_proj.", x)
    width = x.shape[1] // heads
    read = []
    for head in range(heads):
        q, k, v = fused[:, 3 * width * head : 3 * width * (head + 1)].split(width, dim=1)
        read.append(softmax(q @ k.T / math.sqrt(width)) @ v)
    return linear(state, f"{name}.out_proj.", torch.cat(read, 1))


def resized(table, side, rows, columns):
    """A table of side * side positions on another grid, by cubic convolution with a = -0.75."""
    if (rows, columns) == (side, side):
        return table
    out = []
    for y in range(rows):
        for x in range(columns):
            total = torch.zeros(table.shape[1], dtype=torch.float64)
            for r, wy in taps(y, side / rows, side):
                for c, wx in taps(x, side / columns, side):
                    total += wy * wx * table[r * side + c]
            out.append(total)
    return torch.stack(out)


def taps(place, scale, count):
    source = (place + 0.5) * scale - 0.5
    first = math.floor(source)
    for at in range(first - 1, first + 3):
        far, a = abs(source - at), -0.75
        if far <= 1:
            share = (a + 2) * far**3 - (a + 3) * far**2 + 1
        else:
            share = a * far**3 - 5 * a * far**2 + 8 * a * far - 4 * a
        yield min(max(at, 0), count - 1), share


def image_tokens(state, config, pixels):
    """The tokens [Q, D] of an image that stand in the text."""
    v, pool = "transformer.visual", "transformer.visual.attn_pool"
    x, (rows, columns) = tower(state, config, pixels)
    keys = x @ weight(state, f"{pool}.kv_proj.weight").T
    keys = layer_norm(state, f"{pool}.ln_kv", keys)
    at_queries = weight(state, f"{pool}.pos_embed")
    side = math.isqrt(len(at_queries))
    queries = layer_norm(state, f"{pool}.ln_q", weight(state, f"{pool}.query")) + at_queries
    placed = keys + resized(at_queries, side, rows, columns)
    D = queries.shape[1]
    matrix, bias = (weight(state, f"{pool}.attn.in_proj_{leaf}") for leaf in ("weight", "bias"))
    q, k, value = (
        given @ matrix[n * D : (n + 1) * D].T + bias[n * D : (n + 1) * D]
        for n, given in enumerate((queries, placed, keys))
    )
    read = []
    for head in range(D // 128):
        own = slice(128 * head, 128 * (head + 1))
        read.append(softmax(q[:, own] @ k[:, own].T / math.sqrt(128)) @ value[:, own])
    out = linear(state, f"{pool}.attn.out_proj.", torch.cat(read, 1))
    return layer_norm(state, f"{v}.ln_post", out) @ weight(state, f"{v}.proj")


def logits(state, config, ids, images):
    """Scores [T, Z] after each position of one row. ids: -1 where an image token of `images`, each
    [Q, D], stands."""
    table = weight(state, "transformer.wte.weight")
    rows = iter(torch.cat(images)) if images else iter(())
    x = torch.stack([next(rows) if id < 0 else table[id] for id in ids])
    assert next(rows, None) is None
    for n in range(config["num_hidden_layers"]):
        h = f"transformer.h.{n}"
        x = x + causal_attention(state, config, f"{h}.attn", rms_norm(state, f"{h}.ln_1", x))
        seen = rms_norm(state, f"{h}.ln_2", x)
        gate = seen @ weight(state, f"{h}.mlp.w2.weight").T
        hidden = seen @ weight(state, f"{h}.mlp.w1.weight").T * (gate / (1 + torch.exp(-gate)))
        x = x + hidden @ weight(state, f"{h}.mlp.c_proj.weight").T
    return rms_norm(state, "transformer.ln_f", x) @ weight(state, "lm_head.weight").T


def causal_attention(state, config, name, x):
    """With what the authors do to long rows: a larger base of the rotary frequencies for the whole
    row (dynamic NTK), and queries scaled by the logarithm of their position (log-n)."""
    T, D = x.shape
    heads, trained = config["num_attention_heads"], config["seq_length"]
    width = D // heads
    alpha = max(2 ** math.ceil(math.log2(T / trained) + 1) - 1, 1)
    base = config["rotary_emb_base"] * alpha ** (width / (width - 2))
    q, k, v = linear(state, f"{name}.c_attn.", x).split(D, dim=1)
    read = torch.zeros_like(x)
    for head in range(heads):
        own = slice(width * head, width * (head + 1))
        turned_q, turned_k = (
            torch.stack([turned(row, t, base) for t, row in enumerate(given[:, own])])
            for given in (q, k)
        )
        for t in range(T):
            scale = math.log(t + 1, trained) if t + 1 > trained else 1.0
            scores = turned_k[: t + 1] @ (turned_q[t] * scale) / math.sqrt(width)
            read[t, own] = softmax(scores[None])[0] @ v[: t + 1, own]
    return read @ weight(state, f"{name}.c_proj.weight").T


def turned(row, t, base):
    """A vector turned by its position: element i with element i + half."""
    half = len(row) // 2
    angles = t * base ** (-torch.arange(half, dtype=torch.float64) * 2 / len(row))
    first, second = row[:half], row[half:]
    return torch.cat(
        [
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ]
    )


def weight(state, name):
    return state[name].double()


def linear(state, prefix, x):
    return x @ weight(state, f"{prefix}weight").T + weight(state, f"{prefix}bias")


def layer_norm(state, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * weight(state, f"{name}.weight") + weight(state, f"{name}.bias")


def rms_norm(state, name, x):
    scaled = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * weight(state, f"{name}.weight")


def softmax(scores):
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)


PATTERN = regex.compile(
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def text_ids(text, ranks, added):
    """The ids of a text. ranks: bytes -> id. added: special token -> id."""
    text = unicodedata.normalize("NFC", text)
    ids = []
    for piece in regex.split("(" + "|".join(map(regex.escape, added)) + ")", text):
        if piece in added:
            ids.append(added[piece])
            continue
        for word in PATTERN.findall(piece):
            parts = [bytes([byte]) for byte in word.encode()]
            if word.encode() in ranks:
                parts = [word.encode()]
            while True:
                unions = [a + b for a, b in itertools.pairwise(parts)]
                known = [(ranks[union], at) for at, union in enumerate(unions) if union in ranks]
                if not known:
                    break
                _, at = min(known)
                parts[at : at + 2] = [unions[at]]
            ids += [ranks[part] for part in parts]
    return ids
