"""`deepfew doctor`: this machine's faults for serving, each with what to do.

Invariant: standard output carries the report alone, as a table or, with --json, as one JSON object.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from extractor.cli.options import JsonOption

COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


def doctor(
    store: Annotated[
        Path | None,
        typer.Argument(metavar="STORE", help="Store that is to be served: memory and disk are looked at for it."),
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Say what of this machine is wrong for serving, and what to do. The exit status is 1 if there is an error."""
    from server.machine.versions import Finding, examine_versions

    findings = list(examine_versions())
    try:
        from server.machine.checks import examine
    except (ImportError, OSError) as error:  # a library that is missing, or one that misses a shared object
        findings.append(Finding("imports", "error", str(error), "install deepfew again; the other checks need them"))
    else:
        findings += examine(store)
    counts = {status: sum(one.status == status for one in findings) for status in COLOURS}
    if as_json:
        print(json.dumps({"findings": [asdict(one) for one in findings], **counts}))
    else:
        table = Table("", "subject", "found", "what to do", box=None, pad_edge=False)
        for one in findings:
            table.add_row(f"[{COLOURS[one.status]}]{one.status}[/]", one.subject, one.found, one.remedy)
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
        console.print(table)
    return 1 if counts["error"] else 0
