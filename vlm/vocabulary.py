"""New tokens for a language model, such as <loc0000> to <loc1023>: their ids and their rows.

`grow` gives tokens to a text tokenizer and rows to the language model's tables. `train_rows`
makes just some rows trainable, so that the others keep their bits and the optimizer holds nothing
for them.

Shapes: T text position, D decoder width, Z vocabulary, R trained row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from torch.nn import functional as F

NOISE = 0.05
"""Spread of new rows around the mean of the old ones, as a share of the old rows' own spread: new
tokens start apart, and none starts likelier than a usual one."""


def grow(
    text: nn.Module, text_tokenizer, tokens: Sequence[str], *, seed: int = 0
) -> tuple[int, ...]:
    """The ids of `tokens`, each one id from now on, in place: tokens that the text tokenizer lacks
    are added to it, as tokens that decoding keeps, with rows in the language model's tables.

    text: a causal language model of transformers. Its tables (tied ones stay tied) grow where an
        id is beyond their end; spare rows of a padded vocabulary are used first. Rows of new
        tokens start at the mean of the known ones with a little noise of `seed`; all other rows
        keep their bits, and the global generator its state.
    text_tokenizer: a fast tokenizer of transformers.
    Raises ValueError naming every token that is empty, repeated, has a blank at an end, is there
    already as a special one (which decoding leaves out), or that would not come back from its id;
    after `train_rows`, and where the head has fewer rows than the input table. Neither argument is
    changed by then.
    """
    if isinstance(text.get_input_embeddings(), SplitRows):
        raise ValueError("rows of this language model are trained apart: add tokens before that")
    rows, written = (
        len(table.weight) for table in (text.get_input_embeddings(), text.get_output_embeddings())
    )
    if rows != written:
        raise ValueError(
            f"expected as many rows in the head as in the input table, found {written} and {rows}: "
            "tokens that are added could be read and not written"
        )
    tokens = list(tokens)
    _check(text_tokenizer, tokens)
    known = text_tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    text_tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token in tokens]
    )
    ids = text_tokenizer.convert_tokens_to_ids(tokens)
    size = max(ids, default=-1) + 1
    if size > text.get_input_embeddings().weight.shape[0]:
        with torch.random.fork_rng():  # making a table draws random numbers
            text.resize_token_embeddings(size, mean_resizing=False)
    rows = text_tokenizer.convert_tokens_to_ids(new)
    for table in _tables(text):
        _start(table, rows, known=max(known.values()) + 1, seed=seed)
    return tuple(ids)


def _check(text_tokenizer, tokens: list[str]) -> None:
    """Raises ValueError naming every token that cannot be one; tried on a copy."""
    special = {t.content for t in text_tokenizer.added_tokens_decoder.values() if t.special}
    special |= set(text_tokenizer.all_special_tokens)
    probe = type(text_tokenizer.backend_tokenizer).from_str(
        text_tokenizer.backend_tokenizer.to_str()
    )
    usable = [token for token in tokens if token]
    probe.add_tokens([AddedToken(token, normalized=False, special=False) for token in usable])
    wrong = {}
    for number, token in enumerate(tokens):
        if not token or token != token.strip():
            wrong[token] = "empty, or blank at an end"
        elif token in tokens[:number]:
            wrong[token] = "given twice"
        elif token in special:
            wrong[token] = "a special token already, which decoding leaves out"
        else:
            id = probe.token_to_id(token)
            found = probe.encode(token, add_special_tokens=False).ids
            back = probe.decode([id], skip_special_tokens=True)
            if found != [id] or back.strip() != token:
                wrong[token] = f"expected id {id} there and back, found {found} and {back!r}"
    if wrong:
        lines = "; ".join(f"{token!r}: {reason}" for token, reason in wrong.items())
        raise ValueError(f"these cannot be new tokens: {lines}")


def _tables(text: nn.Module) -> list[Tensor]:
    """The input table, the head's and the head's bias, each once."""
    head = text.get_output_embeddings()
    found = [text.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]
    return list({id(table): table for table in found if table is not None}.values())


@torch.no_grad()
def _start(table: Tensor, rows: list[int], known: int, seed: int) -> None:
    """Gives `rows` of a table (float[Z, D], or float[Z] for a bias) their first values, from the
    first `known` ones."""
    if not rows:
        return
    old = table[:known]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(rows), *table.shape[1:], generator=generator).to(table.device)
    spread = old.std(0).float()
    values = old.mean(0, dtype=torch.float32) + NOISE * spread * noise
    table[rows] = values.to(table.dtype)


class SplitRows(nn.Module):
    """A table of which some rows are trained and the others are not.

    `old` is the whole table float[Z, D], its values at the trained rows unused; `new` holds these,
    float[R, D], and `rows` their ids, int64[R], rising.
    """

    def __init__(self, old: nn.Parameter, new: nn.Parameter, rows: Tensor) -> None:
        super().__init__()
        self.old, self.new = old, new
        self.register_buffer("rows", rows)

    @property
    def weight(self) -> Tensor:
        """The whole table float[Z, D] in the dtype of `old`, made anew."""
        return self.old.index_copy(0, self.rows, self.new.to(self.old.dtype))

    @torch.no_grad()
    def joined(self) -> Tensor:
        """`weight`, without a gradient."""
        return self.weight


class SplitEmbedding(SplitRows):
    """An embedding with a table of split rows. scale: what vectors are multiplied by (Gemma's), in
    their own dtype where it is a tensor; None for nothing."""

    def __init__(self, *table, scale: Tensor | float | None) -> None:
        super().__init__(*table)
        if isinstance(scale, Tensor):
            self.register_buffer("scale", scale, persistent=False)
        else:
            self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64[...]. Returns float[..., D] in the dtype of `old`."""
        slot = torch.searchsorted(self.rows, ids).clamp(max=len(self.rows) - 1)
        is_new = self.rows[slot] == ids
        fresh = F.embedding(slot, self.new).to(self.old.dtype)
        vectors = torch.where(is_new[..., None], fresh, F.embedding(ids, self.old))
        if self.scale is None:
            return vectors
        is_tensor = isinstance(self.scale, Tensor)
        return vectors * (self.scale.to(vectors.dtype) if is_tensor else self.scale)


class SplitHead(SplitRows):
    """An output head with a table of split rows; its bias float[Z], where it has one, is whole."""

    def __init__(self, *table, bias: nn.Parameter | None) -> None:
        super().__init__(*table)
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: float[..., D]. Returns logits float[..., Z]."""
        bias = None if self.bias is None else self.bias[self.rows]
        fresh = F.linear(hidden, self.new.to(self.old.dtype), bias)
        return F.linear(hidden, self.old, self.bias).index_copy_(-1, self.rows, fresh)


def train_rows(text: nn.Module, ids: Sequence[int]) -> None:
    """Splits the language model's tables in place, so that the rows of `ids` alone can be trained:
    as the parameter `new` of the input table and of the head, one where these are tied. All other
    rows lie in `old`.

    A stage trains them by the patterns ("text.*.new", rate), ("text.*.old", FROZEN). Folders that
    are saved hold whole tables. The outputs stay.
    ids: as `grow` gives them, in any order.
    Raises ValueError where rows are apart already, an id is not in the table or given twice, or
    the tables are of an unknown kind.
    """
    embedding, head = text.get_input_embeddings(), text.get_output_embeddings()
    if isinstance(embedding, SplitRows):
        raise ValueError("rows of this language model are trained apart already")
    scale = getattr(embedding, "embed_scale", None)
    plain_forward = type(embedding).forward is nn.Embedding.forward
    if not isinstance(embedding, nn.Embedding) or not (plain_forward or scale is not None):
        raise ValueError(f"expected an nn.Embedding, found {type(embedding).__name__}")
    if type(head) is not nn.Linear:
        raise ValueError(f"expected a head that is an nn.Linear, found {type(head).__name__}")
    size = embedding.num_embeddings
    if not ids or len(set(ids)) < len(ids) or not 0 <= min(ids) <= max(ids) < size:
        raise ValueError(f"expected different ids in 0 to {size - 1}, found {list(ids)[:20]}")
    rows = torch.tensor(sorted(ids), device=embedding.weight.device)
    table = _split(embedding.weight, rows)
    text.set_input_embeddings(SplitEmbedding(*table, scale=scale))
    if head.weight is not embedding.weight:
        table = _split(head.weight, rows)
    text.set_output_embeddings(SplitHead(*table, bias=head.bias))


def _split(table: nn.Parameter, rows: Tensor) -> tuple[nn.Parameter, nn.Parameter, Tensor]:
    """The whole table, frozen, a copy of its `rows`, and these."""
    return table.requires_grad_(False), nn.Parameter(table.detach()[rows].clone()), rows


def character_tokenizer(characters: str):
    """A fast tokenizer of transformers whose tokens are single characters, after `<s>`, `<pad>`,
    `</s>` and `<unk>`: for scripts that no published tokenizer of a decoder knows. Texts are
    composed (NFC) and runs of white space are one space, as line readers have it.

    characters: each once. Raises ValueError naming those that are given twice.

    >>> tokenizer = character_tokenizer("abc ")
    >>> tokenizer("a\\t b", add_special_tokens=False)["input_ids"], tokenizer.decode([4, 7, 5])
    ([4, 7, 5], 'a b')
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    twice = sorted({c for c in characters if characters.count(c) > 1})
    if twice:
        raise ValueError(f"expected each character once, found twice {twice}")
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {token: id for id, token in enumerate([*names, *characters])}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    own.normalizer = normalizers.Sequence([normalizers.NFC(), spaces])
    own.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    own.decoder = decoders.Fuse()
    start, pad, end, unknown = names
    return PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token=start, pad_token=pad, eos_token=end, unk_token=unknown
    )


def ids_of(text_tokenizer) -> tuple[int, int, int]:
    """The ids that a tokenizer has for a text's start, its end, and padding: its first and last
    special tokens, called bos and eos or, by BERT, cls and sep; without a start, the end.

    Raises ValueError where it has none to end with.
    """
    end = text_tokenizer.eos_token_id
    if end is None:
        end = text_tokenizer.sep_token_id
    start = text_tokenizer.bos_token_id
    if start is None:
        start = text_tokenizer.cls_token_id
    if end is None:
        raise ValueError("text_tokenizer: expected an eos or sep token to end with, found none")
    pad = text_tokenizer.pad_token_id
    return end if start is None else start, end, end if pad is None else pad
