import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import vlm
from tests import tiny, training
from vlm.data.example import BadRow, Example, Turn
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.batch import collate
from vlm.families.decoder_only.model import DecoderOnlyModel
from vlm.losses.token import token_losses
from vlm.pixels import BadImage
from vlm.weights import WeightsError, same_bits


def questions():
    """Unequal lengths: no, one and two images; text of several lengths."""
    return [
        ([], "say something"),
        ([tiny.image(1)], "what?"),
        ([tiny.image(2), tiny.image(3, (30, 5))], "how do these two images differ?"),
        ([tiny.image(4, (3, 40))], "?"),
    ]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "gemma2"])
def test_greedy_ids_in_a_batch_equal_one_by_one(kind):
    """Images, text-only rows and lengths mixed; the same ids, logprobs to rounding."""
    model = training.model(kind=kind)
    images, texts = zip(*questions())
    prompts = ["<image>" * len(image_list) + text for image_list, text in questions()]
    together = model.generate(images, prompts, max_new_tokens=12)
    alone = [
        model.generate([i], [p], max_new_tokens=12)[0] for i, p in zip(images, prompts, strict=True)
    ]
    assert [g.ids for g in together] == [g.ids for g in alone]
    assert len({g.ids for g in together}) > 1
    for a, b in zip(together, alone):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert model.answer(images, texts, batch_size=4) == model.answer(images, texts, batch_size=1)


@torch.no_grad()
def test_greedy_ids_equal_the_naive_loop():
    """The slow twin: no cache, no batch, the whole stream read again for each id."""
    model = training.model()
    module, processor = model.module, model.processor
    row = processor.encode_literal([tiny.image(1)], "a <image> b")
    ids = row.ids
    for _ in range(8):
        batch = collate([row], processor.pad_id)
        vectors = module.embed(ids[None], module.encode(batch.groups), ["row"])
        logits = module.text(inputs_embeds=vectors).logits[0, -1]
        ids = torch.cat([ids, logits.argmax()[None]])
    written = model.generate([[tiny.image(1)]], ["a <image> b"], max_new_tokens=8)[0].ids
    assert list(written) == ids[len(row.ids) :].tolist()[: len(written)]


def test_generation_stops_at_the_end_token_and_reports_its_logprob():
    model = training.model()
    free = model.generate([[]], ["abc"], max_new_tokens=6)[0]
    model.stop_ids = (free.ids[3],)
    stopped = model.generate([[], []], ["abc", "xyz!"], max_new_tokens=6)[0]
    assert stopped.ids == free.ids[: free.ids.index(free.ids[3]) + 1]
    assert len(stopped.logprobs) == len(stopped.ids)


def test_score_equals_the_logprobs_of_what_was_generated():
    """Re-scoring a generation gives its own total."""
    model = training.model()
    prompts = ["<image> tell", "text"]
    images = [[tiny.image()], []]
    options = {"max_new_tokens": 5}
    for prompt, image_list, written in zip(
        prompts, images, model.generate(images, prompts, **options)
    ):
        row = model.processor.encode_literal(image_list, prompt)
        ids = torch.cat([row.ids, torch.tensor(written.ids)])
        scored = torch.zeros(len(ids), dtype=torch.bool)
        scored[len(row.ids) :] = True
        row = type(row)(name="r", ids=ids, scored=scored, views=row.views, layout=row.layout)
        loss = engine.answer_losses(model.module, collate([row], model.processor.pad_id))
        assert float(-loss) == pytest.approx(sum(written.logprobs), abs=1e-3)


