"""Idefics v1 beside transformers' class: pixels, ids, logits, training, answers, folders."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import vlm
from tests.reference import images_in_text as law
from tests.reference import tiny_idefics
from tests.reference.images_in_text import close, our_logits, reopened, with_marks
from tests.reference.tiny_idefics import (
    FENCE,
    KINDS,
    MARK,
    ROWS,
    SIZES,
    TURN_ENDS,
    examples,
    our_batch,
    prompt_of,
    their_inputs,
    write_folder,
)
from tests.tiny import image as one_image
from vlm import vocabulary
from vlm.families.decoder_only.batch import IMAGE, collate, collate_packed
from vlm.losses.token import token_losses
from vlm.systems import idefics
from vlm.systems.published import first_names, published_name
from vlm.training.stages import assign_rates
from vlm.weights import same_bits

folder = law.folders(KINDS, write_folder)

PROMPTS = (f"{MARK} what is {MARK} it?", f"a cat {MARK}{MARK}", f"is it {MARK}\n{MARK}")


def test_idefics_pixels_and_ids_match_reference(folder):
    """Texts as they are, with images before, after and between them, and spaces around these."""
    model, (_, processor) = vlm.load(folder, "cpu"), reopened(folder)
    for size_hw in SIZES.values():
        images = [one_image(3, size_hw), one_image(4, (20, 50))]
        for prompt in (
            f"{MARK} what is {MARK} it?",
            f"a cat {MARK}{MARK}",
            f"is it {MARK}\n{MARK}",
        ):
            row = model.processor.encode_literal(images, prompt)
            first, second, third = prompt.split(MARK)
            items = [first, images[0], second, images[1], third]
            inputs = processor(
                text=[[item for item in items if item != ""]],
                add_end_of_utterance_token=False,
                return_tensors="pt",
            )
            assert torch.equal(with_marks(row.ids, model), inputs["input_ids"][0])
            views = torch.stack([view for view, _ in row.views])
            close(views, inputs["pixel_values"][0], 1e-6)


@pytest.mark.parametrize("answers", [False, True])
def test_idefics_ids_and_logits_match_reference(folder, answers):
    law.check_ids_and_logits(folder, tiny_idefics, answers)


def test_idefics_greedy_ids_match_reference_and_batches(folder):
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    options = dict(max_new_tokens=10)
    together = model.answer_examples(examples(), **options)
    inputs = their_inputs(processor)
    theirs = peer.generate(
        **inputs, **options, do_sample=False, eos_token_id=list(model.stop_ids),
        suppress_tokens=list(model.banned_ids),
    )  # fmt: skip
    theirs = theirs[:, inputs["input_ids"].shape[1] :].tolist()
    assert together == [model.processor.decode(ids) for ids in theirs]
    alone = [model.answer_examples([example], **options)[0] for example in examples()]
    assert together == alone
    assert len(set(together)) > 1


@torch.no_grad()
def test_idefics_text_before_an_image_does_not_depend_on_it(folder):
    model = vlm.load(folder, "cpu")

    def logits(seed):
        prompt = f"what is a cat? {MARK} it?"
        row = model.processor.encode_literal([one_image(seed, (40, 90))], prompt)
        return our_logits(model, collate([row], 0))[0], int((row.ids == IMAGE).nonzero())

    (one, at), (other, _) = logits(1), logits(2)
    assert at > 3
    assert torch.equal(one[:at], other[:at])
    assert (one[at:] - other[at:]).abs().amax(-1).min() > 1e-4


def test_idefics_loss_and_gradients_match_reference(folder):
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    batch = our_batch(model, answers=True, padding="right")
    inputs = their_inputs(processor, answers=True, padding_side="right")
    labels = with_marks(batch.ids, model).masked_fill(~batch.scored, -100)
    logits = peer(**inputs).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten())
    loss = token_losses(model.module(batch), batch.targets).mean()
    close(loss, expected, atol=1e-5)
    packed = collate_packed([model.processor.encode(example) for example in examples()])
    close(token_losses(model.module(packed), packed.targets).mean(), expected, atol=1e-5)
    loss.backward()
    expected.backward()
    key_map = idefics.key_map_of(peer.config)
    theirs = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    renamed = idefics._joined(first_names(theirs, key_map, (), "peer")[0])
    ours = {name: p.grad for name, p in model.module.named_parameters()}
    assert len(renamed) == len(ours)
    for name, grad in ours.items():
        assert grad.abs().max() > 0
        close(grad, renamed[published_name(name, key_map)], atol=2e-4)


def test_idefics_training_step_changes_every_part(folder):
    law.check_every_part_learns(folder, tiny_idefics)


def test_idefics_prompt_matches_snapshot(tmp_path):
    for kind, ends, end in (("instruct", TURN_ENDS, TURN_ENDS), ("base", "", "</s>")):
        write_folder(tmp_path / kind, kind)
        model = vlm.load(tmp_path / kind, "cpu")
        row = model.processor.encode(examples()[1])
        text = model.processor.text_tokenizer.decode(with_marks(row.ids, model))
        fenced = f"{FENCE}{MARK}{FENCE}"
        assert text == (
            f"<s>User: what is{fenced}and{fenced}?{ends}\nAssistant: two dogs, a cat{end}"
        )


def test_idefics_prompts_of_tests_are_those_of_the_processor():
    """Texts and images in turn, no two texts side by side."""
    for images, content, answer in ROWS:
        items = prompt_of(content, images, answer)
        texts = [isinstance(item, str) for item in items]
        assert not any(a and b for a, b in pairwise(texts))


def test_idefics_chat_says_what_an_answer_says(folder):
    law.check_chat_says_what_an_answer_says(folder, tiny_idefics)


def test_idefics_is_listed_and_used_by_commands(folder, tmp_path, capsys):
    law.check_is_listed_and_used_by_commands(folder, tmp_path, capsys, "idefics")


@pytest.mark.parametrize("through_native", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_idefics_reference_layout_opens_in_transformers(kind, tied, through_native, tmp_path):
    write_folder(tmp_path / "in", kind, tied=tied)
    law.check_layout_opens_in_transformers(
        tmp_path / "in", tmp_path, through_native, their_inputs,
        {"processor_config.json", "tokenizer.json"},
    )  # fmt: skip
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("in", "out"))
    assert same_bits(before, after)
    assert ("lm_head.weight" in after) != tied


@torch.no_grad()
def test_idefics_native_layout_returns_the_same_model(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    model.save(tmp_path)
    again = vlm.load(tmp_path, "cpu")
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    assert again.processor.layout_for.views == model.processor.layout_for.views
    ours, its = (our_batch(m) for m in (model, again))
    assert torch.equal(ours.ids, its.ids)
    assert torch.equal(our_logits(model, ours), our_logits(again, its))


@torch.no_grad()
def test_idefics_keeps_what_older_folders_hold_beside(folder, tmp_path):
    """Rotary frequencies of each layer and position numbers, which were weights once; the images'
    processor and dtype by their older names."""
    old = shutil.copytree(folder, tmp_path / "old")
    state = load_file(old / "model.safetensors")
    frequencies = torch.arange(4.0)
    state |= {
        "model.layers.1.self_attn.rotary_emb.inv_freq": frequencies,
        "model.gated_cross_attn_layers.0.cross_attn.rotary_emb.inv_freq": frequencies + 1,
        "model.vision_model.embeddings.position_ids": torch.arange(17)[None],
    }
    save_file(state, old / "model.safetensors", {"format": "pt"})
    settings = json.loads((old / "processor_config.json").read_text())
    (old / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    (old / "processor_config.json").unlink()
    values = json.loads((old / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    (old / "config.json").write_text(json.dumps(values))
    model, new = vlm.load(old, "cpu"), vlm.load(folder, "cpu")
    assert same_bits(model.module.state_dict(), new.module.state_dict())
    assert model.processor.pixel_spec == new.processor.pixel_spec
    model.save(tmp_path / "out", layout="reference")
    assert same_bits(load_file(tmp_path / "out" / "model.safetensors"), state)


@torch.no_grad()
def test_idefics_with_new_tokens_is_written_and_opened_again(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    (new,) = vocabulary.grow(model.module.text, model.processor.text_tokenizer, ["<loc0>"])
    model.save(tmp_path, layout="reference")
    again, (peer, _) = vlm.load(tmp_path, "cpu"), reopened(tmp_path)
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    assert again.processor.text_tokenizer("<loc0>", add_special_tokens=False)["input_ids"] == [new]
    old = vlm.load(folder, "cpu").module.text.config.vocab_size
    assert peer.lm_head.additional_fc.weight.shape[0] == peer.config.additional_vocab_size
    assert peer.config.vocab_size + peer.config.additional_vocab_size == old + 1


def test_idefics_names_all_wrong_keys_at_once(folder, tmp_path):
    law.check_all_wrong_keys_are_named(
        folder, tmp_path, "model.gated_cross_attn_layers.1.cross_attn.k_proj.weight"
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "gelu", "hidden_act: expected 'silu', found 'gelu'"),
        ("dropout", 0.5, "dropout: expected 0, found 0.5"),
        ("cross_layer_interval", 3, "num_hidden_layers % 3, .*: expected 0, found 1"),
        ("additional_vocab_size", 1, "expected at most .* tokens, the rows of the tables"),
    ],
)
def test_idefics_raises_for_what_is_not_of_the_published_kind(
    folder, tmp_path, field, value, message
):
    out = shutil.copytree(folder, tmp_path / "out")
    values = json.loads((out / "config.json").read_text()) | {field: value}
    (out / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        vlm.load(out, "cpu")


def test_idefics_raises_where_processor_and_weights_differ(folder, tmp_path):
    out = shutil.copytree(folder, tmp_path / "out")
    values = json.loads((out / "processor_config.json").read_text())
    values["image_processor"] |= {"size": {"height": 40, "width": 40}, "image_size": 40}
    (out / "processor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"size: expected \(32, 32\), found \(40, 40\)"):
        vlm.load(out, "cpu")


def test_idefics_full_size_holds_the_published_parameters():
    said = idefics.SIZES["9b"]
    config = transformers.IdeficsConfig(
        **said.text, vision_config=said.vision, perceiver_config=said.perceiver
    )
    with torch.device("meta"):
        module = idefics.build("9b")
        peer = transformers.IdeficsForVisionText2Text(config)
    unused = idefics._unused(config)
    theirs = {name: p for name, p in peer.named_parameters() if not name.startswith(tuple(unused))}
    count = sum(p.numel() for p in module.parameters())
    assert count == sum(p.numel() for p in theirs.values())
    parts = {name: sum(p.numel() for p in m.parameters()) for name, m in module.parts().items()}
    assert round((count - parts["adaptor"]) / 1e6, 1) == 8803.7
    assert round(parts["cross"] / 1e6, 1) == 1434.5
    names = {published_name(key, idefics.key_map_of(config)) for key in module.state_dict()}
    assert names == {name for name in theirs if "additional" not in name}
    assert module.adaptor.shape_for(module.tokenizer.shapes_for((300, 700))[0]).length == 64
    rates = [(f"{part}.*", 1e-5) for part in ("tokenizer", "adaptor", "cross", "text")]
    assign_rates(module, tuple(rates))
    with pytest.raises(ValueError, match="'7b' is not one of 9b"):
        idefics.build("7b")
