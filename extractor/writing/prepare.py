"""Finds the work of an extraction before anything is written.

Invariant: `prepare` writes nothing. It accepts a directory that is new, empty, a store of the same checkpoint, or an
unfinished one of the same checkpoint and selection; it refuses any other with advice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_store.manifest import MANIFEST_NAME, Alignment, LayerSpec, Making, Manifest, read_manifest
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.encoding.importance import Importance
from extractor.encoding.names import MADE, ExpertsDtype, TrunkDtype, experts_dtype_of
from extractor.errors import SelectionError, TargetError
from extractor.planning.selection import Selection, SelectionRequest, select
from extractor.writing.extract import Extraction
from extractor.writing.journal import JOURNAL_NAME, journal_head, read_journal, unfinished_message
from extractor.writing.outputs import OutputFile, all_trunk_outputs, shard_indices, shard_output
from extractor.writing.pipeline import FileDigest

if TYPE_CHECKING:
    from extractor.checkpoint.layout import ExpertsLayout


def prepare(
    checkpoint: Checkpoint,
    target: str | os.PathLike[str],
    request: SelectionRequest,
    experts_dtype: ExpertsDtype | None = None,
    importance: Importance | None = None,
    trunk_dtype: TrunkDtype | None = None,
) -> Extraction:
    """The work of extracting `request` from `checkpoint` into the directory `target`.

    Without an `experts_dtype` a store keeps the one that it has, and a new one gets its experts as shipped; so it is
    with the trunk's linear layers and `trunk_dtype`, but they are in 16 bits by default where experts are. Errors of
    experts that are made smaller weigh by `importance`; a store keeps the one that it was made with. Raises
    UnsupportedFamilyError, CheckpointError, SelectionError, TargetError, another ExtractError if the experts cannot be
    made, or ManifestError for a store that cannot be read.
    """
    target = Path(target).absolute()
    existing = _existing(target, checkpoint)
    if existing is None:
        return _fresh(checkpoint, target, request, experts_dtype or "shipped", importance, trunk_dtype)
    _check_same_experts(existing, checkpoint, target, experts_dtype, importance)
    _check_same_trunk(existing, checkpoint, target, trunk_dtype)
    trunk_bytes = sum(file.bytes for file in existing.trunk)
    wanted = select(request, existing.model, existing.layers, trunk_bytes, checkpoint.fingerprint)
    selection = _grown(existing, wanted, target)
    intact = _intact(target, existing)
    if len(selection.deep_experts) == len(existing.deep_experts) and len(intact) == len(selection.deep_experts) + len(
        existing.trunk
    ):
        outputs = tuple(_finished(digest) for digest in intact.values())
        return Extraction(
            checkpoint,
            target,
            existing.model,
            existing.layers,
            selection,
            outputs,
            intact,
            existing,
            made=existing.made,
            trunk_dtype=existing.trunk_dtype,
        )
    layout = _layout_of_store(checkpoint, existing, target)
    if (layout.model, layout.layers) != (existing.model, existing.layers):
        raise TargetError(
            f"{target} was extracted with another layout of the experts (by another release of deepfew or of "
            "transformers); "
            "extract into an empty directory"
        )
    return _work(layout, target, selection, existing, intact)


def _check_same_experts(
    existing: Manifest,
    checkpoint: Checkpoint,
    target: Path,
    experts_dtype: ExpertsDtype | None,
    importance: Importance | None,
) -> None:
    """Raise TargetError if a store's experts are not those that the options ask for."""
    remedy = "a store has one: leave the option out, or name another directory"
    stored = experts_dtype_of(existing)
    if experts_dtype not in (None, stored):
        is_made = existing.made is not None or experts_dtype in MADE
        if is_made or _layout(checkpoint, experts_dtype, None).layers != existing.layers:
            raise TargetError(f"{target} holds experts with --experts-dtype {stored}, wanted {experts_dtype}; {remedy}")
    if importance is not None and (existing.made is None or existing.made.statistics != importance.sha256):
        raise TargetError(f"{target} holds experts that were made with other --stats, or none; {remedy}")


