"""TrOCR beside transformers' VisionEncoderDecoderModel: tiny random folders of every kind."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.reference.tiny_trocr import KINDS, TEXT, load, text_tokenizer, write_folder
from tests.tiny import image as one_image
from vlm.data.example import caption_example
from vlm.families.decoder_only.batch import collate
from vlm.families.encoder_decoder import generate as transcribe
from vlm.losses.token import token_losses
from vlm.systems import trocr
from vlm.weights import WeightsError, same_bits

TEXTS = ["a", "Hello, line!", "two words"]
IMAGES = [one_image(0, (12, 71)), one_image(1, (40, 33)), one_image(2, (20, 21))]


SLOW = ("base", "printed", "beit")


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in KINDS],
)
def folder(request, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp(request.param), request.param)


def reference(folder, dtype=torch.float32):
    """transformers' model of a folder, opened strictly; the sinusoidal table, which it leaves on
    the meta device, made again."""
    model, report = transformers.VisionEncoderDecoderModel.from_pretrained(
        folder, output_loading_info=True, dtype=dtype
    )
    assert not [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    positions = getattr(model.decoder.base_model.decoder, "embed_positions", None)
    if hasattr(positions, "weights") and positions.weights.is_meta:
        count = model.config.decoder.max_position_embeddings + positions.padding_idx + 1
        positions.weights = positions.get_embedding(
            count, positions.embedding_dim, positions.padding_idx
        ).to(dtype)
    return model.eval()


def pixels_of(folder, images=IMAGES):
    """What transformers' own processor makes of the images."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "TrOCRProcessor"
    return processor(images=list(images), return_tensors="pt").pixel_values


def batch_of(processor, texts=TEXTS, images=IMAGES):
    rows = [
        processor.encode(caption_example(f"r{i}", image, text, ""))
        for i, (image, text) in enumerate(zip(images, texts))
    ]
    return collate(rows, processor.pad_id)


def views_of(processor, images=IMAGES):
    rows = [processor.encode_image(image) for image in images]
    return collate(rows, processor.pad_id).groups


def write(model, new=10, **options):
    processor = model.processor
    return transcribe.greedy(
        model.module, views_of(processor), processor.start_ids, model.end_ids, processor.pad_id,
        new, **options,
    )  # fmt: skip


@torch.no_grad()
def test_trocr_logits_match_reference(folder):
    """Through the real processor, images that are not square, texts of unequal length;
    prefix tokens are attended to."""
    model, theirs = load(folder), reference(folder)
    batch = batch_of(model.processor)
    pixels = pixels_of(folder)
    torch.testing.assert_close(batch.groups[0].pixels, pixels, atol=1e-6, rtol=0)
    logits = theirs(pixel_values=pixels, decoder_input_ids=batch.ids).logits
    expected = logits[:, :-1][batch.scored[:, 1:]]
    found = model.module(batch)
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    prefix = 2 if "small" in str(folder) else 1
    assert model.module.encode(batch.groups).tokens.shape[1] == 16 + prefix


@torch.no_grad()
def test_trocr_loss_is_that_of_the_unshifted_labels(folder):
    """Labels are shifted once: the loss is transformers', whose labels it shifts itself."""
    model, theirs = load(folder), reference(folder)
    batch = batch_of(model.processor)
    labels = batch.ids.masked_fill(~batch.scored, -100)[:, 1:]
    expected = theirs(pixel_values=pixels_of(folder), labels=labels).loss
    assert [row[row >= 0].tolist() for row in labels] == [
        [*text_tokenizer()(text, add_special_tokens=False)["input_ids"], 2] for text in TEXTS
    ]
    losses = token_losses(model.module(batch), batch.targets)
    torch.testing.assert_close(losses.mean(), expected, atol=1e-5, rtol=0)


def test_trocr_greedy_ids_match_reference(folder):
    model, theirs = load(folder), reference(folder)
    expected = theirs.generate(pixels_of(folder), max_new_tokens=20, num_beams=1, do_sample=False)[
        :, 1:
    ].tolist()
    found = [ids for ids, _ in write(model, 20)]
    for mine, other in zip(found, expected, strict=True):
        assert mine == other[: len(mine)]
        assert set(other[len(mine) :]) <= {1}
    assert len({tuple(ids) for ids in found}) > 1


def test_trocr_beams_match_reference(folder):
    """And the log-probabilities of what they wrote are its own."""
    model, theirs = load(folder), reference(folder)
    options = dict(num_beams=3, max_new_tokens=8, length_penalty=2.0, no_repeat_ngram_size=3)
    expected = theirs.generate(pixels_of(folder), **options)[:, 1:].tolist()
    groups = views_of(model.processor)
    found = transcribe.beam(
        model.module, groups, model.processor.start_ids, model.end_ids, 1, **options
    )
    for (mine, _), other in zip(found, expected, strict=True):
        assert mine == other[: len(mine)]


@pytest.mark.parametrize("through", ["native", "reference"])
@torch.no_grad()
def test_trocr_saved_as_reference_opens_in_transformers(folder, tmp_path, through):
    model, pixels = load(folder), pixels_of(folder)
    if through == "native":
        model.save(tmp_path / "native", "native")
        model = load(tmp_path / "native")
    model.save(tmp_path / "out", "reference")
    ids = torch.tensor([[2, 40, 50]] * 3)
    before, after = (
        reference(path)(pixel_values=pixels, decoder_input_ids=ids).logits
        for path in (folder, tmp_path / "out")
    )
    torch.testing.assert_close(after, before, atol=0, rtol=0)
    states = [load_file(path / "model.safetensors") for path in (folder, tmp_path / "out")]
    assert any("encoder.pooler." in key for key in states[0])
    assert same_bits(*states)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in folder.iterdir()}