@torch.no_grad()
def test_beam_logprobs_equal_the_rescored_beam():
    """A beam's log-probabilities are those of its own ids, and confidences lie in [0, 1]."""
    model = training.model()
    prompts, images = ["<image> tell", "some text"], [[tiny.image()], []]
    written = model.generate(images, prompts, max_new_tokens=6, num_beams=3)
    for prompt, image_list, found in zip(prompts, images, written):
        row = model.processor.encode_literal(image_list, prompt)
        ids = torch.cat([row.ids, torch.tensor(found.ids)])
        scored = torch.arange(len(ids)) >= len(row.ids)
        row = type(row)(name="r", ids=ids, scored=scored, views=row.views, layout=row.layout)
        batch = collate([row], model.processor.pad_id)
        losses = token_losses(model.module(batch), batch.targets)
        assert found.logprobs == pytest.approx((-losses).tolist(), abs=1e-3)
        assert all(0 <= torch.tensor(logprob).exp() <= 1 for logprob in found.logprobs)


@torch.no_grad()
def next_logits(model, row):
    batch = collate([row], model.processor.pad_id)
    vectors = model.module.embed(row.ids[None], model.module.encode(batch.groups), ["row"])
    return model.module.text(inputs_embeds=vectors).logits[0, -1]


def test_beams_as_many_as_the_vocabulary_find_the_most_probable_pair():
    """The best of all answers of two ids, by brute force, and its total."""
    model = training.model(kind="qwen2", vocab=260, seed=3)  # a seed at which greedy misses it
    model.stop_ids = (259,)
    images, prompt = [tiny.image(2)], "<image> tell"
    row = model.processor.encode_literal(images, prompt)
    first = next_logits(model, row).log_softmax(-1)
    totals = {}
    for id in range(259):
        ids = torch.cat([row.ids, torch.tensor([id])])
        longer = dataclasses.replace(row, ids=ids, scored=torch.zeros(len(ids), dtype=torch.bool))
        value, second = next_logits(model, longer).log_softmax(-1)[:259].max(0)
        totals[(id, int(second))] = float(first[id] + value)
    best = max(totals, key=totals.get)
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "length_penalty": 0.0}
    (beam,) = model.generate([images], [prompt], num_beams=260, **options)
    assert beam.ids == best
    assert sum(beam.logprobs) == pytest.approx(totals[best], abs=1e-3)
    (greedy,) = model.generate([images], [prompt], max_new_tokens=2, min_new_tokens=2)
    assert sum(greedy.logprobs) < sum(beam.logprobs) - 0.01


def test_sampled_ids_follow_the_models_distribution_and_the_seed():
    """Frequencies of the first id lie near its probabilities; a seed repeats them, and leaves
    torch's global generator alone."""
    model = training.model()
    with torch.no_grad():
        model.module.text.get_output_embeddings().weight.mul_(0.05)  # so that many ids are likely
    count, options = 2000, {"do_sample": True, "top_k": 0, "max_new_tokens": 1, "batch_size": 500}
    before = torch.get_rng_state()
    drawn = model.generate([[]] * count, ["abc"] * count, seed=1, **options)
    again = model.generate([[]] * count, ["abc"] * count, seed=1, **options)
    assert drawn == again
    assert torch.equal(torch.get_rng_state(), before)
    other = model.generate([[]] * count, ["abc"] * count, seed=2, **options)
    assert drawn != other
    probabilities = next_logits(model, model.processor.encode_literal([], "abc")).softmax(-1)
    found = torch.bincount(torch.tensor([g.ids[0] for g in drawn]), minlength=300) / count
    assert float((found - probabilities).abs().sum()) < 0.35  # 0.3 is usual, 2 the most
    for generation in drawn[:50]:
        expected = float(probabilities[generation.ids[0]].log())
        assert generation.logprobs[0] == pytest.approx(expected, abs=1e-3)
    one = model.generate([[]] * 20, ["abc"] * 20, **{**options, "top_k": 1})
    assert {g.ids[0] for g in one} == {int(probabilities.argmax())}


