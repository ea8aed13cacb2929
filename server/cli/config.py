"""`deepfew config`: every setting, its value, and where the value came from."""

from __future__ import annotations

import json
from collections.abc import Sequence

from server.cli.flags import Parser, add_settings_flags, settings_from
from server.settings.load import Leaf, leaves
from server.settings.schema import Settings


def main(argv: Sequence[str]) -> int:
    """Print the resolved settings; raises SettingsError where they cannot be resolved."""
    parser = Parser(prog="deepfew config", description=__doc__, allow_abbrev=False)
    add_settings_flags(parser, sections=section_names())
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    resolved = settings_from(arguments)
    rows = list(resolved.rows())
    if arguments.json:
        print(json.dumps({path: {"value": value, "from": origin} for path, value, origin in rows}, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("key", "value", "from", "variable", box=None, pad_edge=False)
    known: dict[str, Leaf] = {leaf.path: leaf for leaf in leaves()}
    for path, value, origin in rows:
        table.add_row(path, value, origin, known[path].variable, style=None if origin == "default" else "bold")
    console = Console()
    for column in table.columns:
        column.overflow = "fold"  # a name that is cut short cannot be copied
    if not console.is_terminal:
        console.width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.print(table)
    return 0


def section_names() -> tuple[str, ...]:
    """Sections of the settings in order of declaration."""
    return tuple(name for name in Settings.model_fields if name != "store")
