"""DeepSeek-VL beside transformers' classes, both sizes: ids, pixels, logits, answers."""

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoProcessor

import vlm
from tests.reference import images_in_text as law
from tests.reference.images_in_text import close, our_logits, reopened
from tests.reference.tiny_deepseek_vl import (
    BOS,
    CONVERSATIONS,
    EOS,
    KINDS,
    MARK,
    SAM,
    SIDE,
    conversation,
    their_inputs,
    with_marks,
    write_folder,
)
from tests.tiny import image as one_image
from tests.tokenizer_laws import check_laws, spec
from vlm import cli
from vlm.data.example import Example, Turn
from vlm.families.decoder_only.batch import IMAGE, collate
from vlm.image_tokens import ImageTokens
from vlm.systems import deepseek_vl
from vlm.tokenizers import paired, sam_hybrid
from vlm.training.stages import FROZEN, assign_rates

folder = law.folders(KINDS, write_folder)


@pytest.mark.parametrize("name", CONVERSATIONS)
@torch.no_grad()
def test_deepseek_vl_ids_pixels_and_logits_match_reference(folder, name):
    """Through the processors of both sides."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    example, messages = conversation(CONVERSATIONS[name])
    row = model.processor.encode_prompt(example)
    inputs = their_inputs(processor, messages, add_generation_prompt=True)
    assert torch.equal(with_marks(row.ids, model)[None], inputs["input_ids"])
    batch = collate([row], model.processor.pad_id, "right")
    if example.images:
        pixels = [view for view, _ in row.views]
        names = ["high_res_pixel_values", "pixel_values"]
        if isinstance(pixels[0], torch.Tensor):
            pixels, names = [(view,) for view in pixels], names[1:]
        for views, key in zip(zip(*pixels), names, strict=True):
            close(torch.stack(views), inputs[key], atol=1e-5)
    close(our_logits(model, batch), peer(**inputs).logits)


@torch.no_grad()
def test_deepseek_vl_rows_of_unequal_length_match_reference_one_by_one(folder):
    """A row without images among rows with one and two, padded on either side."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    pairs = [conversation(turns) for turns in CONVERSATIONS.values()]
    rows = [model.processor.encode_prompt(ours) for ours, _ in pairs]
    for padding in ("right", "left"):
        batch = collate(rows, model.processor.pad_id, padding)
        logits = our_logits(model, batch)
        for number, (_, messages) in enumerate(pairs):
            inputs = their_inputs(processor, messages, add_generation_prompt=True)
            close(logits[number][batch.valid[number]], peer(**inputs).logits[0])