def test_repetition_penalty_and_length_penalty_count_what_was_written_alone():
    """A prompt of vectors has no ids: a word of the prompt is not penalised, one that was written
    is; a longer prompt changes no length."""
    model = training.model()
    plain = model.generate([[]], ["abc"], max_new_tokens=8)[0]
    penalised = model.generate([[]], ["abc"], max_new_tokens=8, repetition_penalty=50.0)[0]
    assert penalised.ids[0] == plain.ids[0]
    assert len(set(plain.ids)) < len(set(penalised.ids)) == len(penalised.ids)
    model.stop_ids = tuple(range(100, 300))
    prompts = ["a", "a much longer prompt than the other one"]
    options = {"num_beams": 4, "max_new_tokens": 12}
    for prompt in prompts:
        lengths = [
            len(model.generate([[]], [prompt], length_penalty=penalty, **options)[0].ids)
            for penalty in (-5.0, 5.0)
        ]
        assert lengths[0] <= lengths[1]
    exact = model.generate([[], []], prompts, min_new_tokens=5, **options)
    assert all(len(generation.ids) >= 5 for generation in exact)


def test_several_sequences_for_one_prompt_are_refused():
    with pytest.raises(ValueError, match="num_return_sequences"):
        training.model().generate([[]], ["a"], num_return_sequences=2, do_sample=True)


def test_score_in_a_batch_equals_one_by_one():
    model = training.model()
    images, texts = zip(*questions())
    prompts = ["<image>" * len(i) + t for i, t in zip(images, texts)]
    answers = ["yes", "a longer answer", "no", "?"]
    together = model.score(images, prompts, answers)
    alone = torch.cat([model.score([i], [p], [a]) for i, p, a in zip(images, prompts, answers)])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)
    assert (together < 0).all()


def test_image_gain_pairs_every_row_with_another_rows_image():
    model = training.model()
    rows = [
        model.processor.encode(tiny.example(f"r{i}", images=(tiny.image(i),))) for i in range(3)
    ]
    rows.append(model.processor.encode(tiny.example("text", ("hi",))))
    right, wrong = engine.image_gain(model.module, collate(rows, 256))
    plain = engine.answer_losses(model.module, collate(rows, 256))
    torch.testing.assert_close(right, plain)
    assert torch.isnan(wrong[3])
    swapped = [
        model.processor.encode(tiny.example(f"s{i}", images=(tiny.image((i - 1) % 3),)))
        for i in range(3)
    ]
    expected = engine.answer_losses(model.module, collate(swapped, 256))
    torch.testing.assert_close(wrong[:3], expected, atol=1e-4, rtol=1e-4)


def test_caption_takes_paths_bytes_images_and_arrays_alike(tmp_path):
    model = training.model()
    image = tiny.image(3, (20, 31))
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    captions = model.caption(
        [tmp_path / "a.png", str(tmp_path / "a.png"), data, image, np.asarray(image)]
    )
    assert len(set(captions)) == 1


