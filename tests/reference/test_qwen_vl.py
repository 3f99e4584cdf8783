"""Qwen-VL beside a slow twin written from its equations: pixels, ids, logits, training, answers."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import vlm
from tests import tokenizer_laws
from tests.reference import images_in_text as law
from tests.reference import qwen_vl_twin, tiny_qwen_vl
from tests.reference.images_in_text import close, our_logits, with_marks
from tests.reference.tiny_qwen_vl import (
    ADDED,
    BOXES,
    CONFIG,
    IDS,
    KINDS,
    RANKS,
    ROWS,
    examples,
    our_batch,
    random_state,
    write_folder,
)
from tests.tiny import image as one_image
from vlm import adaptors
from vlm.data.example import BadRow, Example, Turn
from vlm.families.decoder_only.batch import IMAGE, collate_packed
from vlm.image_tokens import ImageTokens
from vlm.losses.token import token_losses
from vlm.position_tables import resize_table, sine_table
from vlm.systems import qwen_vl
from vlm.text.tiktoken_file import read_ranks
from vlm.tokenizers import plain_vit

folder = law.folders(KINDS, write_folder)
STATE = random_state()
SPAN = CONFIG["visual"]["n_queries"]
SYSTEM = "You are a helpful assistant."


def twin_pixels(image):
    """As the authors' torchvision transform: Pillow's bicubic stretch, then CLIP's statistics."""
    side = CONFIG["visual"]["image_size"]
    stretched = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.array(stretched)).permute(2, 0, 1).double() / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).double()[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).double()[:, None, None]
    return (values - mean) / std


def twin_images(images):
    return [qwen_vl_twin.image_tokens(STATE, CONFIG, twin_pixels(image)) for image in images]


def ids_of(text):
    return qwen_vl_twin.text_ids(text, RANKS, IDS)


def twin_prompt(kind, content, answer=None):
    """The ids of a question, -1 where an image token stands; with an answer, up to its end. Roles,
    line breaks and contents become ids apart, as in the authors' `make_context`."""
    start, end, newline = [IDS["<|im_start|>"]], [IDS["<|im_end|>"]], ids_of("\n")
    said, images = [], 0
    pieces = []
    for part in content:
        if part is None:
            images += 1
            before = f"Picture {images}: <img>" if kind == "chatml" else "<img>"
            pieces += [before, None, "</img>\n" if kind == "chatml" else "</img>"]
        else:
            pieces.append(part)
    text = "".join("\0" if piece is None else piece for piece in pieces)
    for number, piece in enumerate(text.split("\0")):
        said += [-1] * SPAN * (number > 0) + ids_of(piece)
    if kind == "raw":
        return said + ([*ids_of(f" {answer}"), IDS["<|endoftext|>"]] if answer else [])
    ids = start + ids_of("system") + newline + ids_of(SYSTEM) + end + newline
    ids += start + ids_of("user") + newline + said + end + newline
    ids += start + ids_of("assistant") + newline
    return ids + (ids_of(answer) + end if answer else [])


def kind_of(model):
    return "chatml" if "im_start" in model.processor.text_tokenizer.chat_template else "raw"


def test_qwen_vl_pixels_match_the_twin(folder):
    spec = vlm.load(folder, "cpu").processor.pixel_spec
    for size_hw in ((75, 40), (40, 90), (9, 7), (60, 20), (70, 70)):
        (pixels,) = spec(one_image(3, size_hw))
        close(pixels.double(), twin_pixels(one_image(3, size_hw)), 1e-6)


def test_qwen_vl_tower_and_adaptor_match_the_twin(folder):
    module = vlm.load(folder, "cpu").module
    pixels = [twin_pixels(one_image(n, (30 + n, 50))).float() for n in range(2)]
    with torch.no_grad():
        seen = module.tokenizer(torch.stack(pixels))
        tokens = module.adaptor(seen).tokens
    assert seen.grid_hw == (5, 5)
    for number, one in enumerate(pixels):
        expected, grid_hw = qwen_vl_twin.tower(STATE, CONFIG, one)
        assert grid_hw == seen.grid_hw
        close(seen.tokens[number].double(), expected, 1e-5)
        close(tokens[number].double(), qwen_vl_twin.image_tokens(STATE, CONFIG, one), 1e-5)