@torch.no_grad()
def test_trocr_lines_keep_their_shape_by_resized_positions(folder, tmp_path):
    """Square encoders read 16 x 72 pixels, positions as transformers resizes them; what they
    make is saved in our own layout, and refused in the published one."""
    model = load(folder).with_size((16, 72))
    batch = batch_of(model.processor)
    assert batch.groups[0].pixels.shape == (3, 3, 16, 72)
    theirs = reference(folder)
    own = {} if folder.name.startswith("beit") else {"interpolate_pos_encoding": True}
    logits = theirs(pixel_values=batch.groups[0].pixels, decoder_input_ids=batch.ids, **own).logits
    expected = logits[:, :-1][batch.scored[:, 1:]]
    torch.testing.assert_close(model.module(batch), expected, atol=1e-4, rtol=0)
    model.save(tmp_path / "native", "native")
    again = load(tmp_path / "native")
    assert again.processor.pixel_spec.size_hw == (16, 72)
    assert write(again) == write(model)
    with pytest.raises(ValueError, match="preprocessing that was changed cannot be represented"):
        model.save(tmp_path / "out", "reference")
    assert not (tmp_path / "out").exists()
    assert load(folder).processor.pixel_spec.size_hw == (32, 32)


@pytest.mark.parametrize(
    "folder",
    ["small", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("base", "beit"))],
    indirect=True,
)
def test_trocr_lines_of_other_widths_read_alone_as_in_a_batch(folder):
    """Memories of unequal length are padded and masked."""
    model = load(folder).with_size((16, 96), fit="height", patch_px=8)
    processor = model.processor
    rows = [processor.encode_image(image) for image in IMAGES]
    groups = collate(rows, 1).groups
    assert len(groups) > 1
    ends = processor.start_ids, model.end_ids, 1, 8
    together = transcribe.greedy(model.module, groups, *ends)
    for row, found in zip(rows, together, strict=True):
        ((ids, logprobs),) = transcribe.greedy(model.module, collate([row], 1).groups, *ends)
        assert ids == found[0]
        assert logprobs == pytest.approx(found[1], abs=1e-4)


@torch.no_grad()
def test_trocr_in_bf16_computes_in_it_throughout(folder, tmp_path):
    """Sinusoidal positions too, which transformers' own module keeps where and as they were."""
    model = load(folder, "bfloat16")
    batch = batch_of(model.processor).to("cpu", torch.bfloat16)
    found = model.module(batch)
    assert found.dtype == torch.bfloat16
    exact = load(folder).module(batch.to("cpu", torch.float32))
    assert (found.float() - exact).abs().mean() < 0.1 * exact.std()
    assert len(transcribe.greedy(model.module, batch.groups, [2], [2], 1, 4)) == 3


def test_trocr_ids_and_habits_come_from_the_folder(tmp_path):
    """The start id is the folder's, whatever the decoder's class says of itself."""
    write_folder(tmp_path, num_beams=4, length_penalty=2.0, max_length=12, no_repeat_ngram_size=3)
    model = load(tmp_path)
    assert (model.processor.start_ids, model.end_ids, model.processor.pad_id) == ((2,), (2,), 1)
    assert model.max_new_tokens == 11
    assert model.generation == {
        "num_beams": 4, "length_penalty": 2.0, "no_repeat_ngram_size": 3,
    }  # fmt: skip
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder_start_token_id": 0}))
    assert load(tmp_path).processor.start_ids == (0,)
    path.unlink()
    model = load(tmp_path)
    assert (model.processor.start_ids, model.generation) == ((2,), {})
    assert model.max_new_tokens == TEXT["max_position_embeddings"] - 1
    values = json.loads((tmp_path / "config.json").read_text())
    for part in (values, values["decoder"]):
        part.pop("decoder_start_token_id", None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="expected decoder_start_token_id in generation_config"):
        load(tmp_path)


def test_trocr_names_every_wrong_weight_at_once(tmp_path):
    write_folder(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["decoder.model.decoder.layers.0.fc1.weight"]
    state["surplus"] = torch.zeros(1)
    state["encoder.layernorm.weight"] = torch.zeros(5)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"(?s)layers\.0\.fc1.*surplus.*encoder\.layernorm"):
        load(tmp_path)


def test_trocr_refuses_a_decoder_alone(tmp_path):
    (tmp_path / "config.json").write_text(transformers.TrOCRConfig().to_json_string())
    with pytest.raises(ValueError, match="expected a whole model, with encoder and decoder"):
        load(tmp_path)


PUBLISHED_MILLIONS = {"small": 62, "base": 334, "large": 558}


@pytest.mark.parametrize("size", trocr.SIZES)
def test_trocr_sizes_have_the_published_parameter_counts(size):
    """Millions as arXiv 2109.10282 states them, in table 3; transformers' class without the pooling
    layer that published files lack."""
    sizes = trocr.SIZES[size]
    with torch.device("meta"):
        ours = trocr.build(size)
        theirs = transformers.VisionEncoderDecoderModel(
            transformers.VisionEncoderDecoderConfig(
                encoder=transformers.AutoConfig.for_model(**sizes.vision).to_dict(),
                decoder=transformers.TrOCRConfig(**sizes.text).to_dict(),
            )
        )
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for n, p in theirs.named_parameters() if "pooler" not in n)
    if size in PUBLISHED_MILLIONS:
        assert abs(count / 1e6 - PUBLISHED_MILLIONS[size]) < 1


def test_trocr_refuses_an_unknown_size():
    with pytest.raises(ValueError, match="'huge' is not one of small, base"):
        trocr.build("huge")
