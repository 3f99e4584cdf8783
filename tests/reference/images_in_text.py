"""What comparisons of models with images in the text stream share, ours beside transformers'.

A `check_` is a law that several systems keep, called by a test of each. `tiny` is the module that
writes a system's folders, such as `tests.reference.tiny_llava`, with the system's own `ROWS`,
`examples`, `their_inputs` and `our_batch`.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

import vlm
from tests import training
from tests.tiny import image
from vlm import cli
from vlm.data.example import Example, Turn
from vlm.families.decoder_only.batch import IMAGE, collate, collate_packed
from vlm.losses.token import token_losses
from vlm.systems.published import first_names, published_name
from vlm.weights import WeightsError, same_bits


def folders(kinds, write_folder):
    """A fixture `folder`: a tiny folder of each kind, written once for a test file."""

    @pytest.fixture(scope="module", params=kinds, name="folder")
    def written(request, tmp_path_factory):
        path = tmp_path_factory.mktemp(request.param)
        write_folder(path, request.param)
        return path

    return written


def reopened(folder):
    """transformers' model and processor of a folder, strictly opened."""
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True
    )
    found = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(found.values()), found
    return model.eval(), AutoProcessor.from_pretrained(folder)


def our_logits(model, batch):
    """Logits at every position, float[B, T, Z]."""
    module = model.module
    vectors = module.embed(batch.ids, module.encode(batch.groups, batch.arrangement), batch.names)
    hidden = module.read(vectors, batch)
    return module.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def with_marks(ids, model, mark=None):
    """Our ids with the reference's image id at image positions."""
    mark = mark or model.processor.image_mark
    id = model.processor.text_tokenizer.convert_tokens_to_ids(mark)
    return torch.where(ids == IMAGE, id, ids)


def examples_of(rows, answers):
    """Rows (images, content of the question, answer) as examples."""
    return [
        Example(
            f"r{i}",
            (Turn("user", content), *([Turn("assistant", (answer,))] * answers)),
            tuple(images),
        )
        for i, (images, content, answer) in enumerate(rows)
    ]


def batch_of(model, examples, answers, padding="left"):
    """Examples as one batch, with answers to score or asked for."""
    encode = model.processor.encode if answers else model.processor.encode_prompt
    return collate([encode(example) for example in examples], model.processor.pad_id, padding)


def check_layout_opens_in_transformers(
    folder, tmp_path, through_native: bool, inputs_of: Callable, kept: set[str]
) -> None:
    """Every tensor returns under its bits, every small file as it was, straight or after a save in
    our own layout.

    inputs_of: transformers' inputs by its processor. kept: small files that must be among those
    that return. The folder is written to tmp_path / "out".
    """
    model = vlm.load(folder, "cpu")
    if through_native:
        model.save(tmp_path / "native")
        model = vlm.load(tmp_path / "native", "cpu")
    out = tmp_path / "out"
    model.save(out, layout="reference")
    (peer, processor), (again, its_processor) = reopened(folder), reopened(out)
    assert same_bits(again.state_dict(), peer.state_dict())
    names = {path.name for path in folder.iterdir()} - {"config.json", "model.safetensors"}
    assert kept <= names
    for name in names:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    inputs = inputs_of(processor)
    for key, value in inputs_of(its_processor).items():
        assert torch.equal(value, inputs[key])
    assert torch.equal(again(**inputs).logits, peer(**inputs).logits)


def check_all_wrong_keys_are_named(folder, tmp_path, missing: str) -> None:
    """A folder without the weight `missing` and with one that is unknown."""
    broken = shutil.copytree(folder, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    del state[missing]
    state["extra.weight"] = torch.zeros(1)
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError) as error:
        vlm.load(broken, "cpu")
    assert f"missing (1): ['{missing}']" in str(error.value)
    assert "unused (1): ['extra.weight']" in str(error.value)


