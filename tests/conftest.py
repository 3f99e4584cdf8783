import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports a hub client
if "PYTEST_XDIST_WORKER" in os.environ:  # workers, and what they launch, share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_collection_modifyitems(items):
    """GPU tests need a GPU; those of the demo weights need them fetched."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one state for a process; no test leaves its own to the next."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def few_lines(tmp_path_factory):
    """Python's own documentation takes seconds to read: tests of drawn lines take one module of
    it."""
    from pathlib import Path

    from vlm.data.synthetic import text

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        nowhere = str(Path(text.__file__).parent / "nothing")
        patch.setattr(text.sysconfig, "get_path", lambda _: nowhere)
        text.documentation.cache_clear()
        yield
    text.documentation.cache_clear()