def _check_same_trunk(existing: Manifest, checkpoint: Checkpoint, target: Path, trunk_dtype: TrunkDtype | None) -> None:
    """Raise TargetError if `trunk_dtype` would give another trunk than the store's."""
    stored = existing.trunk_dtype or "16bit"
    if trunk_dtype in (None, stored):
        return
    if _layout(checkpoint, "shipped", None, trunk_dtype).trunk_dtype != existing.trunk_dtype:
        raise TargetError(
            f"{target} holds a trunk with --trunk-dtype {stored}, wanted {trunk_dtype}; a store has one: leave the "
            "option out, or name another directory"
        )


def _fresh(
    checkpoint: Checkpoint,
    target: Path,
    request: SelectionRequest,
    experts_dtype: ExpertsDtype,
    importance: Importance | None,
    trunk_dtype: TrunkDtype | None,
) -> Extraction:
    """Work for a directory without a manifest (new, empty, unfinished). Raises TargetError within the checkpoint."""
    if target.resolve().is_relative_to(checkpoint.path.resolve()):
        raise TargetError(
            f"{target} lies in the checkpoint {checkpoint.path}, which is only read: name a directory outside it"
        )
    if importance is not None and experts_dtype not in MADE:
        raise SelectionError(
            f"--stats weighs the errors of experts that are made smaller, and --experts-dtype is {experts_dtype}: "
            f"leave it out, or take one of {', '.join(MADE)}"
        )
    layout = _layout(checkpoint, experts_dtype, importance, trunk_dtype)
    trunk_bytes = sum(output.file_bytes for output in all_trunk_outputs(layout))
    selection = select(request, layout.model, layout.layers, trunk_bytes, checkpoint.fingerprint)
    _check_whole(layout, selection)
    return _work(layout, target, selection, None, {})


def _check_whole(layout: ExpertsLayout, selection: Selection) -> None:
    """Raises SelectionError where experts are left out of a layer that routes by token id."""
    num, family = layout.model.num_experts, layout.model.family
    for layer in layout.whole:
        held = len({experts[layer] for experts in selection.deep_experts})
        if held < num:
            raise SelectionError(
                f"MoE layer {layer} of {family} routes by token id, so a text may need each of its {num} experts, and "
                f"{held} were chosen: extract all of them (leave out --experts, --count, --keep, --budget and --plan)"
            )


def _work(
    layout: ExpertsLayout,
    target: Path,
    selection: Selection,
    existing: Manifest | None,
    intact: dict[str, FileDigest],
) -> Extraction:
    outputs = _outputs(layout, selection, existing)
    made = None if layout.maker is None else layout.maker.making
    done = intact | _journaled(target, layout.checkpoint, layout.layers, selection, existing, made)
    return Extraction(
        checkpoint=layout.checkpoint,
        target=target,
        model=layout.model,
        layers=layout.layers,
        selection=selection,
        outputs=outputs,
        done=_present(target, outputs, done),
        existing=existing,
        notes=layout.notes,
        made=made,
        trunk_dtype=layout.trunk_dtype,
    )


# These import transformers, which takes seconds that a finished store need not wait for.


def _layout(
    checkpoint: Checkpoint,
    experts_dtype: ExpertsDtype,
    importance: Importance | None,
    trunk_dtype: TrunkDtype | None = None,
) -> ExpertsLayout:
    from extractor.checkpoint.layout import ExpertsLayout

    return ExpertsLayout.of(checkpoint, experts_dtype, importance, trunk_dtype)


def _layout_of_store(checkpoint: Checkpoint, manifest: Manifest, target: Path) -> ExpertsLayout:
    from extractor.checkpoint.layout import ExpertsLayout

    return ExpertsLayout.of_store(checkpoint, manifest, target)


