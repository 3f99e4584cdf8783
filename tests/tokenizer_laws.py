"""Laws that every kind of image tokenizer keeps, for the tests of each kind."""

import json

import numpy as np
import torch
from PIL import Image

from vlm import tokenizers
from vlm.image_tokens import ImageTokenizer, ImageTokens, map_pixels
from vlm.pixels import HALF, PixelSpec


def spec(height: int, width: int, fit: str = "stretch") -> PixelSpec:
    return PixelSpec(
        size_hw=(height, width), fit=fit, resample="bicubic", mean=HALF.mean, std=HALF.std
    )


def one_image(height: int, width: int) -> Image.Image:
    """An image whose every pixel differs from its neighbours."""
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encode(tokenizer: ImageTokenizer, image: Image.Image) -> list[ImageTokens]:
    """The tokens of each view of one image, every view alone."""
    tokenizer.eval()
    with torch.no_grad():
        views = tokenizer.pixel_spec(image)
        return [tokenizer(map_pixels(lambda view: view[None], view)) for view in views]


def check_count_is_exact(tokenizer: ImageTokenizer, image_hw: tuple[int, int]) -> None:
    """Shapes and widths told before compute are those that compute gives."""
    told = tokenizer.shapes_for(image_hw)
    given = encode(tokenizer, one_image(*image_hw))
    assert told == tuple(tokens.shape for tokens in given)
    assert tokenizer.tokens_for(image_hw) == sum(tokens.tokens.shape[1] for tokens in given)
    assert {tokens.tokens.shape[2] for tokens in given} == {tokenizer.dim}
    for tokens in given:
        assert (tokens.pooled is None) == (tokenizer.pooled_dim is None)
        if tokens.pooled is not None:
            assert tokens.pooled.shape == (1, tokenizer.pooled_dim)


def check_parts_hold_every_parameter_once(tokenizer: ImageTokenizer) -> None:
    held = [id(p) for part in tokenizer.parts().values() for p in part.parameters()]
    assert sorted(held) == sorted(id(p) for p in tokenizer.parameters())


def check_rebuilt_is_equal(tokenizer: ImageTokenizer, image_hw: tuple[int, int]) -> None:
    """Configuration through JSON and weights through a strict load give the same tokens."""
    values = json.loads(json.dumps(tokenizers.config_to_dict(tokenizer)))
    rebuilt = tokenizers.build(values)
    rebuilt.load_state_dict(tokenizer.state_dict(), strict=True)
    assert tokenizers.config_to_dict(rebuilt) == values
    image = one_image(*image_hw)
    for ours, theirs in zip(encode(rebuilt, image), encode(tokenizer, image), strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        if theirs.pooled is not None:
            assert torch.equal(ours.pooled, theirs.pooled)


def check_every_parameter_gets_a_gradient(tokenizer: ImageTokenizer) -> None:
    views = tokenizer.pixel_spec(one_image(48, 80))[:1] * 2
    stacked = (
        torch.stack(views)
        if isinstance(views[0], torch.Tensor)
        else tuple(torch.stack(tower) for tower in zip(*views))
    )
    tokens = tokenizer.train()(stacked)
    loss = tokens.tokens.square().sum()
    if tokens.pooled is not None:
        loss = loss + tokens.pooled.square().sum()
    loss.backward()
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None] == []


def check_laws(tokenizer: ImageTokenizer, image_hw: tuple[int, int] = (48, 80)) -> None:
    check_count_is_exact(tokenizer, image_hw)
    check_parts_hold_every_parameter_once(tokenizer)
    check_rebuilt_is_equal(tokenizer, image_hw)
    check_every_parameter_gets_a_gradient(tokenizer)


@torch.no_grad()
def check_order(tokenizer):
    """Tokens follow rows, then columns: changing the pixels of one patch changes its token alone.

    tokenizer: of patches of 16 pixels on 64 x 96, without blocks that mix them.
    """
    pixels = torch.zeros(1, 3, 64, 96)
    changed = pixels.clone()
    changed[:, :, 32:48, 64:80] = 1  # row 2, column 4
    moved = (tokenizer(pixels).tokens != tokenizer(changed).tokens).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [2 * 6 + 4]