@torch.no_grad()
def test_qwen_vl_tower_and_adaptor_match_the_twin_on_pixels_that_are_not_square(folder):
    module = vlm.load(folder, "cpu").module
    pixels = torch.randn(3, 42, 84)
    seen = module.tokenizer(pixels[None])
    assert seen.grid_hw == (3, 6)
    close(seen.tokens[0].double(), qwen_vl_twin.tower(STATE, CONFIG, pixels)[0], 1e-5)
    expected = qwen_vl_twin.image_tokens(STATE, CONFIG, pixels)
    close(module.adaptor(seen).tokens[0].double(), expected, 1e-5)


@pytest.mark.parametrize("answers", [False, True])
@torch.no_grad()
def test_qwen_vl_ids_and_logits_match_the_twin(folder, answers):
    """Two images, one and none; padded on either side, and rows end to end."""
    model = vlm.load(folder, "cpu")
    kind = kind_of(model)
    batch = our_batch(model, answers)
    logits, right = our_logits(model, batch), our_batch(model, answers, "right")
    from_right = our_logits(model, right)
    for number, (images, content, answer) in enumerate(ROWS):
        ids = twin_prompt(kind, content, answer if answers else None)
        ours = batch.ids[number][batch.valid[number]]
        assert ours.masked_fill(ours == IMAGE, -1).tolist() == ids
        expected = qwen_vl_twin.logits(STATE, CONFIG, ids, twin_images(images))
        assert 1 < expected.abs().max() < 20
        close(logits[number][batch.valid[number]].double(), expected, 1e-5)
        close(from_right[number][right.valid[number]].double(), expected, 1e-5)


@torch.no_grad()
def test_qwen_vl_loss_is_the_twins_in_rows_side_by_side_and_end_to_end(folder):
    """The mean over answers and their end tokens."""
    model = vlm.load(folder, "cpu")
    kind, scored = kind_of(model), []
    for images, content, answer in ROWS:
        ids = twin_prompt(kind, content, answer)
        count = len(ids) - len(twin_prompt(kind, content))
        scores = qwen_vl_twin.logits(STATE, CONFIG, ids, twin_images(images))
        logs = scores - scores.exp().sum(-1, keepdim=True).log()
        scored += [-logs[at - 1, ids[at]] for at in range(len(ids) - count, len(ids))]
    expected = torch.stack(scored).mean()
    batch = our_batch(model, answers=True, padding="right")
    packed = collate_packed([model.processor.encode(example) for example in examples()])
    for one in (batch, packed):
        close(token_losses(model.module(one), one.targets).mean().double(), expected, 1e-5)


def test_qwen_vl_greedy_ids_match_the_twin_and_batches(folder):
    model = vlm.load(folder, "cpu")
    kind = kind_of(model)
    stops = {"chatml": ["<|im_end|>", "<|endoftext|>", "<|im_start|>"], "raw": ["<|endoftext|>"]}
    assert model.stop_ids == tuple(IDS[token] for token in stops[kind])
    rows = [model.processor.encode_prompt(example) for example in examples(answers=False)]
    together = model.write_after(rows, max_new_tokens=5)
    for row, written, (images, content, _) in zip(rows, together, ROWS, strict=True):
        ids, tokens, expected = twin_prompt(kind, content), twin_images(images), []
        while len(expected) < 5 and not {*expected} & {*model.stop_ids}:
            scores = qwen_vl_twin.logits(STATE, CONFIG, ids + expected, tokens)[-1]
            expected.append(int(scores.argmax()))
        assert list(written.ids) == expected
        (alone,) = model.write_after([row], max_new_tokens=5)
        assert alone.ids == written.ids
    assert len({written.ids for written in together}) > 1


TEXTS = (
    "what is it? a cat\n\n  and  IT'S 1234 aaaaaaa \n x",
    "\u4f60\u597d, caf\u00e9 cafe\u0301 \U0001f600",
    "<ref>a cat</ref><box>(12,7),(999,0)</box><|im_end|><imgpad><|extra_204|>",
    " it ass\r\n\r\nuser  ",
)


