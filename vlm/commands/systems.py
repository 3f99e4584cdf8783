"""`vlm systems`: what there is."""

from __future__ import annotations

from dataclasses import dataclass

from vlm import assets


@dataclass(frozen=True, kw_only=True)
class Systems:
    """List what can be opened, composed and fetched."""

    def run(self) -> None:
        from rich.table import Table

        from vlm import adaptors, systems, tokenizers
        from vlm.console import plain_console

        table = Table("kind", "name", "what it is")
        for name, (_, what) in systems.SYSTEMS.items():
            table.add_row("system", name, what)
        for name in tokenizers.KINDS:
            table.add_row("image tokenizer", name, tokenizers.about(name))
        for name, kind in adaptors.KINDS.items():
            table.add_row("adaptor", name, kind.__doc__.split(".")[0].replace("\n   ", ""))
        for name, asset in assets.ASSETS.items():
            table.add_row("asset", name, f"{asset.about} ({asset.megabytes} MB, {asset.licence})")
        plain_console().print(table)
