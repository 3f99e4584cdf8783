"""Learning rates that fall from a tower's last layer down to its embeddings."""

from __future__ import annotations

from torch import nn

from vlm.image_tokens import ImageTokenizer
from vlm.training.stages import StageError


def layer_rates(
    module: nn.Module, tower: str, rate: float, decay: float
) -> list[tuple[str, float]]:
    """Patterns and rates of one tower: `rate` for what lies after its layers and for the last of
    them, `decay` times that of the layer above for each one below, and once more for all before
    the first.

    tower: path of an image tokenizer or a text encoder. Its layers are the row of modules, in no
    other row, that holds most parameters: the blocks of a transformer, the stages of a net that
    shrinks its maps. Raises StageError where the rates are to fall and there is no such row, or
    several of weight (ResNet's).
    """
    if not 0 < decay <= 1:
        raise StageError(f"layer_decay must be above 0 and at most 1, found {decay}")
    if decay == 1:
        return [(f"{tower}.*", rate)]
    rows = _rows_of_layers(module, tower)
    if not rows:
        raise StageError(
            f"layer_decay {decay}: expected a row of two layers or more in {tower}, found none"
        )
    path, *others = sorted(rows, key=lambda path: -_size(module, path))
    heavy = [other for other in others if _size(module, other) > 0.1 * _size(module, path)]
    if heavy:
        raise StageError(
            f"layer_decay {decay}: expected one row of layers in {tower}, found {[path, *heavy]}; "
            "their order is not known, so give one rate to all of it (--layer-decay 1)"
        )
    layers = rows[path]
    names = _in_order(module, tower)
    first = next(i for i, name in enumerate(names) if name.startswith(layers[0]))
    rates = [(name, rate * decay ** len(layers)) for name in names[:first]]
    rates += [(f"{layer}*", rate * decay**i) for i, layer in enumerate(reversed(layers))]
    if not all(name.startswith(tuple(layers)) for name in names[first:]):
        rates.append((f"{tower}.*", rate))
    return rates


def _rows_of_layers(module: nn.Module, tower: str) -> dict[str, list[str]]:
    """Prefixes of the layers of each row of two or more in a tower that lies in no other row, by
    the row's path."""
    rows: dict[str, list[str]] = {}
    for path, row in module.get_submodule(tower).named_modules(prefix=tower):
        if isinstance(row, nn.ModuleList | nn.Sequential):
            layers = [f"{path}.{name}." for name, layer in row.named_children() if _learns(layer)]
            if len(layers) > 1 and not any(path.startswith(f"{other}.") for other in rows):
                rows[path] = layers
    return rows


def _size(module: nn.Module, path: str) -> int:
    return sum(parameter.numel() for parameter in module.get_submodule(path).parameters())


def _learns(layer: nn.Module) -> bool:
    """Whether it has parameters; what is left of a removed layer has none."""
    return next(layer.parameters(), None) is not None


def _in_order(module: nn.Module, tower: str) -> list[str]:
    """The names of a tower's parameters in the order of computation, where it knows that; else as
    they are registered."""
    root = module.get_submodule(tower)
    names = {id(parameter): name for name, parameter in root.named_parameters(prefix=tower)}
    if not isinstance(root, ImageTokenizer):
        return list(names.values())
    return [names[id(p)] for part in root.parts().values() for p in part.parameters()]