@torch.no_grad()
def check_ids_and_logits(folder, tiny, answers: bool) -> None:
    """By the folder's chat template, in a batch of unequal length (one image, two, none), padded on
    either side, and each row alone."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    batch, inputs = tiny.our_batch(model, answers), tiny.their_inputs(processor, answers=answers)
    assert torch.equal(batch.valid, inputs["attention_mask"].bool())
    ids = with_marks(batch.ids, model)
    assert torch.equal(ids[batch.valid], inputs["input_ids"][batch.valid])
    expected = peer(**inputs).logits
    logits = our_logits(model, batch)
    close(logits[batch.valid], expected[batch.valid])
    right = tiny.our_batch(model, answers, "right")
    close(our_logits(model, right)[right.valid], expected[batch.valid])
    for number, row in enumerate(tiny.ROWS):
        alone = peer(**tiny.their_inputs(processor, [row], answers)).logits[0]
        close(logits[number][batch.valid[number]], alone)


def check_loss_and_gradients(folder, tiny, key_maps) -> dict[str, torch.Tensor]:
    """The loss is the mean over answers and their ends, in rows side by side and end to end; every
    weight has transformers' gradient. Returns ours by name.

    key_maps: a model's `model_type` -> its key map.
    """
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    batch = tiny.our_batch(model, answers=True, padding="right")
    inputs = tiny.their_inputs(processor, answers=True, padding_side="right")
    labels = with_marks(batch.ids, model).masked_fill(~batch.scored, -100)
    expected = peer(**inputs, labels=labels).loss
    loss = token_losses(model.module(batch), batch.targets).mean()
    close(loss, expected, atol=1e-5)
    packed = collate_packed([model.processor.encode(example) for example in tiny.examples()])
    close(token_losses(model.module(packed), packed.targets).mean(), expected, atol=1e-5)
    loss.backward()
    expected.backward()
    key_map = key_maps[model.reference.model_type]
    theirs = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    renamed, _ = first_names(theirs, key_map, (), "peer")
    ours = {name: p.grad for name, p in model.module.named_parameters()}
    assert len(renamed) == len(ours)
    for name, grad in ours.items():
        assert grad.abs().max() > 0
        close(grad, renamed[published_name(name, key_map)], atol=2e-4)
    return ours


def check_every_part_learns(folder, tiny):
    """Three steps lower the loss and change every weight; returns the model."""
    model = vlm.load(folder, "cpu")
    batch = tiny.our_batch(model, answers=True, padding="right")
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    optimizer = torch.optim.AdamW(model.module.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        loss = token_losses(model.module(batch), batch.targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.module.named_parameters())
    return model


def check_trains_by_the_loop(folder, tiny, tmp_path, pack: int | None) -> None:
    """The training loop changes every weight, with rows side by side or end to end."""
    model = vlm.load(folder, "cpu")
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    stage = replace(
        training.STAGE, rates=(("*", 1e-2),), steps=2, batch=3, micro_batch=3, warmup_steps=0
    )
    training.train(tmp_path, stage, rows=tiny.examples(), chosen=model, pack=pack)
    assert all(not torch.equal(p, before[name]) for name, p in model.module.named_parameters())


def check_chat_says_what_an_answer_says(folder, tiny) -> None:
    model = vlm.load(folder, "cpu")
    seen = {"type": "image", "image": tiny.ROWS[0][0][0]}
    messages = [{"role": "user", "content": [seen, {"type": "text", "text": "what is it?"}]}]
    (answer,) = model.answer_examples(tiny.examples()[:1], max_new_tokens=8)
    assert model.chat(messages, max_new_tokens=8) == answer


def check_is_listed_and_used_by_commands(folder, tmp_path, capsys, name: str) -> None:
    cli.main(["systems"])
    assert name in capsys.readouterr().out
    path = tmp_path / "a.png"
    image(1, (20, 40)).save(path)
    cli.main(["caption", str(path), "--model", str(folder), "--max-new-tokens", "3"])
