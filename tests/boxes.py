"""Random boxes, and published answers that hold boxes."""

import numpy as np
import pytest

from vlm.geometry import Resize

STRETCH = Resize((300, 451), (224, 336), (336 / 451, 224 / 300), (0.0, 0.0))
CROP = Resize((400, 600), (224, 160), (336 / 600, 0.56), (-88.0, 0.0))
PAD = Resize((451, 300), (384, 384), (255 / 300, 384 / 451), (64.0, 0.0))
RECORDS = pytest.mark.parametrize("record", [STRETCH, CROP, PAD], ids=["stretch", "crop", "pad"])


def random_boxes(hw, n=50):
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, 1, (n, 2, 2)), axis=1) * np.array(hw[::-1])
    return corners.reshape(n, 4)
