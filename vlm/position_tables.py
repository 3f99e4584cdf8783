"""Tables of positions on a grid: made of sines, and brought from one grid to another.

Shapes: D width, h w rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def resize_table(table: Tensor, table_hw: tuple[int, int], grid_hw: tuple[int, int]) -> Tensor:
    """A table float[h * w, D] of positions on another grid, row by row: bicubic in fp32, without
    antialiasing; the table itself where the grid is its own.

    table_hw: rows and columns of the table. grid_hw: those of the result.
    Source: Qwen/Qwen-VL on the hub, `visual.py`, `get_abs_pos`.
    """
    if tuple(table_hw) == tuple(grid_hw):
        return table
    planes = table.float().T.unflatten(1, tuple(table_hw))[None]
    resized = F.interpolate(planes, size=tuple(grid_hw), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T.to(table.dtype)


def sine_table(grid_hw: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of the column, then of the row, of each cell, row by row: float32[h * w,
    width]. Wavelengths run from 2 pi to 20,000 pi cells.

    Raises ValueError for a width that is no multiple of 4.
    Source: facebookresearch/mae, `util/pos_embed.py`, `get_2d_sincos_pos_embed`.

    >>> sine_table((1, 2), 4)[:, 0]  # the sines of columns 0 and 1
    tensor([0.0000, 0.8415])
    """
    if width % 4:
        raise ValueError(f"a width of sine positions must be a multiple of 4, found {width}")
    h, w = grid_hw
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    rows, columns = torch.cartesian_prod(torch.arange(h), torch.arange(w)).float().unbind(1)
    angles = [numbers[:, None] * rates for numbers in (columns, rows)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