def _existing(target: Path, checkpoint: Checkpoint) -> Manifest | None:
    """The manifest in `target` if there is one; raises TargetError when the directory holds something else."""
    if not target.exists():
        return None
    if not target.is_dir():
        raise TargetError(f"{target} is not a directory; name a new or empty directory")
    if (target / MANIFEST_NAME).exists():
        manifest = read_manifest(target)
        if manifest.trained is not None:
            raise TargetError(
                f"{target} holds experts that were trained (`deepfew adapt --experts`), beside which those of a "
                "checkpoint do not fit: name another directory"
            )
        if manifest.source.fingerprint != checkpoint.fingerprint:
            raise TargetError(
                f"{target} is a store of another checkpoint: it holds {manifest.source.name} "
                f"({manifest.source.fingerprint[:12]}), this is {checkpoint.name} ({checkpoint.fingerprint[:12]}); "
                "name another directory"
            )
        return manifest
    if (target / JOURNAL_NAME).exists():
        return None
    foreign = sorted(
        path for path in target.iterdir() if not path.name.startswith(JOURNAL_NAME) and not _is_hollow(path)
    )
    if foreign:
        names = ", ".join(path.name for path in foreign[:3])
        raise TargetError(f"{target} is neither a store nor empty (it holds {names}); name a new or empty directory")
    return None


def _is_hollow(path: Path) -> bool:
    """Whether `path` is a folder that an extraction made just before it was killed."""
    return path.name in ("trunk", "experts") and path.is_dir() and not any(path.iterdir())


def _grown(existing: Manifest, selection: Selection, target: Path) -> Selection:
    """The deep experts that `existing` has, in its order, and after them those that `selection` adds."""
    held = [deep.experts for deep in existing.deep_experts]
    missing = set(held) - set(selection.deep_experts)
    added = [experts for experts in selection.deep_experts if experts not in set(held)]
    if not added:
        return Selection(tuple(held), existing.alignment)
    if missing:
        raise TargetError(
            f"{target} holds {len(held)} deep experts, of which {len(missing)} are not in what was asked for; a store "
            "only grows by extraction: ask for a selection that includes them, give them up with `deepfew shrink`, or "
            "name another directory"
        )
    kept = existing.alignment.statistics | selection.alignment.statistics
    return Selection((*held, *added), Alignment(selection.alignment.kind, kept))


def _outputs(layout: ExpertsLayout, selection: Selection, existing: Manifest | None) -> tuple[OutputFile, ...]:
    indices = shard_indices(existing, len(selection.deep_experts))
    shards = [shard_output(layout, *numbered) for numbered in zip(indices, selection.deep_experts, strict=True)]
    return (*all_trunk_outputs(layout), *shards)


def _intact(target: Path, manifest: Manifest) -> dict[str, FileDigest]:
    """The files of a finished store that exist with their size."""
    digests = [FileDigest(deep.file, deep.bytes, deep.sha256, deep.span_hashes) for deep in manifest.deep_experts]
    digests += [FileDigest(file.name, file.bytes, file.sha256, ()) for file in manifest.trunk]
    return {digest.name: digest for digest in digests if _has_size(target / digest.name, digest.file_bytes)}


def _journaled(
    target: Path,
    checkpoint: Checkpoint,
    layers: Sequence[LayerSpec],
    selection: Selection,
    existing: Manifest | None,
    made: Making | None,
) -> dict[str, FileDigest]:
    """The files that a killed run finished; none if the journal is of a run that wrote its manifest."""
    found: tuple[dict[str, Any], dict[str, FileDigest]] | None = read_journal(target)
    if found is None:
        return {}
    head, done = found
    if head == journal_head(checkpoint.fingerprint, layers, selection.deep_experts, made):
        return done
    held = [deep.experts for deep in existing.deep_experts] if existing is not None else []
    if held and head == journal_head(checkpoint.fingerprint, layers, held, made):
        return {}
    raise TargetError(unfinished_message(target))


def _present(target: Path, outputs: tuple[OutputFile, ...], done: dict[str, FileDigest]) -> dict[str, FileDigest]:
    """The entries of `done` whose files exist with the right size."""
    sizes = {output.name: output.file_bytes for output in outputs}
    return {
        name: digest
        for name, digest in done.items()
        if digest.file_bytes == sizes.get(name) and _has_size(target / name, digest.file_bytes)
    }


def _finished(digest: FileDigest) -> OutputFile:
    cuts = (0,) * len(digest.span_hashes)
    return OutputFile(digest.name, digest.file_bytes, b"", lambda: iter(()), cuts)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size
    except OSError:
        return False
