"""Names the sub-modules of a library's backbone, in the order of computation.

Freezing and sharding address an image tokenizer by parts. A library may hold parameters at the
root of its backbone (a class token, a position table): these join the part that uses them first
in a `LooseParts`, so that the parts together hold every parameter exactly once. A part that is a
`LooseParts` is a view made for naming: sharding leaves its parameters to the whole tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


class LooseParts(nn.Module):
    """Sub-modules and parameters of another module under one name; never run, never saved."""

    def __init__(self, members: Mapping[str, nn.Module | nn.Parameter]) -> None:
        super().__init__()
        for path, member in members.items():
            name = path.replace(".", "_")
            if isinstance(member, nn.Parameter):
                self.register_parameter(name, member)
            else:
                self.add_module(name, member)


def named_parts(root: nn.Module, order: Mapping[str, tuple[str, ...]]) -> dict[str, nn.Module]:
    """The parts of `root` by name, in the order of `order`.

    order: name of a part -> dotted paths of its sub-modules and parameters. A path that is absent,
        None or without parameters is skipped. A name whose only path leads to a ModuleList or
        Sequential gives one part for each child: "blocks.0", "blocks.1", ...
    Raises ValueError naming the parameters of `root` that no part or two parts hold.
    """
    parts: dict[str, nn.Module] = {}
    for name, paths in order.items():
        found = {path: _member(root, path) for path in paths}
        found = {path: member for path, member in found.items() if _holds_parameters(member)}
        if len(found) == 1:
            (member,) = found.values()
            if isinstance(member, (nn.ModuleList, nn.Sequential)):
                for index, child in member.named_children():
                    if _holds_parameters(child):
                        parts[f"{name}.{index}"] = child
            elif isinstance(member, nn.Parameter):
                parts[name] = LooseParts(found)
            else:
                parts[name] = member
        elif found:
            parts[name] = LooseParts(found)
    held = [id(parameter) for part in parts.values() for parameter in part.parameters()]
    wrong = [name for name, p in root.named_parameters() if held.count(id(p)) != 1]
    if wrong:
        raise ValueError(f"parameters held by no part or by several: {wrong}")
    return parts


def registration_order(root: nn.Module) -> dict[str, tuple[str, ...]]:
    """An order for `named_parts` from how `root` registers its children, for backbones of many
    classes: the root's own parameters and its first child are "embed", each other child is a part,
    lists and sequences of children one part for each."""
    own = tuple(name for name, _ in root.named_parameters(recurse=False))
    children = [name for name, child in root.named_children() if _holds_parameters(child)]
    first = _member(root, children[0]) if children else None
    if own and not isinstance(first, (nn.ModuleList, nn.Sequential)):
        return {"embed": (*own, *children[:1])} | {name: (name,) for name in children[1:]}
    return ({"embed": own} if own else {}) | {name: (name,) for name in children}


def _member(root: nn.Module, path: str) -> nn.Module | nn.Parameter | None:
    member = root
    for name in path.split("."):
        member = getattr(member, name, None)
    return member


def _holds_parameters(member: nn.Module | nn.Parameter | None) -> bool:
    if member is None or isinstance(member, nn.Parameter):
        return member is not None
    return any(True for _ in member.parameters())
