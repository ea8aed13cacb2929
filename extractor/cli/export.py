"""The command `export`, as a function that a typer application mounts.

Invariant: standard output carries the result alone, as text or, with --json, as one JSON object; progress and notes go
to standard error; an ExtractError or StoreError is raised, for the application to print.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from expert_store.adapter import find_adapter
from expert_store.store import Store
from extractor.cli.options import DryRunOption, JsonOption, StoreArgument
from extractor.cli.progress import progress_bar
from extractor.exporting.export import prepare_export
from extractor.planning.plan import read_plan
from extractor.planning.sizes import format_size


def export(
    store: StoreArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory of the pruned checkpoint: new or empty.")],
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Plan of the experts to keep, all of them in the store. All it has by default."
        ),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Dtype of the weights. By default as stored; experts in fewer bits are dequantised."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Adapter to merge: one of the store, or a file of `deepfew adapt`."),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a pruned checkpoint in the Hugging Face layout, which transformers, vLLM and llama.cpp's converter read.

    Its logits are those of the whole model masked to the experts that it keeps, with the adapter if one is given. A
    model card says which these are.
    """
    with Store.open(store) as opened:
        if adapter is None and opened.manifest.trained is not None:
            adapter = opened.manifest.trained.adapter
            print(f"NOTE: the adapter {adapter} is merged, as the experts were trained with it", file=sys.stderr)
        found = None if adapter is None else find_adapter(opened.path, opened.manifest, adapter)
        work = prepare_export(opened, out, None if plan is None else read_plan(plan), dtype, found)
        model = opened.manifest.model
        if work.top_k < model.top_k:
            print(
                f"NOTE: a token takes {work.top_k} experts instead of {model.top_k}: no more are left", file=sys.stderr
            )
        started = time.monotonic()
        if not dry_run:
            with progress_bar("exporting", work.total_bytes, quiet=as_json) as bar:
                work.run(bar.advance)
    result: dict[str, Any] = {
        "out": str(out),
        "status": "dry run" if dry_run else "exported",
        "family": model.family,
        "num_experts": work.num_kept,
        "num_experts_before": model.num_experts,
        "top_k": work.top_k,
        "total_bytes": work.total_bytes,
        "write_seconds": time.monotonic() - started,
    }
    holds = f"{work.num_kept} of {model.num_experts} experts in each of {model.num_layers} layers"
    text = f"wrote {format_size(work.total_bytes)} in {result['write_seconds']:.1f} s: {out} has {holds}"
    if dry_run:
        text = f"would write {format_size(work.total_bytes)} to {out}, with {holds}; nothing was written"
    print(json.dumps(result) if as_json else text)
