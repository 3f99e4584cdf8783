"""Donut beside transformers' classes: tiny random folders, pages that are not square."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.reference.tiny_donut import MBART, SWIN, write_folder
from tests.reference.tiny_trocr import load
from tests.tiny import image as one_image
from tests.tokenizer_laws import check_laws, spec
from vlm.data.example import caption_example
from vlm.families.decoder_only.batch import collate
from vlm.families.encoder_decoder import generate as transcribe
from vlm.ocr import tagged_text
from vlm.pixels import from_transformers
from vlm.systems import donut
from vlm.tokenizers.transformers import TransformersConfig, build
from vlm.weights import same_bits

IMAGES = [one_image(0, (70, 41)), one_image(1, (30, 200)), one_image(2, (52, 52))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("donut"))


def reference(folder):
    model, report = transformers.VisionEncoderDecoderModel.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    return model.eval()


def pixels(folder):
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return processor(images=list(IMAGES), return_tensors="pt").pixel_values


def views(processor, prompt=None):
    return collate([processor.encode_image(p, prompt) for p in IMAGES], processor.pad_id)


SIZES_HW = [(70, 41), (41, 70), (10, 200), (300, 9), (64, 48), (48, 64), (52, 52), (63, 47)]
BOXES = [{"height": 64, "width": 48}, {"height": 40, "width": 90}, [48, 64]]


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("size", BOXES)
@pytest.mark.parametrize("turn", [False, True])
def test_donut_pixels_match_reference(backend, size, turn):
    """Pages and images of every aspect, turned or not; a list is (width, height)."""
    name = "DonutImageProcessor" + ("Pil" if backend == "pil" else "")
    image_processor = getattr(transformers, name)(size=size, do_align_long_axis=turn)
    spec = from_transformers(image_processor)
    if isinstance(size, list):
        assert spec.size_hw == (64, 48)
    for number, size_hw in enumerate(SIZES_HW):
        image = one_image(number, size_hw)
        expected = image_processor(image, return_tensors="pt").pixel_values[0]
        (found,) = spec(image)
        assert spec.view_sizes(size_hw) == (tuple(found.shape[1:]),)
        torch.testing.assert_close(found, torch.as_tensor(expected), atol=1e-5, rtol=0)


@torch.no_grad()
def test_donut_logits_match_reference(folder):
    """Through the real processor; the second stage's grid is padded to windows."""
    model, theirs = load(folder), reference(folder)
    processor = model.processor
    texts = ["<s_menu>tea</s_menu>", "pie", "<s_sum>3<sep/>4</s_sum>"]
    batch = collate(
        [
            processor.encode(caption_example(f"r{i}", image, text, "<s_cord-v2>"))
            for i, (image, text) in enumerate(zip(IMAGES, texts))
        ],
        processor.pad_id,
    )
    start = processor.start_ids[0]
    assert batch.ids[:, 0].tolist() == [start] * 3  # the prompt is the start: it stands there once
    assert start not in batch.ids[:, 1:]
    torch.testing.assert_close(batch.groups[0].pixels, pixels(folder), atol=1e-6, rtol=0)
    logits = theirs(pixel_values=pixels(folder), decoder_input_ids=batch.ids).logits
    expected = logits[:, :-1][batch.scored[:, 1:]]
    torch.testing.assert_close(model.module(batch), expected, atol=1e-4, rtol=0)
    assert model.module.tokenizer.shapes_for((9, 9))[0].grid_hw == (8, 6)


def test_donut_greedy_ids_match_reference(folder):
    """Prompts stand in place of the start id; <unk> is never written."""
    model, theirs = load(folder), reference(folder)
    assert model.banned == (3,)
    processor = model.processor
    prompt = processor.prompt_ids("<s_cord-v2><s_menu>")
    assert len(prompt) == 2
    expected = theirs.generate(
        pixels(folder), decoder_input_ids=torch.tensor([prompt] * 3), max_new_tokens=20,
        do_sample=False, bad_words_ids=[[3]],
    )[:, 2:].tolist()  # fmt: skip
    batch = views(processor, "<s_cord-v2><s_menu>")
    found = transcribe.greedy(
        model.module, batch.groups, processor.start_ids, model.end_ids, processor.pad_id, 20,
        prompts=batch.ids.tolist(), banned=model.banned,
    )  # fmt: skip
    assert len({tuple(ids) for ids, _ in found}) > 1
    for (mine, _), other in zip(found, expected, strict=True):
        assert mine == other[: len(mine)]
        assert set(other[len(mine) :]) <= {1}


