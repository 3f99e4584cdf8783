import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports a hub client

import pytest


def pytest_collection_modifyitems(items):
    """GPU tests need a GPU; those of the demo weights need them fetched."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
