"""Growing a store on disk, and adopting a changed store in a running model.

Invariant: a store grows only by whole deep experts; an interrupted growth is finished before another one begins; a
running model adopts a change between two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from expert_store.manifest import read_manifest
from extractor.checkpoint.checkpoint import Checkpoint, resolve_checkpoint
from extractor.checkpoint.source import local_directory
from extractor.planning.plan import Plan, PlannedExpert
from extractor.planning.selection import SelectionRequest
from extractor.writing.journal import read_journal
from extractor.writing.prepare import prepare
from router.mask import ExpertMask
from server.growth.status import NothingToGrowError
from server.model.runner import Runner


def grow_store(
    store: Path, checkpoint: str, added: list[tuple[int, ...]], on_bytes: Callable[[int], None] = lambda count: None
) -> int:
    """Extract deep experts into a finished store; return the bytes written. Readers may have the store open.

    Args:
        checkpoint: directory or hub name of the store's source.
        added: for each new deep expert, its expert id of every layer.

    Raises:
        GrowthError: `added` is empty. ExtractError: see `extractor.writing.prepare`. StoreError: no store.
    """
    if not added:
        raise NothingToGrowError("no deep expert to add was named: the store has every one that was asked for")
    manifest = read_manifest(store)
    held = [deep.experts for deep in manifest.deep_experts]
    plan = Plan(
        manifest.model.num_layers,
        manifest.model.num_experts,
        {"kind": "grown"},
        tuple(PlannedExpert(tuple(experts)) for experts in (*held, *added)),
    )
    work = prepare(_source(checkpoint), store, SelectionRequest(plan=plan))
    work.check_disk()
    num_bytes = work.remaining_bytes
    work.run(on_bytes)
    return num_bytes


def _source(checkpoint: str) -> Checkpoint:
    """A manifest's location may name a snapshot of the hub, which `resolve_checkpoint` does not know."""
    try:
        return Checkpoint.open(local_directory(checkpoint))
    except FileNotFoundError:
        return resolve_checkpoint(checkpoint)


def unfinished_growth(store: Path) -> list[tuple[int, ...]]:
    """The deep experts of an interrupted growth, which must be finished before another one begins."""
    left = read_journal(store)
    if left is None:
        return []
    held = [deep.experts for deep in read_manifest(store).deep_experts]
    deep_experts = [tuple(deep_expert) for deep_expert in left[0].get("columns", [])]
    return deep_experts[len(held) :] if deep_experts[: len(held)] == held else []


def adopt(runner: Runner, served: ExpertMask | None) -> bool:
    """Add the store's new deep experts to the running model and drop the removed ones; call it between two steps.

    Returns whether the store has changed.

    Args:
        served: the mask that the server was started with; None is all of the store.

    Raises:
        ManifestError, ShardCorruptError: the new manifest cannot be used; the old one stays in force.
    """
    model = runner.model
    if not model.store.reload():
        return False
    available = ExpertMask.of(model.store.available)
    model.routing.set_mask(available if served is None else available & served)
    runner.adopt()
    return True
