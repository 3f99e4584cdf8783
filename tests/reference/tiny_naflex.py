"""Images of any shape, and a tiny SigLIP 2 of native resolution."""

import numpy as np
import skimage.data
from PIL import Image

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "patch_size": 16,
    "num_patches": 256,
}


def images() -> dict[str, Image.Image]:
    coffee, cat = skimage.data.coffee(), skimage.data.chelsea()
    arrays = {
        "wide": coffee,
        "tall": np.ascontiguousarray(cat.transpose(1, 0, 2)),
        "square": cat[:300, :300],
        "tiny_strip": coffee[200:220, 20:320],
        "tiny_column": np.ascontiguousarray(coffee[200:220, 20:320].transpose(1, 0, 2)),
        "speck": cat[100:103, 50:57],
        "large": np.kron(coffee, np.ones((3, 3, 1), np.uint8)),
    }
    return {name: Image.fromarray(array) for name, array in arrays.items()}


IMAGES = images()
