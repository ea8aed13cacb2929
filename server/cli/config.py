"""`deepfew config`: every setting, its value, and where the value came from."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from extractor.cli.options import JsonOption
from server.cli.flags import SECTIONS, with_settings
from server.settings.load import Resolved, leaves


@with_settings(*SECTIONS)
def config(resolved: Resolved, *, as_json: JsonOption = False) -> None:
    """Show every setting, its value and where it came from."""
    rows = list(resolved.rows())
    if as_json:
        print(json.dumps({path: {"value": value, "from": origin} for path, value, origin in rows}, indent=2))
        return
    table = Table("key", "value", "from", "variable", box=None, pad_edge=False)
    variables = {leaf.path: leaf.variable for leaf in leaves()}
    for path, value, origin in rows:
        table.add_row(path, value, origin, variables[path], style=None if origin == "default" else "bold")
    console = Console()
    for column in table.columns:
        column.overflow = "fold"  # a name that is cut short cannot be copied
    if not console.is_terminal:
        console.width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.print(table)
