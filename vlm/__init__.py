"""Vision-language models of every family, built from shared image tokenizers.

`vlm.load(folder_or_hub_id)` opens a model; `vlm.build(...)` composes one from pretrained parts;
`vlm.systems` lists what can be opened. Nothing heavy is imported before it is used.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["build", "load", "systems"]

_LAZY = {"load": "vlm.systems", "build": "vlm.systems"}


def __getattr__(name: str):
    if name in _LAZY:
        import_module("vlm.compat.versions").warn_untested()  # ahead of what may fail for it
        return getattr(import_module(_LAZY[name]), name)
    if name == "systems":
        return import_module("vlm.systems")
    raise AttributeError(f"module 'vlm' has no attribute {name!r}")
