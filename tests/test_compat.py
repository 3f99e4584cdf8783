"""Insides of other libraries are named in vlm/compat alone."""

import ast
from pathlib import Path

import pytest

VLM = Path(__file__).parent.parent / "vlm"
LIBRARIES = ("torch", "torchvision", "transformers", "timm", "open_clip", "peft", "accelerate",
             "huggingface_hub", "safetensors", "datasets")  # fmt: skip
INSIDES = (
    "transformers.masking_utils",
    "transformers.integrations",
    "transformers.modeling_layers",
    "transformers.modeling_utils",
    "transformers.modeling_attn_mask_utils",
    "transformers.image_processing_backends",
    "transformers.pytorch_utils",
    "transformers.activations",
    "transformers.cache_utils",
    "transformers.models",
    "transformers.generation",
    "torch.nn.modules",
    "open_clip.model",
    "open_clip.transformer",
    "open_clip.transform",
    "open_clip.tokenizer",
    "open_clip.timm_model",
    "open_clip.modified_resnet",
    "open_clip.utils",
    "open_clip.factory",
    "peft.tuners",
    "peft.utils",
    "accelerate.state",
    "accelerate.utils.modeling",
)
"""Modules whose names are public and that their libraries do not promise to keep."""
PYTHON = {"_replace", "_asdict", "_fields", "_make", "_exit"}
"""What Python itself documents: of named tuples, and os._exit."""


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def defined_in(source):
    """The names that a file defines, or puts on self."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if getattr(node.value, "id", "") == "self" else set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def insides_in(source, inherited=frozenset()):
    """What a file names of libraries' insides: imports, and private attributes that are neither
    defined in it nor, on self, `inherited`."""
    own, found = defined_in(source) | PYTHON, []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            known = own | inherited if getattr(node.value, "id", "") == "self" else own
            found += [] if node.attr in known else [f"line {node.lineno}: .{node.attr}"]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = getattr(node, "module", None)
            names = [f"{module}.{a.name}" if module else a.name for a in node.names]
            found += [f"line {node.lineno}: {name}" for name in names if is_inside(name)]
    return found


def is_inside(name):
    """Whether a dotted name, as imports have it, is of a library's insides."""
    parts = name.split(".")
    return parts[0] in LIBRARIES and (
        any(map(is_private, parts)) or any(f"{name}.".startswith(f"{m}.") for m in INSIDES)
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "from transformers.masking_utils import sdpa_mask",
            "transformers.masking_utils.sdpa_mask",
        ),
        ("from transformers import masking_utils", "transformers.masking_utils"),
        ("def f():\n    import torch._dynamo", "torch._dynamo"),
        ("import torch\ntorch._foreach_mul_([], 2)", "._foreach_mul_"),
        ("def f(module):\n    return module._parameters", "._parameters"),
        ("class A(Module):\n    def f(self):\n        return self._modules", "._modules"),
    ],
)
def test_insides_are_found(source, expected):
    (found,) = insides_in(source)
    assert found.endswith(f": {expected}")


@pytest.mark.parametrize(
    "source",
    [
        "from transformers import AutoModel, AttentionInterface",
        "from torch.nn.attention.varlen import varlen_attn",
        "class A:\n    def f(self):\n        self._b = 1\n        return self._b",
        "def f(pair, old):\n    return pair._replace(a=old.__class__)",
    ],
)
def test_public_names_and_own_ones_are_no_insides(source):
    assert insides_in(source) == []


@pytest.mark.slow
def test_insides_of_libraries_are_named_in_compat_alone():
    sources = {
        str(path.relative_to(VLM)): path.read_text()
        for path in VLM.rglob("*.py")
        if path.parent != VLM / "compat"
    }
    assert len(sources) > 100
    inherited = set().union(*map(defined_in, sources.values()))
    found = {path: insides_in(source, inherited) for path, source in sources.items()}
    assert {path: names for path, names in found.items() if names} == {}