@pytest.mark.parametrize("text", TEXTS)
def test_qwen_vl_text_ids_match_tiktoken_by_hand(folder, text):
    tokenizer = vlm.load(folder, "cpu").processor.text_tokenizer
    ids = tokenizer(text)["input_ids"]
    assert ids == ids_of(text)
    decoded = tokenizer.decode(ids)
    assert decoded.encode() == text.replace("e\u0301", "\u00e9").encode()


def test_qwen_vl_special_tokens_have_the_published_ids(folder):
    """Counted on from the file: 151,643 published tokens, then these."""
    tokenizer = vlm.load(folder, "cpu").processor.text_tokenizer
    assert tokenizer.convert_tokens_to_ids(ADDED) == [len(RANKS) + n for n in range(len(ADDED))]
    published = 151643 - len(RANKS)
    said = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645,
            "<|extra_0|>": 151646, "<ref>": 151851, "<box>": 151853, "<img>": 151857,
            "</img>": 151858, "<imgpad>": 151859}  # fmt: skip
    assert {token: IDS[token] + published for token in said} == said
    assert tokenizer.decode([IDS["<img>"], *map(IDS.get, BOXES)], True) == "".join(BOXES)


def test_qwen_vl_prompts_match_snapshot(folder):
    model = vlm.load(folder, "cpu")
    processor = model.processor
    turns = (Turn("user", (None, None, "a?")), Turn("assistant", ("b",)), Turn("user", (None,)))
    images = tuple(one_image(n, (40, 60)) for n in range(3))
    row = processor.encode_prompt(Example("r", turns, images))
    text = processor.text_tokenizer.decode(with_marks(row.ids, model, "<imgpad>"))
    text = text.replace("<imgpad>" * SPAN, "[]")
    if "im_start" in processor.text_tokenizer.chat_template:
        assert text == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\nPicture 1: <img>[]</img>\nPicture 2: <img>[]</img>\na?<|im_end|>\n"
            "<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nPicture 3: <img>[]</img>\n<|im_end|>\n<|im_start|>assistant\n"
        )
    else:
        assert text == "<img>[]</img><img>[]</img>a? b<|endoftext|><img>[]</img>"


def test_qwen_vl_literal_prompts_and_questions_are_read_alike(folder):
    model = vlm.load(folder, "cpu")
    if kind_of(model) == "chatml":
        prompt = model.processor.chat_template.render(
            (Turn("user", (None, "what?")),), "r", open_answer=True
        ).replace("\ue5c0", "<imgpad>")
    else:
        prompt = "<img><imgpad></img>what? Answer:"
    (written,) = model.generate([[one_image(1)]], [prompt], max_new_tokens=4)
    assert model.answer([one_image(1)], ["what?"], max_new_tokens=4) == [written.text]


def test_qwen_vl_rows_past_the_trained_length_are_refused(folder):
    """Where log-n attention and NTK would begin."""
    model = vlm.load(folder, "cpu")
    limit = CONFIG["seq_length"]
    (given,) = model.score([[]], ["z" * (limit - 4)], ["z z"])
    assert math.isfinite(given)
    with pytest.raises(BadRow, match=f"{limit + 1} tokens, the context takes {limit}"):
        model.score([[]], ["z" * (limit - 3)], ["z z"])


def test_qwen_vl_training_step_changes_every_part(folder):
    model = law.check_every_part_learns(folder, tiny_qwen_vl)
    table = model.module.adaptor.positions
    assert torch.equal(table, STATE["transformer.visual.attn_pool.pos_embed"])


@pytest.mark.parametrize("pack", [None, 400])
def test_qwen_vl_trains_by_the_same_loop(folder, tmp_path, pack):
    law.check_trains_by_the_loop(folder, tiny_qwen_vl, tmp_path, pack)


def test_qwen_vl_chat_says_what_an_answer_says(folder):
    law.check_chat_says_what_an_answer_says(folder, tiny_qwen_vl)


def test_qwen_vl_is_listed_and_used_by_commands(folder, tmp_path, capsys):
    law.check_is_listed_and_used_by_commands(folder, tmp_path, capsys, "qwen")