def test_donut_prompt_takes_places_from_what_is_written(folder):
    """Where nothing is said of lengths, prompt and text fill the decoder's places together."""
    model = load(folder)
    prompts = ["<s_cord-v2>", "<s_cord-v2><s_menu><s_nm><s_sum>"]
    for prompt in prompts:
        (written,) = model.generate(IMAGES[:1], [prompt])
        room = MBART["max_position_embeddings"] + 1 - len(model.processor.prompt_ids(prompt))
        assert 1 <= len(written.ids) <= room
    with pytest.raises(ValueError, match="40 positions, 4 ids to begin with leave 37, found 39"):
        model.generate(IMAGES[:1], prompts[1:], max_new_tokens=39)


@pytest.mark.parametrize("through", ["native", "reference"])
def test_donut_saved_as_reference_opens_in_transformers(folder, tmp_path, through):
    model = load(folder)
    if through == "native":
        model.save(tmp_path / "native", "native")
        model = load(tmp_path / "native")
        assert model.processor.prompt_starts
        assert model.banned == (3,)
    model.save(tmp_path / "out", "reference")
    reference(tmp_path / "out")
    states = [load_file(path / "model.safetensors") for path in (folder, tmp_path / "out")]
    assert same_bits(*states)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in folder.iterdir()}


@torch.no_grad()
def test_donut_reads_pages_of_other_sizes_in_any_order(folder):
    """transformers' windows, once shrunk for a small page, stay so for large ones; ours do not."""
    model = load(folder)
    small, large = model.with_size((32, 32)), model.with_size((64, 96))
    before = large.module.encode(views(large.processor).groups).tokens
    assert before.shape[1] == 8 * 12
    small.module.encode(views(small.processor).groups)
    after = large.module.encode(views(large.processor).groups).tokens
    assert torch.equal(before, after)
    with pytest.raises(ValueError, match=r"need pixels of at least 32 a side, found \(24, 64\)"):
        model.with_size((24, 64))


def test_donut_writes_json_as_transformers_does(folder):
    theirs = transformers.AutoProcessor.from_pretrained(folder)
    categories = set(theirs.tokenizer.get_added_vocab())
    for text in (
        "<s_menu><s_nm>tea</s_nm><sep/><s_nm>pie</s_nm></s_menu><s_sum>3</s_sum>",
        "<s_menu><s_nm>tea</s_nm><s_sum>1</s_sum></s_menu>",
        "<s_sum>3<sep/> 4 </s_sum>",
        "<s_sum><yes/></s_sum>",
        "<s_sum>cut off <s_nm>tea</s_nm>",
        "<s_nm></s_nm>",
        "plain text",
        "",
    ):
        assert tagged_text.to_json(text, categories) == theirs.token2json(text), text


def test_donut_reads_json_of_ids(folder):
    processor = load(folder).processor
    text = "<s_menu><s_nm>tea</s_nm><sep/><s_nm>pie</s_nm></s_menu><s_sum>3</s_sum>"
    ids = [*processor.text_ids(text), 2]
    assert tagged_text.read_json(processor, ids) == {
        "menu": [{"nm": "tea"}, {"nm": "pie"}],
        "sum": "3",
    }


def test_donut_preprocessing_follows_the_folder(tmp_path):
    """What the folder says of mean, turning and size."""
    write_folder(tmp_path, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_align_long_axis=True)
    spec = load(tmp_path).processor.pixel_spec
    assert (spec.mean, spec.turn, spec.fit) == ((0.5,) * 3, True, "page")
    torch.testing.assert_close(
        torch.stack([spec(image)[0] for image in IMAGES]), pixels(tmp_path), atol=1e-5, rtol=0
    )
    path = tmp_path / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"]["do_thumbnail"] = False
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="do_thumbnail must be True, found False"):
        load(tmp_path)


def test_donut_size_has_the_parameter_count_of_transformers_class():
    sizes = donut.SIZES["base"]
    with torch.device("meta"):
        ours = donut.build("base")
        theirs = transformers.VisionEncoderDecoderModel(
            transformers.VisionEncoderDecoderConfig(
                encoder=transformers.AutoConfig.for_model(**sizes.vision).to_dict(),
                decoder=transformers.MBartConfig(**sizes.text).to_dict(),
            )
        )
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert round(count / 1e6) == 202
    assert ours.tokenizer.tokens_for((100, 100)) == 80 * 60
    with pytest.raises(ValueError, match="'large' is not one of base"):
        donut.build("large")


@pytest.mark.parametrize(
    ("layer", "grid_hw", "width"), [(-1, (5, 7), 32), (1, (5, 7), 32), (0, (9, 13), 16)]
)
def test_donut_swin_keeps_the_laws_on_non_square_pixels(layer, grid_hw, width):
    """Patches and windows that pixels do not fill; stages that are cut off."""
    config = TransformersConfig(
        vision_config=SWIN | {"model_type": "donut-swin"}, layer=layer, prefix="drop", norm=False,
        pooled=False, pixel_spec=spec(34, 50),
    )  # fmt: skip
    tokenizer = build(config)
    assert tokenizer.shapes_for((5, 5))[0].grid_hw == grid_hw
    assert tokenizer.dim == width
    check_laws(tokenizer)
