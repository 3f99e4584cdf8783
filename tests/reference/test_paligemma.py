"""PaliGemma 1 and 2 beside transformers' class: tiny random folders, in and out."""

import json
import math
import shutil
from itertools import groupby

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

import vlm
from tests.tiny import picture
from vlm import cli
from vlm.data.collate import collate
from vlm.data.example import BadRow, Box, Example, Turn
from vlm.data.sources.transfer import detection
from vlm.inference import engine
from vlm.inference.ground import NOT_FOURS, find
from vlm.losses.token import token_losses
from vlm.placement import IMAGE
from vlm.systems import paligemma
from vlm.systems.paligemma import PROMPTS, SEG_TOKENS
from vlm.systems.reference import first_names, published_name
from vlm.training.stages import assign_rates
from vlm.weights import WeightsError, same_bits

SIDE_PX, PLACES = 32, 16
SIGLIP = dict(model_type="siglip_vision_model", hidden_size=16, intermediate_size=24,
              num_hidden_layers=2, num_attention_heads=2, image_size=SIDE_PX, patch_size=8,
              hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-3,
              vision_use_head=False)  # fmt: skip
TEXT = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=512)  # fmt: skip
TEXTS = {
    "gemma": TEXT | {"model_type": "gemma"},
    "gemma2": TEXT | {"model_type": "gemma2", "sliding_window": 12, "query_pre_attn_scalar": 11},
}
"""The sliding window is shorter than a prompt."""
MERGES = [("c", "a"), ("ca", "t"), ("▁", "a"), ("\n", "\n"), ("e", "n"), ("\n", "c"), ("d", "o")]
"""One of them would join a prompt's line break with an answer's first letter."""


def text_tokenizer():
    """Gemma's own kind, of single characters and a few merges."""
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab += ["▁", "\n", *map(chr, range(33, 127)), *("".join(pair) for pair in MERGES)]
    return transformers.GemmaTokenizer(
        vocab={token: id for id, token in enumerate(vocab)},
        merges=MERGES,
        extra_special_tokens={"image_token": "<image>"},
    )


def write_folder(folder, kind, seed=0, **more):
    """A tiny random folder, written by transformers' own classes; returns its model in fp32."""
    image_processor = transformers.SiglipImageProcessor(
        size={"height": SIDE_PX, "width": SIDE_PX}, resample=3, image_seq_length=PLACES,
        image_mean=[0.5] * 3, image_std=[0.5] * 3, **more.pop("image_processor", {}),
    )  # fmt: skip
    processor = transformers.PaliGemmaProcessor(image_processor, text_tokenizer())
    config = transformers.PaliGemmaConfig(
        vision_config=SIGLIP | more.pop("vision", {}),
        text_config=TEXTS[kind] | {"vocab_size": len(processor.tokenizer) + more.pop("spare", 7)},
        image_token_index=processor.image_token_id,
        projection_dim=TEXT["hidden_size"],
    )
    torch.manual_seed(seed)
    model = transformers.PaliGemmaForConditionalGeneration(config).float().eval()
    with torch.no_grad():  # biases and norms start at 0 and 1: move them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=TEXTS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    write_folder(path, request.param)
    return path


def reopened(folder):
    """transformers' model and processor of a folder, strictly opened."""
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True
    )
    found = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(found.values()), found
    return model.eval(), AutoProcessor.from_pretrained(folder)


ROWS = [
    (picture(1, (20, 45)), "caption en", "cat on a dog"),
    (picture(2, (50, 30)), "answer en where is the cat? it is\nlate", "<loc0001><seg007> do"),
    (picture(3, (64, 9)), "ocr", "c"),
]
"""Pictures that are not square, prompts and answers of unequal length."""


def examples(answers=True):
    return [
        Example(
            f"r{i}",
            (Turn("user", (None, prompt)), *([Turn("assistant", (answer,))] * answers)),
            (image,),
        )
        for i, (image, prompt, answer) in enumerate(ROWS)
    ]