@torch.no_grad()
def test_deepseek_vl_greedy_ids_match_reference_and_batches(folder):
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    images = [[], [one_image(1, (40, 22))], [one_image(2, (17, 60)), one_image(3)]]
    prompts = ["Assistant:", f"User: {MARK}what?\n\nAssistant:", f"{MARK} and {MARK} are"]
    together = model.generate(images, prompts, max_new_tokens=8)
    for image_list, prompt, written in zip(images, prompts, together):
        inputs = processor(images=image_list or None, text=prompt, return_tensors="pt")
        expected = peer.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = expected[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(written.ids) == new
        (alone,) = model.generate([image_list], [prompt], max_new_tokens=8)
        assert alone.ids == written.ids


@torch.no_grad()
def test_deepseek_vl_score_matches_reference(folder):
    """Literal prompts bear the published mark; answers end with EOS."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    image, prompt, answer = one_image(4, (50, 30)), f"User: {MARK}what?\n\nAssistant:", " a cat"
    inputs = processor(images=[image], text=prompt + answer + EOS, return_tensors="pt")
    logprobs = peer(**inputs).logits[0, :-1].log_softmax(-1)
    length = len(processor.tokenizer(prompt)["input_ids"]) + SIDE**2 - 1
    targets = inputs["input_ids"][0, 1:]
    expected = logprobs.gather(1, targets[:, None])[length - 1 :].sum()
    close(model.score([[image]], [prompt], [answer])[0], expected)
    with pytest.raises(ValueError, match=f"0 {MARK} marks, there are 1 images"):
        model.score([[image]], ["<image> what?"], ["a cat"])


def test_deepseek_vl_training_rows_score_every_answer_and_its_end(folder):
    """The ids are the published conversation's and one EOS more."""
    model, processor = vlm.load(folder, "cpu"), AutoProcessor.from_pretrained(folder)
    example, messages = conversation(CONVERSATIONS["three turns"][:4])
    row = model.processor.encode(example)
    theirs = their_inputs(processor, messages)["input_ids"][0].tolist()
    end = model.processor.end_id
    assert with_marks(row.ids, model).tolist() == [*theirs, end]
    decode = processor.tokenizer.decode
    assert decode(row.ids[row.scored]) == f" a cat{EOS} two dogs{EOS}"
    assert not row.scored[row.ids == IMAGE].any()


def test_deepseek_vl_prompt_matches_snapshot(folder):
    processor = vlm.load(folder, "cpu").processor
    turns = (Turn("user", (None, "what?")), Turn("assistant", ("a cat",)), Turn("user", ("why?",)))
    text = processor.text_tokenizer.decode(
        processor.encode_prompt(Example("row", turns, (one_image(),))).ids.clamp(min=0)
    )
    images = processor.text_tokenizer.decode([0] * SIDE**2)
    assert text == (
        f"{BOS}You are a helpful language and vision assistant. You are able to understand the "
        "visual content that the user provides, and assist the user with a variety of tasks using "
        f"natural language.\n\nUser: {images}what?\n\nAssistant: a cat{EOS}User: why?\n\nAssistant:"
    )


def test_deepseek_vl_system_message_stands_in_place_of_the_fixed_one(folder):
    """As in the authors' code."""
    processor = vlm.load(folder, "cpu").processor
    for said, start in (("Be brief.", "Be brief.\n\nUser: why?"), ("", "User: why?")):
        turns = (Turn("system", (said,)), Turn("user", ("why?",)))
        ids = processor.encode_prompt(Example("row", turns)).ids
        assert processor.text_tokenizer.decode(ids) == f"{BOS}{start}\n\nAssistant:"


HEAD_OF_SIGLIP = 1024 + 4 * (1024**2 + 1024) + 2 * 1024 + 2 * 1024 * 4096 + 4096 + 1024


@pytest.mark.parametrize(
    ("size", "reference", "gigabytes", "blocks"),
    [
        ("1.3b", "DeepseekVL", 3.95, 1.23e9),
        ("7b", "DeepseekVLHybrid", 14.69, 6.07e9),
    ],
)
def test_deepseek_vl_full_sizes_hold_the_published_parameters(size, reference, gigabytes, blocks):
    """The authors' files, in 16 bits, hold SigLIP's pooling head besides."""
    sizes = deepseek_vl.SIZES[size]
    config = getattr(transformers, f"{reference}Config")(
        text_config={"model_type": "llama"} | sizes.text,
        vision_config=sizes.vision,
        tie_word_embeddings=False,
        **({"high_res_vision_config": sizes.high} if sizes.high else {}),
    )
    with torch.device("meta"):
        module = deepseek_vl.build(size)
        peer = getattr(transformers, f"{reference}ForConditionalGeneration")(config)
    count = sum(p.numel() for p in module.parameters())
    assert count == sum(p.numel() for p in peer.parameters())
    assert round((count + HEAD_OF_SIGLIP) * 2 / 1e9, 2) == gigabytes
    assert round(sum(p.numel() for p in module.text.model.layers.parameters()), -7) == blocks
    assert module.tokenizer.tokens_for((300, 700)) == 576
    assert not any(p.is_complex() or p.device.type != "meta" for p in module.parameters())


def test_deepseek_vl_low_and_high_parameters_are_told_apart(tmp_path):
    """The authors' third stage freezes the tower that sees high resolution."""
    write_folder(tmp_path, "deepseek_vl_hybrid")
    module = vlm.load(tmp_path, "cpu").module
    names = [name for name, _ in module.named_parameters() if name.startswith("tokenizer.")]
    assert {name.split(".")[1] for name in names} == {"high", "low"}
    rates = (("tokenizer.high.*", FROZEN), ("tokenizer.low.*", 2e-5), ("adaptor.*", 2e-5))
    decided = assign_rates(module, (*rates, ("text.*", 2e-5)))
    frozen = {name for name, (_, rate) in decided.items() if rate is FROZEN}
    assert frozen == {f"tokenizer.high.{n}" for n, _ in module.tokenizer.high.named_parameters()}
    parts = module.tokenizer.parts()
    assert {name.split(".")[0] for name in parts} == {"high", "low"}
    high = {id(p) for p in module.tokenizer.high.parameters()}
    of_parts = {
        id(p) for name in parts if name.startswith("high") for p in parts[name].parameters()
    }
    assert high == of_parts
    example = Example("row", (Turn("user", (None,)), Turn("assistant", ("a",))), (one_image(),))
    batch = collate([vlm.load(tmp_path, "cpu").processor.encode(example)], 0, "right")
    module(batch).square().sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_sam_hybrid_tokenizer_keeps_the_laws_on_non_square_pixels():
    config = sam_hybrid.SamHybridConfig(
        vision_config=SAM | {"model_type": "sam_vision_model"},
        grid_hw=(2, 3),
        pixel_spec=spec(32, 48),
    )
    tokenizer = sam_hybrid.build(config)
    torch.nn.init.constant_(tokenizer.alpha, 0.5)
    check_laws(tokenizer)


def test_paired_towers_of_different_grids_are_refused_by_the_neck_same():
    tokens = ImageTokens(tokens=torch.zeros(1, 6, 2), grid_hw=(2, 3))
    neck = paired.SameGridNeck(2)
    assert neck(tokens, (2, 3)) is tokens.tokens
    with pytest.raises(ValueError, match=r"grid \(2, 3\) is not the low tower's \(3, 2\)"):
        neck(tokens, (3, 2))


def test_systems_command_lists_both_sizes(capsys):
    cli.main(["systems"])
    listed = capsys.readouterr().out.replace("\n", " ")
    assert all(kind in listed for kind in KINDS)


def test_images_of_other_modes_are_read_as_rgb(folder):
    """transformers' processor fails on them."""
    model = vlm.load(folder, "cpu")
    grey = one_image().convert("L")
    rows = [
        model.processor.encode_literal([image], MARK)
        for image in (grey, Image.merge("RGB", [grey] * 3))
    ]
    for (ours, _), (same, _) in zip(rows[0].views, rows[1].views):
        ours, same = (x if isinstance(x, tuple) else (x,) for x in (ours, same))
        assert all(torch.equal(a, b) for a, b in zip(ours, same))
