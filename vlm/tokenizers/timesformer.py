"""TimeSformer as an encoder of images, each a video of one frame.

Its attention over time then sees one token alone, and of its time embeddings the first is kept, the
one that transformers takes for one frame. Tokens are those of each frame by itself: what the
encoder knows of motion is not used. Videos of more frames are refused.

Source: transformers, `models/timesformer/modeling_timesformer.py`.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import TimesformerConfig


def take_one_frame(backbone: nn.Module) -> None:
    """Makes a TimesformerModel one of single frames, in place: its layers divide their tokens by
    `num_frames`, and its embeddings take the nearest of the time embeddings."""
    backbone.config.num_frames = 1
    times = getattr(backbone.embeddings, "time_embeddings", None)
    if times is not None:  # attention of type "space_only" has none
        first = times[:, :1].detach().clone()
        backbone.embeddings.time_embeddings = nn.Parameter(first, times.requires_grad)


def one_frame_videos(config: TimesformerConfig, pixels: Tensor) -> Tensor:
    """Images float[V, 3, H, W] as videos of one frame, float[V, 1, 3, H, W].

    Raises ValueError for videos, and for pixels on which the encoder would misplace its positions
    in silence, or fail: it tells grids apart by their number of patches alone, and divides that
    number by the columns of the grid that it was made for.
    """
    if pixels.ndim != 4:
        raise ValueError(
            "TimeSformer as an image tokenizer takes images, float[V, 3, H, W], found "
            f"{tuple(pixels.shape)}: give the frames of a video as images"
        )
    side, patch = config.image_size // config.patch_size, config.patch_size
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    same_count = rows * columns == side * side
    if (rows, columns) != (side, side) and (same_count or rows * columns % side or columns == 1):
        raise ValueError(
            f"TimeSformer made for {side} × {side} patches takes these, or another multiple of "
            f"{side} patches in two columns or more, found {rows} × {columns}"
        )
    return pixels[:, None]