def test_qwen_vl_published_size_has_the_published_number_of_parameters():
    """In billions, arXiv 2308.12966, table 1: 1.9, 0.08 and 7.7, each rounded; 9.6 in all, cut.
    The square matrix and the norm before it are the ViT's there."""
    with torch.device("meta"):
        module = qwen_vl.build()
    assert not any(p.device.type != "meta" for p in module.parameters())
    sizes = {
        name: sum(p.numel() for p in part.parameters()) for name, part in module.parts().items()
    }
    closing = module.adaptor.projection.numel() + sum(
        p.numel() for p in module.adaptor.norm.parameters()
    )
    vision, reading = sizes["tokenizer"] + closing, sizes["adaptor"] - closing
    assert abs(vision / 1e9 - 1.9) <= 0.05
    assert abs(reading / 1e9 - 0.08) <= 0.005
    assert abs(sizes["text"] / 1e9 - 7.7) <= 0.05
    assert 9.6 <= sum(sizes.values()) / 1e9 < 9.7
    assert module.adaptor.config.queries_hw == (16, 16)
    assert module.tokenizer.shapes_for((300, 500))[0].grid_hw == (32, 32)


def count(part):
    return sum(parameter.numel() for parameter in part.parameters())


def test_plain_vit_keeps_the_laws_on_pixels_that_are_not_square():
    config = plain_vit.PlainViTConfig(
        width=16, depth=2, heads=2, mlp_width=24, patch_px=8, table_hw=(3, 5), norm_eps=1e-6,
        pixel_spec=tokenizer_laws.spec(32, 48),
    )  # fmt: skip
    tokenizer_laws.check_laws(plain_vit.build(config))
    with pytest.raises(ValueError, match=r"multiples of patch_px 8, found \(30, 48\)"):
        plain_vit.PlainViTConfig(
            width=16, depth=2, heads=2, mlp_width=24, patch_px=8, table_hw=(3, 5), norm_eps=1e-6,
            pixel_spec=tokenizer_laws.spec(30, 48),
        )  # fmt: skip


def test_sine_table_is_the_one_written_out():
    close(sine_table((3, 3), 16), tiny_qwen_vl.sines(3, 16), 1e-6)
    with pytest.raises(ValueError, match="multiple of 4, found 6"):
        sine_table((2, 2), 6)


def test_resized_table_keeps_rows_and_columns_apart():
    """A table that grows along its rows alone grows along rows alone on another grid."""
    table = torch.arange(4.0).repeat_interleave(6)[:, None]
    resized = resize_table(table, (4, 6), (8, 3)).view(8, 3)
    close(resized, resized[:, :1].expand(8, 3), 1e-5)
    assert (resized[1:] > resized[:-1]).all()
    assert resize_table(table, (4, 6), (4, 6)) is table


def test_grid_resampler_reads_its_own_place():
    """Where queries and keys say little but their place, a query reads what lies there."""
    adaptor = adaptors.build(
        dict(kind="grid_resampler", in_width=64, out_width=64, queries_hw=(2, 3), heads=1)
    )
    with torch.no_grad():
        adaptor.queries.zero_()
        for layer in (adaptor.to_query, adaptor.to_key, adaptor.to_value, adaptor.out):
            layer.weight.copy_(torch.eye(64))
            layer.bias.zero_()
        adaptor.to_query.weight.mul_(32)
        adaptor.projection.copy_(torch.eye(64))
        adaptor.norm_images.weight.fill_(0.01)
        tokens = torch.randn(1, 6, 64)
        adaptor.to_key.weight.mul_(2)
        images = ImageTokens(tokens=tokens, grid_hw=(2, 3))
        found = adaptor(images).tokens[0]
        lying = torch.nn.functional.layer_norm(tokens[0], (64,))
    assert torch.equal((found @ lying.T).argmax(1), torch.arange(6))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"AA== 0\nnothing here\n", "line 2: expected a token in base64 and its rank"),
        (b"AA== 0\n!!!! 1\n", "line 2: expected a token in base64 and its rank"),
        (b"AA== 0\nAQ== 2\n", r"expected ranks from 0 to 1, each once, found 2 of them up to 2"),
        (b"AA== 0\nAQ== 1\n", r"a token for each byte, found none for \[2, 3"),
        (b"", "a token for each byte"),
    ],
)
def test_file_of_tiktoken_that_is_none_is_refused(tmp_path, content, message):
    path = tmp_path / "a.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.tiktoken: .*{message}|a.tiktoken: {message}"):
        read_ranks(path)
