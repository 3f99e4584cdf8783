"""Native-resolution tokens and pixels equal those of transformers' Siglip2, which pads and masks a
whole batch where ours groups images by shape: on tall, wide, square, tiny and large images
together, at the real patch size and position table."""

import copy

import numpy as np
import pytest
import torch
import transformers
from transformers.models.siglip2.image_processing_siglip2 import (
    get_image_size_for_max_num_patches,
)

from tests.reference.tiny_naflex import IMAGES, TINY
from vlm.pixels import from_transformers
from vlm.pixels.spec import box_of_patches
from vlm.tokenizers.naflex import NaflexTokenizer, patchify

BACKENDS = pytest.mark.parametrize("name", ["Siglip2ImageProcessor", "Siglip2ImageProcessorPil"])


@pytest.mark.parametrize("patch_px", [14, 16])
@pytest.mark.parametrize("count", [64, 131, 256, 1024])
def test_sides_equal_transformers_for_every_size(count, patch_px):
    """The search for the scale ends where transformers' own ends, at every tie."""
    processor = transformers.Siglip2ImageProcessor(max_num_patches=count, patch_size=patch_px)
    spec = from_transformers(processor)
    dice = np.random.default_rng(count)
    sizes = [*dice.integers(1, 4000, (150, 2)).tolist(), [1, 1], [1, 9000], [16, 16], [480, 640]]
    sizes += [[side * a, side * b] for side in (7, 16, 100) for a, b in [(1, 1), (3, 4), (16, 9)]]
    for H, W in sizes:
        theirs = get_image_size_for_max_num_patches(H, W, patch_px, count)
        assert spec.view_sizes((H, W)) == (theirs,)
        assert theirs[0] * theirs[1] <= count * patch_px**2


@BACKENDS
@pytest.mark.parametrize("count", [256, 100])
@pytest.mark.parametrize("image", IMAGES.values(), ids=list(IMAGES))
def test_pixels_equal_the_processors(image, count, name):
    """Greatest difference before normalising: 0 grey levels, on both backends."""
    processor = getattr(transformers, name)(max_num_patches=count)
    spec = from_transformers(processor)
    raw = processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
    normalised = processor(image, return_tensors="pt")
    levels = spec.resize_u8(image)
    patches = patchify(levels[None], 16)[0]
    L = len(patches)
    assert tuple(levels.shape[1:]) == tuple(16 * raw.spatial_shapes[0].numpy())
    assert normalised.pixel_attention_mask[0].tolist() == [1] * L + [0] * (count - L)
    assert int((patches.int() - raw.pixel_values[0, :L].round().int()).abs().max()) == 0
    ours = patchify(spec(image)[0][None], 16)[0]
    torch.testing.assert_close(ours, normalised.pixel_values[0, :L], rtol=0, atol=1e-6)


def test_budget_is_the_folders_where_the_joint_processor_takes_its_own(tmp_path):
    """transformers' Siglip2Processor calls its image processor with 256, whatever the folder says;
    ours reads the folder, and equals it where it is told the number."""
    transformers.Siglip2ImageProcessor(max_num_patches=64).save_pretrained(tmp_path)
    transformers.Siglip2Tokenizer().save_pretrained(tmp_path)
    image_processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    joint = transformers.Siglip2Processor(
        image_processor=image_processor,
        tokenizer=transformers.Siglip2Tokenizer.from_pretrained(tmp_path),
    )
    assert joint(images=IMAGES["wide"], return_tensors="pt").pixel_values.shape[1] == 256
    told = joint(images=IMAGES["wide"], max_num_patches=64, return_tensors="pt")
    spec = from_transformers(image_processor)
    assert spec.max_patches == 64
    ours = patchify(spec(IMAGES["wide"])[0][None], 16)[0]
    torch.testing.assert_close(ours, told.pixel_values[0, : len(ours)], rtol=0, atol=1e-6)


def reference_tower() -> transformers.Siglip2VisionModel:
    torch.manual_seed(0)
    config = transformers.Siglip2VisionConfig(**TINY)
    tower = transformers.Siglip2VisionModel._from_config(config, attn_implementation="sdpa").eval()
    for parameter in tower.parameters():  # biases and norms start at 0 and 1: move them
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return tower


@BACKENDS
@pytest.mark.parametrize("count", [256, 400])
def test_tokens_and_pooled_equal_the_padded_and_masked_batch(count, name):
    """All images in one padded batch of transformers, each alone in ours: 1e-5 in fp32."""
    tower = reference_tower()
    processor = getattr(transformers, name)(max_num_patches=count)
    batch = processor(list(IMAGES.values()), return_tensors="pt")
    assert batch.pixel_values.shape[:2] == (len(IMAGES), count)
    spec = from_transformers(processor)
    options = {"layer": -1, "norm": True, "pooled": True}
    tokenizer = NaflexTokenizer(copy.deepcopy(tower), spec, **options).eval()
    with torch.no_grad():
        theirs = tower(**batch)
        for b, image in enumerate(IMAGES.values()):
            ours = tokenizer(torch.stack(spec(image)))
            L = ours.tokens.shape[1]
            assert int(batch.pixel_attention_mask[b].sum()) == L
            assert list(ours.grid_hw) == batch.spatial_shapes[b].tolist()
            states = theirs.last_hidden_state[b, :L]
            torch.testing.assert_close(ours.tokens[0], states, rtol=0, atol=1e-5)
            torch.testing.assert_close(ours.pooled[0], theirs.pooler_output[b], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 2])
def test_layers_equal_hidden_states(layer):
    tower = reference_tower()
    processor = transformers.Siglip2ImageProcessor()
    batch = processor([IMAGES["wide"], IMAGES["tiny_column"]], return_tensors="pt")
    spec = from_transformers(processor)
    options = {"layer": layer, "norm": False, "pooled": False}
    tokenizer = NaflexTokenizer(copy.deepcopy(tower), spec, **options).eval()
    with torch.no_grad():
        states = tower(**batch, output_hidden_states=True).hidden_states[layer]
        for b, image in enumerate([IMAGES["wide"], IMAGES["tiny_column"]]):
            ours = tokenizer(torch.stack(spec(image))).tokens[0]
            torch.testing.assert_close(ours, states[b, : len(ours)], rtol=0, atol=1e-5)


def test_gradients_equal_the_padded_and_masked_batch():
    """Positions are resized once for all views of a group, and still learn from each of them."""
    tower = reference_tower()
    processor = transformers.Siglip2ImageProcessor(max_num_patches=40)
    images = [IMAGES["wide"], IMAGES["wide"].rotate(180), IMAGES["tall"]]
    spec = from_transformers(processor)
    options = {"layer": -1, "norm": True, "pooled": True}
    tokenizer = NaflexTokenizer(copy.deepcopy(tower), spec, **options)
    tower(**processor(images, return_tensors="pt")).pooler_output.square().sum().backward()
    pixels = [spec(image)[0] for image in images]
    both, other = tokenizer(torch.stack(pixels[:2])), tokenizer(pixels[2][None])
    (both.pooled.square().sum() + other.pooled.square().sum()).backward()
    for (key, ours), theirs in zip(tokenizer.backbone.named_parameters(), tower.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=key)


def test_box_of_patches_is_what_the_spec_reads():
    processor = transformers.Siglip2ImageProcessor(max_num_patches=1000)
    assert from_transformers(processor).size_hw == box_of_patches(1000, 16) == (400, 640)
