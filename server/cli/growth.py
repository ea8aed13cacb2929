"""The commands `grow` and `shrink`, as functions that a typer application mounts.

Invariant: standard output carries the result alone, as text or, with --json, as one JSON object; a GrowthError and its
like are raised, for the application to print.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expert_store.manifest import read_manifest
from extractor.cli.options import DryRunOption, JsonOption
from extractor.planning.sizes import parse_size
from server.growth.status import GrowthError

if TYPE_CHECKING:
    from extractor.statistics.statistics import ExpertStatistics


GrownStore = Annotated[Path, typer.Argument(metavar="STORE", help="Store to change; it may be being served.")]
UsageOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Usage file with the demand; by default the store's usage.json.")
]
NormsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Statistics, for the size of outputs; by default those that servers collected."),
]


def grow(
    store: GrownStore,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="CHECKPOINT", help="Its checkpoint; by default the one it was extracted from."),
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Number of deep experts to add.")] = 1,
    budget: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="Most bytes of all shards together, such as 12GiB."),
    ] = None,
    usage: UsageOption = None,
    stats: NormsOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add the missing deep experts in most demand. A running server uses them after a reload, or after a restart."""
    from server.growth.ranking import wanted_growth
    from server.growth.store import grow_store, unfinished_growth

    path = store / "usage.json" if usage is None else usage
    begun = unfinished_growth(store)
    if begun:  # it must be finished first, whatever the present demand is
        added, location = begun, read_manifest(store).source.location
        reasons = ["a growth that was broken off is finished first"] * len(begun)
    else:
        chosen, location = wanted_growth(store, path, _statistics(stats, store), budget, count)
        added, reasons = [one.experts for one in chosen], [one.reason for one in chosen]
    if not dry_run:
        grow_store(store, source or location, added)
    if as_json:
        items = [{"experts": list(experts), "reason": why} for experts, why in zip(added, reasons, strict=True)]
        print(json.dumps({"store": str(store), "added": items, "dry_run": dry_run}))
    else:
        print(f"{store}: {'would add' if dry_run else 'added'} {_counted(len(added))}")
        for why in reasons:
            print(f"  {why}")


def shrink(
    store: GrownStore,
    count: Annotated[
        int | None, typer.Option(metavar="N", help="Remove this many deep experts, those in least demand.")
    ] = None,
    deep: Annotated[str | None, typer.Option(metavar="INDICES", help="Remove these, by index, such as 3,7.")] = None,
    usage: UsageOption = None,
    stats: NormsOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Remove deep experts. A running server adopts the change after a reload, or after a restart.

    Without --count and --deep, remove the files that an earlier shrinking could not delete.
    """
    from expert_store.shrink import without
    from extractor.writing.shrink import shrink_store, tidy
    from server.growth.ranking import rank_held, usage_of

    if count is not None and deep is not None:
        raise GrowthError("--count and --deep contradict each other: give one of them")
    manifest = read_manifest(store)
    indices = _indices(deep) if deep is not None else []
    if count is not None:
        if count < 1:
            raise GrowthError(f"--count is {count}, wanted at least 1")
        ledger = usage_of(manifest, store / "usage.json" if usage is None else usage)
        indices = [one.index for one in rank_held(manifest, ledger.demand_mass, _statistics(stats, store))[:count]]
    if dry_run:
        without(manifest, indices)
        freed = None
    else:
        if indices:
            shrink_store(store, indices)
        freed = tidy(store)
    gone = [one for one in manifest.deep_experts if one.index in set(indices)]
    if as_json:
        removed = [{"index": one.index, "file": one.file, "bytes": one.bytes} for one in gone]
        print(json.dumps({"store": str(store), "removed": removed, "freed_bytes": freed, "dry_run": dry_run}))
        return
    print(f"{store}: {'would give' if dry_run else 'gave'} up {_counted(len(gone))}")
    for one in gone:
        print(f"  {one.file}")
    if not dry_run and freed is None:
        print(
            "  the files stay while somebody reads the store: tell the server (POST /experts/reload), or run this again"
        )
    elif not dry_run:
        print(f"  freed {freed} bytes")


def _counted(count: int) -> str:
    return "1 deep expert" if count == 1 else f"{count} deep experts"


def _indices(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise GrowthError(f"--deep is {text!r}, wanted indices joined by commas, such as 3,7")
    return [int(part) for part in parts]


def _statistics(path: Path | None, store: Path) -> ExpertStatistics | None:
    if path is None:
        from server.engine.snapshots import served_statistics

        return served_statistics(store, read_manifest(store).source.fingerprint)
    from extractor.statistics.file import read_statistics

    return read_statistics(path)
