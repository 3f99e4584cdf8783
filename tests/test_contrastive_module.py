import math

import pytest
import torch
from torch import nn

from tests import tiny
from tests.contrastive_models import IMAGES, TEXTS, model
from vlm import pooling
from vlm.families.contrastive.batch import PairBatch
from vlm.families.contrastive.module import Contrastive
from vlm.image_tokens import ViewGroup
from vlm.lora import Lora, add_lora


def batch(lengths=(5, 3, 4), T=5, size_hw=(32, 48), seed=0):
    draw = torch.Generator().manual_seed(seed)
    B = len(lengths)
    valid = torch.arange(T) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 40, (B, T), generator=draw)
    for row, length in enumerate(lengths):
        ids[row, length - 1] = 49
    pixels = torch.randn(B, 3, *size_hw, generator=draw)
    owner = torch.tensor([[b, 0, 0] for b in range(B)])
    return PairBatch(
        ids=ids.masked_fill(~valid, 0), valid=valid, names=tuple(map(str, range(B))),
        groups=(ViewGroup(pixels=pixels, owner=owner),),
    )  # fmt: skip


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("text", TEXTS)
def test_any_parts_give_unit_vectors(image, text):
    given = batch(size_hw=(64, 64) if "net" in image else (32, 48))
    embedded = model(image, text)(given)
    for vectors in embedded:
        assert vectors.shape == (3, 10)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3), atol=1e-6, rtol=0)


def test_every_parameter_but_scale_and_bias_gets_a_gradient():
    for image in ("mean", "class", "attention"):
        module = model(image).train()
        embedded = module(batch())
        (embedded.images * embedded.texts).sum().backward()
        idle = {name for name, p in module.named_parameters() if p.grad is None}
        assert idle == {"log_scale"}, image
        assert set(module.parts()) == {"tokenizer", "pool", "image_head", "text", "text_head"}


@pytest.mark.parametrize("text", TEXTS)
def test_padding_changes_no_vector_in_training_mode(text):
    module = model(text=text).train()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    given = batch()
    more = nn.functional.pad(given.ids, (0, 3)), nn.functional.pad(given.valid, (0, 3))
    vectors = module.embed_texts(given.ids, given.valid)
    torch.testing.assert_close(module.embed_texts(*more), vectors, atol=1e-5, rtol=1e-4)


def test_rows_keep_their_order_whatever_the_groups():
    module = model()
    given = batch()
    pixels, owner = given.groups[0].pixels, given.groups[0].owner
    mixed = [ViewGroup(pixels=pixels[part], owner=owner[part]) for part in ([2], [1, 0])]
    expected = module.embed_images(given.groups)
    torch.testing.assert_close(module.embed_images(mixed), expected, atol=1e-6, rtol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_images_of_other_sizes_lie_in_one_batch():
    module = model("net, mean")
    groups = [
        ViewGroup(pixels=torch.randn(1, 3, 64, 96), owner=torch.tensor([[1, 0, 0]])),
        ViewGroup(pixels=torch.randn(1, 3, 64, 64), owner=torch.tensor([[0, 0, 0]])),
    ]
    both = module.embed_images(groups)
    alone = [module.embed_images([ViewGroup(pixels=g.pixels, owner=g.owner * 0)]) for g in groups]
    torch.testing.assert_close(both, torch.cat(alone[::-1]), atol=1e-6, rtol=1e-5)


def test_views_of_a_image_are_averaged_before_they_are_normalised():
    module = model()
    pixels = torch.randn(3, 3, 32, 48)
    owner = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 1]])
    found = module.embed_images([ViewGroup(pixels=pixels, owner=owner)])
    heads = module.image_head(module.pool(module.tokenizer(pixels)))
    expected = torch.stack([heads[[0, 2]].mean(0), heads[1]])
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_logits_are_scaled_cosines_and_a_bias():
    images, texts = model()(batch())
    module = model(bias=-3.0)
    torch.testing.assert_close(module.logits(images, texts), 10 * images @ texts.T - 3)
    torch.testing.assert_close(model().logits(images, texts), 10 * images @ texts.T)


def test_scale_and_bias_are_scalars_in_fp32():
    module = model(bias=-10.0)
    for name, value in (("log_scale", math.log(10)), ("bias", -10.0)):
        parameter = module.get_parameter(name)
        assert parameter.shape == ()
        assert parameter.dtype == torch.float32
        assert parameter.item() == pytest.approx(value)
    assert model().bias is None
    assert "bias" not in dict(model().named_parameters())


def test_vectors_of_a_bf16_model_are_fp32_and_of_an_fp64_one_fp64():
    given = batch()
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        embedded = model().to(dtype)(given.to("cpu", dtype))
        assert embedded.images.dtype == embedded.texts.dtype == wide


def test_parts_that_do_not_fit_are_named():
    module = model()
    parts = dict(
        tokenizer=module.tokenizer, pool=module.pool, image_head=module.image_head,
        text=module.text, text_head=module.text_head,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"image_head: .* 24 wide, found one for 23"):
        Contrastive(**parts | {"image_head": nn.Linear(23, 10)}, scale=1.0, bias=None)
    with pytest.raises(ValueError, match=r"one width, found \{'image_head': 24, 'text_head': 10\}"):
        Contrastive(**parts | {"image_head": nn.Identity()}, scale=1.0, bias=None)
    with pytest.raises(ValueError, match="pool 'class' reads a class token"):
        Contrastive(**parts | {"pool": pooling.ClassPool()}, scale=1.0, bias=None)
    with pytest.raises(ValueError, match="at least one image, found none"):
        module.embed_images([])


def test_lora_stands_beside_both_towers():
    module = model()
    before = module(batch())
    add_lora(module, {"tokenizer": Lora(rank=2), "text": Lora(rank=2)})
    after = module(batch())
    torch.testing.assert_close(after.images, before.images)
    torch.testing.assert_close(after.texts, before.texts)
    names = {name.split(".")[0] for name, _ in module.named_parameters() if "lora_" in name}
    assert names == {"tokenizer", "text"}


def test_a_patch_convolution_alone_can_be_a_tower():
    torch.manual_seed(0)
    encoder = TEXTS["bert, class"]()
    module = Contrastive(
        tiny.Patches(), pooling.MeanPool(), nn.Linear(12, 8), encoder, nn.Linear(24, 8),
        scale=1.0, bias=None,
    )  # fmt: skip
    assert module.dim == 8
    assert module(batch(size_hw=(8, 12))).images.shape == (3, 8)
