"""Qwen2-VL and Qwen2.5-VL beside transformers' classes: pixels, ids, logits, training, answers."""

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

import vlm
from tests.reference import images_in_text as law
from tests.reference import tiny_qwen2_vl
from tests.reference.images_in_text import close, our_logits, reopened, with_marks
from tests.reference.tiny_qwen2_vl import (
    GREY,
    KINDS,
    SIZES,
    examples,
    their_inputs,
    write_folder,
)
from tests.tiny import image as one_image
from vlm.data.example import BadRow, Example, Turn, Video
from vlm.families.decoder_only.batch import IMAGE, collate
from vlm.losses.token import token_losses
from vlm.pixels import BadImage
from vlm.systems import qwen2_vl
from vlm.training.activation_checkpointing import checkpoint_activations

folder = law.folders(KINDS, write_folder)


def their_patches(view):
    """A view float[3, H, W] as transformers lays its patches: blocks of 2 x 2, each patch twice in
    time."""
    _, H, W = view.shape
    cut = view.view(3, H // 28, 2, 14, W // 28, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)
    return cut.flatten(0, 3)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1)


@pytest.mark.parametrize("side", [(56, 56), (28, 3000), (500, 700), (4000, 2600), (1, 60), (57, 9)])
@pytest.mark.parametrize("limits", [(56 * 56, 28 * 28 * 80), (4 * 28 * 28, 12845056), (1, 784)])
def test_qwen2_vl_sizes_of_views_match_reference(side, limits):
    least, most = limits
    spec = qwen2_vl._pixel_spec(Qwen2VLImageProcessor(min_pixels=least, max_pixels=most), "here")
    assert spec.view_sizes(side) == (smart_resize(*side, 28, least, most),)