def test_bad_arguments_name_what_was_expected(tmp_path):
    model = training.model()
    with pytest.raises(ValueError, match="there are 1 images and 2 questions"):
        model.answer([tiny.image()], ["a", "b"])
    with pytest.raises(ValueError, match="images is a list of images, found a single str"):
        model.caption("one.png")
    with pytest.raises(BadImage, match=r"gone\.png"):
        model.caption([tmp_path / "gone.png"])
    with pytest.raises(BadRow, match="has 0 <image> marks, there are 1 images"):
        model.generate([[tiny.image()]], ["no mark"])
    for option in ("batch_size", "num_beams", "max_new_tokens"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, found 0"):
            model.caption([tiny.image()], **{option: 0})
    for options, message in (
        ({"seed": 1}, "seed: expected 0 or more, and do_sample=True to draw; found 1"),
        ({"seed": -1, "do_sample": True}, "seed: expected 0 or more.*found -1"),
        ({"max_length": 9}, "max_length would count the prompt's tokens too: give max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            model.caption([tiny.image()], **options)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, found -1"):
        tiny.processor(model.module, max_tokens=-1)
    with pytest.raises(AttributeError, match="it is done by models of the family prefix_decoder"):
        model.ocr([tiny.image()])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_saved_model_reopens_with_the_same_bits_and_ids(tmp_path, kind, timm_model):
    model = timm_model(kind)
    model.save(tmp_path / "run/model")
    again = vlm.load(tmp_path / "run", device="cpu")
    assert same_bits(model.module.state_dict(), again.module.state_dict())
    images, texts = zip(*questions())
    assert again.answer(images, texts, max_new_tokens=8) == model.answer(
        images, texts, max_new_tokens=8
    )
    assert (
        again.processor.encode(
            Example("e", (Turn("user", ("q",)), Turn("assistant", ("a",))))
        ).ids.tolist()
        == model.processor.encode(
            Example("e", (Turn("user", ("q",)), Turn("assistant", ("a",))))
        ).ids.tolist()
    )
    model.processor.position_numbers = 3
    model.save(tmp_path / "three")
    assert vlm.load(tmp_path / "three", device="cpu").processor.position_numbers == 3


@pytest.fixture
def timm_model():
    """A composed model of real kinds: a timm ViT of tiny width, so that it can be rebuilt."""
    from vlm import adaptors, tokenizers
    from vlm.config import to_dict
    from vlm.families.decoder_only.module import DecoderOnly

    def build(kind):
        spec = tiny.Patches(size_hw=(32, 48)).pixel_spec
        torch.manual_seed(0)
        tokenizer = tokenizers.build(
            {
                "kind": "timm", "name": "vit_tiny_patch16_224", "level": -1, "prefix": "drop",
                "model_args": {
                    "embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": [32, 48],
                },
                "norm": True, "pooled": False, "pixel_spec": to_dict(spec),
            }
        )  # fmt: skip
        adaptor = adaptors.build(
            {"kind": "mlp", "in_width": 24, "out_width": 32, "depth": 2, "hidden_width": 32}
        )
        module = DecoderOnly(tokenizer, adaptor, tiny.text_model(kind)).eval()
        processor = tiny.processor(module, system="Be brief.")
        ends = (processor.end_id,)
        return DecoderOnlyModel(module=module, processor=processor, stop_ids=ends)

    return build


def test_loading_reports_every_misfit_together(tmp_path, timm_model):
    from safetensors.torch import load_file, save_file

    timm_model("llama").save(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["adaptor.layers.9.weight"] = state.pop("adaptor.layers.0.weight")
    state["adaptor.layers.2.bias"] = torch.zeros(5)
    save_file(state, path)
    with pytest.raises(WeightsError) as caught:
        vlm.load(tmp_path)
    message = str(caught.value)
    assert "missing (1): ['adaptor.layers.0.weight']" in message
    assert "unused (1): ['adaptor.layers.9.weight']" in message
    assert "adaptor.layers.2.bias: expected (32,), found (5,)" in message


def test_loading_another_thing_says_what_was_expected(tmp_path, timm_model):
    with pytest.raises(ValueError, match=r"expected config\.json here or in model/"):
        vlm.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model type 'bert' is not one of vlm"):
        vlm.load(tmp_path)
    timm_model("llama").save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(WeightsError, match="broken or cut safetensors"):
        vlm.load(tmp_path)
    weights.unlink()
    with pytest.raises(WeightsError, match="expected a safetensors file, found"):
        vlm.load(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"colour": "red"}))
    with pytest.raises(ValueError, match=r"unknown keys \['colour'\]"):
        vlm.load(tmp_path)


def test_hub_id_without_a_network_says_so():
    with pytest.raises(OSError, match="nobody/nothing: no such folder, and the hub did not give"):
        vlm.load("nobody/nothing")


def test_saving_needs_room(tmp_path, timm_model, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(OSError, match="name a folder on another disk"):
        timm_model("llama").save(tmp_path / "full")


def test_one_pixel_image_is_captioned():
    model = training.model()
    assert len(model.caption([Image.new("RGB", (1, 1))])) == 1
