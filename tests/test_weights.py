"""Files of weights as they are written."""

import os

from torch import nn

from vlm.weights import save_weights


def test_weights_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        save_weights(nn.Linear(2, 2), tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640