@torch.no_grad()
def test_qwen2_vl_pixels_ids_positions_and_logits_match_reference(folder):
    """Each image alone: portrait 3:1, small, narrow, large, grey, of whole windows and a rest."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    images = [*(one_image(3, size_hw) for size_hw in SIZES.values()), GREY]
    grids = set()
    for image in images:
        asked = Example("r", (Turn("user", (None, "what?")),), (image,))
        row = model.processor.encode_prompt(asked)
        inputs = their_inputs(processor, [([image], (None, "what?"), "")])
        assert torch.equal(with_marks(row.ids, model), inputs["input_ids"][0])
        ((view, _),) = row.views
        close(their_patches(view), inputs["pixel_values"], 1e-6)
        (span,) = row.layout.spans
        (_, h, w) = inputs["image_grid_thw"][0].tolist()
        assert span.grid_hw == (h // 2, w // 2)
        positions, _ = peer.model.get_rope_index(**{k: inputs[k] for k in POSITIONS})
        assert torch.equal(row.positions, positions[:, 0])
        logits = our_logits(model, collate([row], model.processor.pad_id))
        close(logits, peer(**inputs).logits)
        grids.add(span.grid_hw)
    assert len(grids) == len(images)


POSITIONS = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")


@torch.no_grad()
def test_qwen2_vl_positions_of_batches_match_reference(folder):
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    batch, inputs = tiny_qwen2_vl.our_batch(model), their_inputs(processor)
    positions, _ = peer.model.get_rope_index(**{k: inputs[k] for k in POSITIONS})
    assert torch.equal(batch.positions, positions)


@pytest.mark.parametrize("answers", [False, True])
def test_qwen2_vl_ids_and_logits_match_reference(folder, answers):
    law.check_ids_and_logits(folder, tiny_qwen2_vl, answers)


def test_qwen2_vl_loss_and_gradients_match_reference(folder):
    key_maps = dict.fromkeys(KINDS, qwen2_vl.KEY_MAP)
    law.check_loss_and_gradients(folder, tiny_qwen2_vl, key_maps)


def test_qwen2_vl_training_step_changes_every_part(folder):
    law.check_every_part_learns(folder, tiny_qwen2_vl)


def test_qwen2_vl_computes_activations_again(folder):
    """Checkpointed blocks of image encoder and language model give the same gradients."""
    grads = []
    for again in (False, True):
        model = vlm.load(folder, "cpu")
        if again:
            checkpoint_activations(model.module)
        batch = tiny_qwen2_vl.our_batch(model, answers=True, padding="right")
        token_losses(model.module(batch), batch.targets).mean().backward()
        grads.append({name: p.grad for name, p in model.module.named_parameters()})
    kept, computed = grads
    for name, grad in kept.items():
        close(computed[name], grad, 1e-6)


@pytest.mark.parametrize("pack", [None, 800])
def test_qwen2_vl_trains_by_the_same_loop(folder, tmp_path, pack):
    law.check_trains_by_the_loop(folder, tiny_qwen2_vl, tmp_path, pack)


def test_qwen2_vl_greedy_ids_match_reference_and_batches(folder):
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    together = model.answer_examples(examples(), max_new_tokens=10)
    theirs = peer.generate(
        **their_inputs(processor), max_new_tokens=10, do_sample=False,
        eos_token_id=list(model.stop_ids),
    )  # fmt: skip
    prompt = their_inputs(processor)["input_ids"].shape[1]
    theirs = theirs[:, prompt:].tolist()
    assert together == [model.processor.decode(ids) for ids in theirs]
    for number, example in enumerate(examples()):
        row = model.processor.encode_prompt(example.question())
        (written,) = model.write_after([row], max_new_tokens=10)
        assert list(written.ids) == theirs[number][: len(written.ids)]
    assert len(set(together)) > 1


@torch.no_grad()
def test_qwen2_vl_beams_match_reference(folder):
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    inputs = their_inputs(processor)
    options = dict(max_new_tokens=6, do_sample=False, num_beams=3)
    theirs = peer.generate(**inputs, **options, eos_token_id=list(model.stop_ids))
    rows = [model.processor.encode_prompt(example.question()) for example in examples()]
    for written, ids in zip(model.write_after(rows, **options), theirs, strict=True):
        expected = ids[inputs["input_ids"].shape[1] :].tolist()
        assert list(written.ids) == expected[: len(written.ids)]


def test_qwen2_vl_prompt_matches_snapshot(folder):
    processor = vlm.load(folder, "cpu").processor
    row = processor.encode_prompt(
        Example("r", (Turn("user", (None, "a <|image_pad|>?")),), (one_image(1, (60, 90)),))
    )
    runs = (row.ids == IMAGE).sum()
    text = processor.text_tokenizer.decode(row.ids[row.ids != IMAGE])
    assert runs == 2 * 3
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|vision_end|>a <|image_pad|>?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_qwen2_vl_stops_at_the_ends_that_the_folder_names(folder):
    model = vlm.load(folder, "cpu")
    ends = model.processor.text_tokenizer.convert_ids_to_tokens(model.stop_ids)
    assert ends == ["<|im_end|>", "<|endoftext|>"]


def test_qwen2_vl_boxes_return_from_the_resized_image(folder):
    spec = vlm.load(folder, "cpu").processor.pixel_spec
    size_hw, box = (300, 100), [[10.0, 20.0, 60.0, 290.0]]
    resize = spec.resize_record(size_hw)
    ((rows, columns),) = spec.view_sizes(size_hw)
    assert (resize.input_hw, resize.output_hw) == (size_hw, (rows, columns))
    scaled = [[10 * columns / 100, 20 * rows / 300, 60 * columns / 100, 290 * rows / 300]]
    close(torch.tensor(resize.boxes(box)), torch.tensor(scaled, dtype=torch.float64), 1e-9)
    close(torch.tensor(resize.invert_boxes(scaled)), torch.tensor(box, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("step", ["encode", "measure"])
def test_qwen2_vl_refuses_an_image_that_is_too_long(folder, step):
    processor = vlm.load(folder, "cpu").processor
    turns = (Turn("user", (None, "what?")), Turn("assistant", ("a",)))
    for size_hw in ((2, 402), (402, 2)):
        example = Example("far", turns, (one_image(1, size_hw),))
        with pytest.raises(BadImage, match=rf"far: .* at most 200 times .* {size_hw[0]} ×"):
            getattr(processor, step)(example)
    fits = Example("near", turns, (one_image(1, (2, 400)),))
    assert getattr(processor, step)(fits).layout.spans[0].grid_hw[0] == 1


def test_qwen2_vl_never_cuts_an_image_to_fit_the_context(folder):
    processor = vlm.load(folder, "cpu").processor
    processor.max_tokens = 40
    question = examples()[0].question()
    with pytest.raises(BadRow, match=r"r0: \d+ tokens, the context takes 40"):
        processor.encode_prompt(question)


def test_qwen2_vl_refuses_videos_by_name(folder):
    model = vlm.load(folder, "cpu")
    video = Video((one_image(), one_image(1)), (0.0, 0.5))
    messages = [{"role": "user", "content": [{"type": "video", "video": video}]}]
    with pytest.raises(BadRow, match="this model reads no videos, found one"):
        model.chat(messages)


def test_qwen2_vl_chat_says_what_an_answer_says(folder):
    law.check_chat_says_what_an_answer_says(folder, tiny_qwen2_vl)


def test_qwen2_vl_is_listed_and_used_by_commands(folder, tmp_path, capsys):
    law.check_is_listed_and_used_by_commands(folder, tmp_path, capsys, "qwen2_5_vl")


MILLIONS = {
    "Qwen/Qwen2-VL-2B-Instruct": (2209.0, 665.3),
    "Qwen/Qwen2-VL-7B-Instruct": (8291.4, 675.8),
    "Qwen/Qwen2.5-VL-3B-Instruct": (3754.6, 668.7),
    "Qwen/Qwen2.5-VL-7B-Instruct": (8292.2, 676.6),
}
"""Parameters of transformers' classes by these configurations, and of the image encoder with its
merger."""


@pytest.mark.parametrize("name", qwen2_vl.SIZES)
def test_qwen2_vl_has_the_published_number_of_parameters(name):
    config = AutoConfig.for_model(**qwen2_vl.SIZES[name])
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    spec = qwen2_vl._pixel_spec(Qwen2VLImageProcessor(), name)
    with init_empty_weights():
        module = qwen2_vl.compose(config, spec)
    module.text.tie_weights()
    seen = sum(p.numel() for part in (module.tokenizer, module.adaptor) for p in part.parameters())
    found = sum(p.numel() for p in module.parameters()) / 1e6, seen / 1e6
    assert tuple(round(count, 1) for count in found) == MILLIONS[name]
