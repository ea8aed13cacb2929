"""The commands `extract`, `inspect` and `verify`, as functions that a typer application mounts.

Invariant: standard output carries the result alone, as text or, with --json, as one JSON object; progress and warnings
go to standard error; an ExtractError or StoreError is raised, for the application to print.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from expert_store.manifest import expert_bits, expert_encodings, read_manifest
from extractor.checkpoint.checkpoint import Checkpoint, resolve_checkpoint
from extractor.cli.options import (
    BudgetOption,
    CountOption,
    DryRunOption,
    ExpertsDtypeOption,
    JsonOption,
    KeepOption,
    StoreArgument,
    TrunkDtypeOption,
)
from extractor.cli.progress import progress_bar
from extractor.encoding.importance import Importance
from extractor.encoding.names import ExpertsDtype
from extractor.errors import SelectionError
from extractor.planning.plan import Plan, read_plan
from extractor.planning.selection import SelectionRequest
from extractor.planning.sizes import format_size
from extractor.statistics.file import read_statistics
from extractor.statistics.statistics import StatisticsError, merge_all
from extractor.writing.extract import Extraction
from extractor.writing.inspection import print_summary, store_summary
from extractor.writing.prepare import prepare
from extractor.writing.verify import compared_bytes, open_comparison, verify_store


def extract(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="Directory in the Hugging Face layout, or a hub name (owner/name)."),
    ],
    store: Annotated[
        Path, typer.Argument(metavar="STORE", help="Directory of the store: new, empty, half-made, or one to grow.")
    ],
    experts: Annotated[
        str | None, typer.Option(metavar="EXPERTS", help="Expert ids to take in every layer, such as 0-7,12.")
    ] = None,
    count: CountOption = None,
    keep: KeepOption = None,
    budget: BudgetOption = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plan file: for each deep expert the expert of every layer.")
    ] = None,
    experts_dtype: ExpertsDtypeOption = None,
    trunk_dtype: TrunkDtypeOption = None,
    stats: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Statistics from `deepfew calibrate`: experts that are made smaller err least where "
            "activations are large.",
        ),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Slice a checkpoint into a store of deep experts. Takes everything unless told otherwise; always all layers.

    Killed at any moment, the same command continues. On a finished store a larger selection adds to it.
    """
    started = time.monotonic()
    planned = None if plan is None else read_plan(plan)
    request = SelectionRequest(experts=experts, count=count, keep=keep, budget_bytes=budget, plan=planned)
    opened = resolve_checkpoint(checkpoint)
    for ignored in opened.ignored:
        print(f"WARNING: ignored {ignored}", file=sys.stderr)
    importance = None if not stats else importance_for(opened, stats)
    work = prepare(opened, store, request, dtype_for(experts_dtype, planned), importance, trunk_dtype)
    for note in work.notes:
        print(f"NOTE: {note}", file=sys.stderr)
    if not work.is_finished:
        work.check_text()
    result = _described(work) | {"prepare_seconds": time.monotonic() - started}
    if dry_run:
        result["status"] = "dry run"
        work.check_disk()
    elif work.is_finished:
        result["status"] = "nothing to do"
        work.run()
    else:
        started = time.monotonic()
        with progress_bar("extracting", work.remaining_bytes, quiet=as_json) as bar:
            work.run(bar.advance)
        result["status"] = "extracted"
        result["write_seconds"] = time.monotonic() - started
    print(json.dumps(result) if as_json else _sentence(result))


def _described(work: Extraction) -> dict[str, Any]:
    return {
        "store": str(work.target),
        "family": work.model.family,
        "num_layers": work.model.num_layers,
        "num_experts": work.model.num_experts,
        "num_deep_experts": len(work.selection.deep_experts),
        "num_deep_experts_before": work.num_existing,
        "encodings": expert_encodings(work.layers),
        "made": None if work.made is None else asdict(work.made),
        "expert_bits": expert_bits(work.layers),
        "notes": work.notes,
        "alignment": work.selection.alignment.kind,
        "trunk_bytes": work.trunk_bytes,
        "total_bytes": work.total_bytes,
        "written_bytes": work.remaining_bytes,
    }


def importance_for(checkpoint: Checkpoint, stats: Sequence[Path]) -> Importance:
    """The weights of errors by input channel. Raises StatisticsError, or ExtractError if the statistics have none."""
    statistics = merge_all(read_statistics(path) for path in stats)
    if statistics.fingerprint != checkpoint.fingerprint:
        raise StatisticsError(
            f"--stats are of the checkpoint {statistics.fingerprint}, this one is {checkpoint.fingerprint}: calibrate "
            "on it"
        )
    if statistics.channels is None:
        raise StatisticsError(
            "--stats say nothing of input channels, as those of a server or an older deepfew: write them with "
            "`deepfew calibrate`"
        )
    return Importance.of(statistics.channels)


def dtype_for(experts_dtype: ExpertsDtype | None, plan: Plan | None) -> ExpertsDtype | None:
    """The choice of the option or of the plan. Raises SelectionError if they contradict each other."""
    planned = None if plan is None else plan.experts_dtype
    if None not in (experts_dtype, planned) and experts_dtype != planned:
        raise SelectionError(
            f"--experts-dtype {experts_dtype} and --plan, which is for {planned}, contradict each other; leave the "
            "option out, or make a plan for it"
        )
    return experts_dtype or planned


def inspect(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Show what a store holds."""
    summary = store_summary(store)
    if as_json:
        print(json.dumps(summary))
    else:
        print_summary(summary)


def verify(
    store: StoreArgument,
    against: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="Checkpoint to compare with, bit for bit.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Hash every file of a store; with --against, compare it with its checkpoint bit for bit."""
    total = compared_bytes(read_manifest(store))
    comparison = None if against is None else open_comparison(store, resolve_checkpoint(against))
    with progress_bar("verifying", total, quiet=as_json) as bar:
        verified = verify_store(store, bar.advance)
    result: dict[str, Any] = {
        "store": str(store),
        "status": "intact",
        "verified_bytes": verified,
        "against": against,
    }
    text = f"{store} is intact: {format_size(verified)} verified"
    if comparison is not None:
        with progress_bar("comparing", total, quiet=as_json) as bar:
            result["compared_bytes"] = comparison.run(bar.advance)
        text += f", and equal to {against} bit for bit"
    print(json.dumps(result) if as_json else text)


def _sentence(result: dict[str, Any]) -> str:
    holds = (
        f"{result['num_deep_experts']} of {result['num_experts']} deep experts of {result['num_layers']} layers, "
        f"{format_size(result['total_bytes'])}"
    )
    if result["encodings"]:
        holds += f", experts at {result['expert_bits']:.4g} bits a weight"
    if result["made"] is not None:
        how = "weighted by the statistics" if result["made"]["statistics"] else "by weight error alone"
        holds += f" ({result['made']['experts_dtype']}, made {how})"
    match result["status"]:
        case "nothing to do":
            return f"nothing to do: {result['store']} holds {holds}"
        case "dry run":
            return (
                f"would write {format_size(result['written_bytes'])} to {result['store']}, which would hold {holds} "
                f"({format_size(result['trunk_bytes'])} of it the trunk); nothing was written"
            )
    rate = format_size(result["written_bytes"] / max(result["write_seconds"], 1e-9))
    return (
        f"wrote {format_size(result['written_bytes'])} in {result['write_seconds']:.1f} s ({rate}/s): "
        f"{result['store']} holds {holds}"
    )