def their_inputs(processor, rows=ROWS, answers=True):
    images, prompts, suffixes = zip(*rows)
    return processor(
        images=list(images),
        text=[f"<image>{prompt}" for prompt in prompts],
        suffix=list(suffixes) if answers else None,
        return_tensors="pt",
        padding="longest",
    )


def with_marks(ids, model):
    """Our ids with the reference's image id at image places."""
    mark = model.processor.text_tokenizer.convert_tokens_to_ids("<image>")
    return torch.where(ids == IMAGE, mark, ids)


def our_batch(model, answers=True, padding="left"):
    encode = model.processor.encode if answers else model.processor.encode_prompt
    rows = [encode(example) for example in examples(answers)]
    return collate(rows, model.processor.pad_id, padding)


def our_logits(model, batch):
    """Logits at every place, float[B, T, Z]."""
    module = model.module
    vectors = module.embed(batch.ids, module.encode(batch.groups), batch.names)
    hidden = module.read(vectors, batch)
    return module.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("answers", [False, True])
@torch.no_grad()
def test_paligemma_ids_pixels_masks_and_logits_match_reference(folder, answers):
    """Through the processors of both sides, in a batch of unequal length. Traps T2, T3, T5, T6,
    T16, T17 and T18."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    batch, inputs = our_batch(model, answers), their_inputs(processor, answers=answers)
    assert torch.equal(batch.valid, inputs["attention_mask"].bool())
    assert torch.equal(with_marks(batch.ids, model)[batch.valid], inputs["input_ids"][batch.valid])
    (group,) = batch.groups
    close(group.pixels, inputs["pixel_values"], atol=1e-5)
    assert torch.equal(batch.prefix, (inputs["token_type_ids"] == 0) & batch.valid)
    labels = inputs.pop("labels")
    if answers:
        assert torch.equal(batch.scored, labels != -100)
        assert torch.equal(batch.targets, labels[batch.scored])
    expected = peer(**inputs).logits
    close(our_logits(model, batch)[batch.valid], expected[batch.valid])
    right = our_batch(model, answers, "right")
    close(our_logits(model, right)[right.valid], expected[batch.valid])


@torch.no_grad()
def test_paligemma_rows_alone_match_the_batch(folder):
    """Trap T3, beside the reference one by one."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    logits = our_logits(model, batch := our_batch(model))
    for number, row in enumerate(ROWS):
        inputs = their_inputs(processor, [row])
        inputs.pop("labels")
        close(logits[number][batch.valid[number]], peer(**inputs).logits[0])


def test_paligemma_loss_and_gradients_match_reference(folder):
    """The loss is the mean over answers and their ends. Trap T5."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    batch, inputs = our_batch(model, padding="right"), their_inputs(processor)
    expected = peer(**inputs).loss
    loss = token_losses(model.module(batch), batch.targets).mean()
    close(loss, expected, atol=1e-5)
    loss.backward()
    expected.backward()
    theirs = {name: p.grad for name, p in peer.named_parameters()}
    ours = {name: p.grad for name, p in model.module.named_parameters()}
    assert all(grad is not None for grad in ours.values())
    renamed = first_names(theirs, paligemma.KEY_MAP, paligemma.UNUSED, "peer")
    assert len(renamed) == len(ours)
    for name, grad in ours.items():
        close(grad, renamed[published_name(name, paligemma.KEY_MAP)], atol=2e-4)


@torch.no_grad()
def test_paligemma_greedy_ids_match_reference_and_batches(folder):
    """Generated ids are answer. Traps T2 and T13."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    images, prompts, _ = zip(*ROWS)
    prompts = [f"<image>{prompt}" for prompt in prompts]
    together = model.generate(images, prompts, max_new_tokens=10)
    inputs = their_inputs(processor, answers=False)
    inputs.pop("labels")
    theirs = peer.generate(**inputs, max_new_tokens=10, do_sample=False)
    length = inputs["input_ids"].shape[1]
    for number, written in enumerate(together):
        assert list(written.ids) == theirs[number, length:][: len(written.ids)].tolist()
        (alone,) = model.generate([images[number]], [prompts[number]], max_new_tokens=10)
        assert alone.ids == written.ids
        assert min(alone.logprobs) < 0
    assert len({written.ids for written in together}) > 1


@torch.no_grad()
def test_paligemma_answers_continue_as_when_read_at_once(folder):
    """The slow twin of generation: every id by a whole pass over prompt and answer. Trap T2."""
    model = vlm.load(folder, "cpu")
    rows = [model.processor.encode_prompt(example) for example in examples(answers=False)]
    batch = collate(rows, model.processor.pad_id, "left")
    written = engine.generate(model.module, batch, (), 0, max_new_tokens=6)
    for row, (ids, _) in zip(rows, written, strict=True):
        for count, id in enumerate(ids):
            before = torch.tensor(ids[:count], dtype=torch.long)
            answer = torch.ones(count, dtype=torch.bool)
            longer = type(row)(
                name=row.name,
                ids=torch.cat([row.ids, before]),
                scored=torch.cat([row.scored, answer]),
                views=row.views,
                places=row.places,
            )
            logits = our_logits(model, collate([longer], 0))
            assert int(logits[0, -1].argmax()) == id


@torch.no_grad()
def test_paligemma_several_pictures_and_text_alone_match_reference(folder):
    """What begins texts stands behind the last picture."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    images = [picture(5, (30, 40)), picture(6, (9, 33))]
    prompt = "a <image>b<image> what differs?"
    inputs = processor(images=[images], text=[prompt], return_tensors="pt")
    inputs.pop("labels")
    row = model.processor.encode_literal(images, prompt)
    turns = (Turn("user", ("a ", None, "b", None, " what differs?")),)
    asked = model.processor.encode_prompt(Example("row", turns, tuple(images)))
    for found in (row, asked):
        assert torch.equal(with_marks(found.ids, model)[None], inputs["input_ids"])
    close(our_logits(model, collate([row], 0)), peer(**inputs).logits)
    alone = model.processor.encode_literal([], "cat")
    ids = processor.tokenizer("<bos>cat\n", return_tensors="pt")["input_ids"]
    assert torch.equal(alone.ids[None], ids)
    theirs = peer(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
    close(our_logits(model, collate([alone], 0)), theirs)


def test_paligemma_prompt_matches_snapshot(folder):
    processor = vlm.load(folder, "cpu").processor
    row = processor.encode(examples()[0])
    decode = processor.text_tokenizer.decode
    assert row.ids[:PLACES].tolist() == [IMAGE] * PLACES
    assert decode(row.ids[PLACES:]) == "<bos>caption en\ncat on a dog<eos>"
    assert decode(row.ids[row.scored]) == "cat on a dog<eos>"
    again = (Turn("assistant", ("a",)), Turn("user", ("b",)))
    with pytest.raises(BadRow, match="expected one user's prompt and at most its answer"):
        processor.encode_prompt(Example("row", (*examples(False)[0].turns, *again), (picture(),)))
    with pytest.raises(BadRow, match="0 <image> marks, there are 1 images"):
        processor.encode_literal([picture()], "caption en")


def test_paligemma_score_is_the_references(folder):
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    image, prompt, answer = ROWS[0]
    inputs = their_inputs(processor, ROWS[:1])
    with torch.no_grad():
        loss = peer(**inputs).loss
    count = int((inputs["labels"] != -100).sum())
    close(model.score([image], [f"<image>{prompt}"], [answer])[0], -loss * count)


@torch.no_grad()
def test_paligemma_scales_text_and_not_images(folder):
    """Trap T17: text vectors are the table's rows times √width, image tokens are the adaptor's."""
    module = vlm.load(folder, "cpu").module
    batch = our_batch(vlm.load(folder, "cpu"))
    tokens, owner = module.encode(batch.groups)
    vectors = module.embed(batch.ids, (tokens, owner), batch.names)
    is_image = batch.ids == IMAGE
    assert torch.equal(vectors[is_image], tokens)
    table = module.text.get_input_embeddings().weight
    close(vectors[~is_image], table[batch.ids[~is_image]] * math.sqrt(TEXT["hidden_size"]), 1e-5)


def test_paligemma_locations_and_segments_are_one_id_each(folder):
    """Trap T7: there and back, within text too."""
    model = vlm.load(folder, "cpu")
    tokenizer = model.processor.text_tokenizer
    tokens = [*model.processor.loc.tokens, *SEG_TOKENS]
    assert tokens[0] == "<loc0000>"
    assert tokens[1023:1025] == ["<loc1023>", "<seg000>"]
    assert tokens[-1] == "<seg127>"
    ids = tokenizer("".join(tokens), add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.convert_tokens_to_ids(tokens)
    assert len(set(ids)) == 1024 + 128
    written = "<loc0001><loc0203> a cat ; <seg127>"
    back = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert model.processor.decode(back) == written


def test_paligemma_boxes_put_y_first(folder):
    """What is written of a box, and where an answer's boxes lie, in a picture that is not square.
    Trap T18."""
    model = vlm.load(folder, "cpu")
    image = picture(7, (100, 200))
    boxes = (Box(0, (20, 10, 160, 90), "cat"), Box(0, (100, 50, 200, 100), "dog"))
    row = Example("row", (Turn("user", (None,)),), (image,), boxes)
    encoded = model.processor.encode(detection(row, ["dog", "cat"], PROMPTS["detect"]))
    text = model.processor.text_tokenizer.decode(encoded.ids[PLACES:])
    assert text == (
        "<bos>detect dog ; cat\n<loc0512><loc0512><loc1023><loc1023> dog ; "
        "<loc0102><loc0102><loc0921><loc0819> cat<eos>"
    )


def answering(monkeypatch, model, text):
    """Makes a model write `text`, each id with probability a half; gives what it is asked."""
    asked = []

    def write(module, vectors, valid, stop_ids, pad_id, **options):
        ids = model.processor.text_tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, model.processor.end_id]
        return [(ids, [math.log(0.5)] * len(ids)) for _ in vectors]

    monkeypatch.setattr(engine, "write", write)
    kept = model.processor.encode_prompt
    monkeypatch.setattr(
        model.processor, "encode_prompt", lambda e: asked.append(e.turns[0].text) or kept(e)
    )
    return asked


def test_paligemma_grounds_phrases_in_its_own_words(folder, monkeypatch):
    model = vlm.load(folder, "cpu")
    asked = answering(
        monkeypatch, model,
        "<loc0102><loc0204><loc0512><loc0768> cat ; <loc0000><loc0000><loc1023><loc1023> cat",
    )  # fmt: skip
    (boxes,) = model.ground([picture(7, (100, 200))], ["cat"])
    assert asked == ["detect cat"]
    assert [box.label for box in boxes] == ["cat", "cat"]
    assert boxes[0].xyxy_px == pytest.approx((39.94, 10.01, 150.1, 50.05), abs=0.01)
    assert boxes[1].xyxy_px == pytest.approx((0.1, 0.05, 199.9, 99.95), abs=0.01)
    assert boxes[0].score == pytest.approx(0.5)
    answering(monkeypatch, model, "<loc0102><loc0204><loc0512> cat")
    ((answer,),) = find(model, [picture(7)], ["cat"])
    assert answer.fault == NOT_FOURS


def test_paligemma_writes_whole_boxes_where_nothing_else_is_allowed(folder):
    """Locations in fours, then labels, further boxes or the end; the last may be cut by length."""
    model = vlm.load(folder, "cpu")
    images = [picture(7), picture(8, (30, 50))]
    tokenizer = model.processor.text_tokenizer
    locations = set(tokenizer.convert_tokens_to_ids(list(model.processor.loc.tokens)))
    options = {"constrained": True, "max_new_tokens": 13}
    for answers in find(model, images, [["cat", "dog"], "a"], **options):
        for answer in answers:
            ids = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
            runs = [(kind, len(list(run))) for kind, run in groupby(id in locations for id in ids)]
            assert runs[0][0]
            assert runs[0][1] >= 4
            assert all(length % 4 == 0 for is_box, length in runs[:-1] if is_box)


@pytest.mark.parametrize("through_native", [False, True])
@torch.no_grad()
def test_paligemma_reference_layout_opens_in_transformers(folder, tmp_path, through_native):
    """Every tensor returns under its bits, every small file as it was, straight or after a save in
    our own layout."""
    model = vlm.load(folder, "cpu")
    if through_native:
        model.save(tmp_path / "native")
        model = vlm.load(tmp_path / "native", "cpu")
    model.save(tmp_path / "out", layout="reference")
    peer, processor = reopened(folder)
    again, its_processor = reopened(tmp_path / "out")
    assert same_bits(again.state_dict(), peer.state_dict())
    kept = {path.name for path in folder.iterdir()} - {"config.json", "model.safetensors"}
    assert {"processor_config.json", "tokenizer.json", "generation_config.json"} <= kept
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    inputs = their_inputs(processor)
    for key, value in their_inputs(its_processor).items():
        assert torch.equal(value, inputs[key])
    assert torch.equal(again(**inputs).logits, peer(**inputs).logits)


@torch.no_grad()
def test_paligemma_native_layout_returns_the_same_model(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    model.save(tmp_path)
    again = vlm.load(tmp_path, "cpu")
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    for key in ("stop_ids", "caption_prompt", "answer_prompt", "ground_prompt", "ocr_prompt"):
        assert getattr(again.parts, key) == getattr(model.parts, key)
    assert again.processor.loc == model.processor.loc
    ours, its = (our_batch(m) for m in (model, again))
    assert torch.equal(ours.ids, its.ids)
    assert torch.equal(our_logits(model, ours), our_logits(again, its))
    asked = [[picture()], ["<image>caption en"]]
    assert again.generate(*asked)[0].ids == model.generate(*asked)[0].ids


def published_style(folder, out):
    """The folder as the authors published it, by transformers 4: their names of weights, and the
    picture's processor apart."""
    shutil.copytree(folder, out)
    state = {
        published_name(key, paligemma.KEY_MAP): tensor
        for key, tensor in vlm.load(folder, "cpu", "stored").module.state_dict().items()
        if key != "text.lm_head.weight"
    }
    assert {key.split(".")[0] for key in state} == {
        "vision_tower", "multi_modal_projector", "language_model",
    }  # fmt: skip
    save_file(state, out / "model.safetensors", {"format": "pt"})
    settings = json.loads((out / "processor_config.json").read_text())
    (out / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    (out / "processor_config.json").unlink()
    values = json.loads((out / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    for part in ("vision_config", "text_config"):
        for key in ("dtype", "use_bidirectional_attention"):
            values[part].pop(key, None)
    (out / "config.json").write_text(json.dumps(values))
    return out


@torch.no_grad()
def test_paligemma_opens_published_folders_and_those_of_transformers_5(folder, tmp_path):
    old = published_style(folder, tmp_path / "old")
    model, new = vlm.load(old, "cpu"), vlm.load(folder, "cpu")
    assert same_bits(model.module.state_dict(), new.module.state_dict())
    peer, processor = reopened(old)
    inputs = their_inputs(processor)
    inputs.pop("labels")
    batch = our_batch(model)
    close(our_logits(model, batch)[batch.valid], peer(**inputs).logits[batch.valid])
    model.save(tmp_path / "out", layout="reference")
    state, out = (load_file(path / "model.safetensors") for path in (old, tmp_path / "out"))
    assert same_bits(state, out)


def test_paligemma_reference_layout_says_the_dtype_it_holds(folder, tmp_path):
    vlm.load(folder, "cpu", "bfloat16").save(tmp_path, layout="reference")
    peer, _ = reopened(tmp_path)
    assert {p.dtype for p in peer.parameters()} == {torch.bfloat16}


def test_paligemma_names_all_wrong_keys_at_once(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    renamed = first_names(state, paligemma.KEY_MAP, paligemma.UNUSED, "")
    del renamed["multi_modal_projector.linear.bias"]
    renamed["extra.weight"] = torch.zeros(1)
    save_file(renamed, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError) as error:
        vlm.load(broken, "cpu")
    assert "missing (1): ['multi_modal_projector.linear.bias']" in str(error.value)
    assert "unused (1): ['extra.weight']" in str(error.value)


def test_paligemma_raises_when_the_processor_counts_other_places(folder, tmp_path):
    """Trap T16."""
    out = shutil.copytree(folder, tmp_path / "miscounted")
    path = out / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"]["image_seq_length"] = 15
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="writes 15 places for an image, the model gives 16"):
        vlm.load(out, "cpu")


def test_paligemma_raises_when_tokens_lie_beyond_the_table(tmp_path):
    """transformers' processor adds <loc> and <seg> tokens that a folder lacks, table or no."""
    write_folder(tmp_path, "gemma", spare=-20)
    with pytest.raises(
        ValueError,
        match=r"the rows of the embedding table, found 20 tokens beyond, such as <seg127> \(",
    ):
        vlm.load(tmp_path, "cpu")


PUBLISHED = {
    "paligemma-3b-224": ("gemma", 2.92),
    "paligemma-3b-896": ("gemma", 2.93),
    "paligemma2-3b-224": ("gemma2", 3.03),
    "paligemma2-10b-448": ("gemma2", 9.66),
    "paligemma2-28b-224": ("gemma2", 27.65),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_paligemma_full_sizes_hold_the_published_parameters(size):
    """Trap T16 too."""
    kind, billions = PUBLISHED[size]
    sizes = paligemma.SIZES[size]
    config = transformers.PaliGemmaConfig(
        text_config=sizes.text,
        vision_config=sizes.vision,
        projection_dim=sizes.text["hidden_size"],
    )
    with torch.device("meta"):
        module = paligemma.build(size)
        peer = transformers.PaliGemmaForConditionalGeneration(config)
    assert module.text.config.model_type == kind
    count = sum(p.numel() for p in module.parameters())
    assert count == sum(p.numel() for p in peer.parameters())
    assert round(count / 1e9, 2) == billions
    side = sizes.vision["image_size"] // 14
    assert module.tokenizer.tokens_for((300, 700)) == side**2
    expected = {published_name(key, paligemma.KEY_MAP) for key in module.state_dict()}
    theirs = first_names(peer.state_dict(), paligemma.KEY_MAP, paligemma.UNUSED, "peer")
    assert set(theirs) == expected
    assign_rates(module, (("tokenizer.*", 1e-5), ("adaptor.*", 1e-5), ("text.*", 1e-5)))


def test_paligemma_sizes_are_told_by_name():
    assert len(paligemma.SIZES) == 12
    with pytest.raises(ValueError, match="'2b' is not one of paligemma-3b-224, "):
        paligemma.build("2b")


def test_paligemma_is_listed_and_used_by_commands(folder, tmp_path, capsys):
    cli.main(["systems"])
    assert "paligemma" in capsys.readouterr().out
    path = tmp_path / "a.png"
    picture(1, (20, 40)).save(path)
    cli.main(["caption", str(path), "--model", str(folder), "--max-new-tokens", "3"])
    cli.main(["ground", str(path), "cat", "--model", str(folder), "--max-new-tokens", "3"])
