"""Writes a pruned checkpoint in the Hugging Face layout from a store.

Invariants: what is written is checked by transformers' own loading before the first byte; the directory gets its name
only when all of it is on the disk, so that a killed export leaves nothing that looks whole; the store is only read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from expert_store.adapter import Adapter
from expert_store.files import sync_directory
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.conversion import build_model, trace
from extractor.checkpoint.tensor_file import TensorEntry
from extractor.errors import DiskFullError, SelectionError, TargetError
from extractor.exporting.card import model_card
from extractor.exporting.config import check_choice, pruned_config, pruned_model
from extractor.exporting.merging import Merging
from extractor.exporting.tensors import Kept, experts_tensors, trunk_tensors
from extractor.planning.plan import Plan
from extractor.planning.selection import SelectionRequest, select
from extractor.planning.sizes import format_size
from extractor.writing.disk import DISK_MARGIN_BYTES, free_bytes
from extractor.writing.linears import OutputTensor
from extractor.writing.outputs import OutputFile, file_of, json_bytes, weights_outputs
from extractor.writing.pipeline import stream

MAX_FILE_BYTES = 5 * 10**9
"""Of a weights file, as transformers writes them."""
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Export:
    """The work of an export. `num_kept` experts of every MoE layer stay, and `top_k` of them serve a token."""

    store: Store
    target: Path
    outputs: tuple[OutputFile, ...]
    num_kept: int
    top_k: int

    @property
    def total_bytes(self) -> int:
        """The size of the checkpoint."""
        return sum(output.file_bytes for output in self.outputs)

    def run(self, on_bytes: Callable[[int], None] | None = None) -> None:
        """Write the checkpoint.

        `on_bytes` is called with the number of bytes written since the last call. Raises TargetError, DiskFullError, or
        ShardCorruptError for a damaged store.
        """
        with _named_at_the_end(self.target) as folder:
            free = free_bytes(folder)
            if self.total_bytes + DISK_MARGIN_BYTES > free:
                raise DiskFullError(_disk_full(self, free))
            try:
                with self.store.checking_trunk():
                    for _ in stream(self.outputs, folder, on_bytes):
                        pass
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise TargetError(
                        f"{self.target} cannot be written: {error}; check its permissions and disk"
                    ) from error
                raise DiskFullError(_disk_full(self, free_bytes(folder))) from error


def prepare_export(
    store: Store,
    target: str | os.PathLike[str],
    plan: Plan | None,
    dtype: str | None,
    adapter: Adapter | None = None,
) -> Export:
    """The work of exporting the experts of `plan`, or all of the store, to the directory `target`; writes nothing.

    Args:
        target: new or empty.
        dtype: bfloat16, float16 or float32; None leaves plain tensors as they are, and gives experts in fewer bits the
            dtype that they are computed in.
        adapter: merged into the weights.

    Raises:
        SelectionError: the store lacks an expert of the plan, or layers keep different numbers or groups of experts, or
            the adapter is not for them.
        UnsupportedFamilyError: the family cannot have fewer experts. TargetError, CheckpointError.
    """
    target = Path(target).absolute()
    _check_target(target)
    kept = kept_experts(store, plan)
    model = store.manifest.model
    stored = None if dtype is None else DTYPES[dtype]
    whole, _ = build_model(store.trunk_path)
    check_choice(whole, model, kept)
    document = pruned_config(store.trunk_path, model, len(kept[0]), dtype)
    with tempfile.TemporaryDirectory(prefix="deepfew-export-") as folder:
        (Path(folder) / "config.json").write_bytes(json_bytes(document))
        pruned = pruned_model(Path(folder), model, len(kept[0]))
        merging = Merging(adapter, store, whole, kept)
        tensors = trunk_tensors(store, whole, pruned, kept, stored, merging)
        tensors += experts_tensors(store, whole, kept, stored, merging)
        merging.check_complete()
        top_k = trace(Path(folder), _as_entries(tensors, target)).top_k
    side_files = [
        file_of(path.name, path.read_bytes())
        for path in Checkpoint.open(store.trunk_path).sidecars
        if path.name not in ("config.json", "README.md")
    ]
    card = model_card(store.manifest, plan, kept, top_k, adapter)
    outputs = [
        file_of("config.json", json_bytes(document)),
        file_of("README.md", card.encode()),
        *side_files,
        *weights_outputs("model", tensors, MAX_FILE_BYTES),
    ]
    return Export(store, target, tuple(outputs), len(kept[0]), top_k)


def kept_experts(store: Store, plan: Plan | None) -> Kept:
    """The ids that each MoE layer keeps, ascending: those of the plan, or all that the store has.

    Raises SelectionError if the store lacks one, or if layers keep different numbers.
    """
    manifest, available = store.manifest, store.available
    kept = [[int(expert) for expert in layer.nonzero()[0]] for layer in available]
    if plan is not None:
        request = SelectionRequest(plan=plan)
        chosen = select(request, manifest.model, manifest.layers, 0, manifest.source.fingerprint).deep_experts
        kept = [sorted(experts) for experts in zip(*chosen, strict=True)]
        missing = [(at, one) for at, experts in enumerate(kept) for one in experts if not available[at, one]]
        if missing:
            raise SelectionError(
                f"the plan has {len(missing)} experts that {store.path} lacks, such as expert {missing[0][1]} of MoE "
                f"layer {missing[0][0]}: extract the plan into it first (deepfew extract CHECKPOINT STORE --plan FILE)"
            )
    counts = [len(experts) for experts in kept]
    if len(set(counts)) > 1:
        raise SelectionError(
            f"the MoE layers of {store.path} have {counts} experts, and a checkpoint has the same number in each: "
            "choose as many of each with --plan"
        )
    return kept


def _as_entries(tensors: Sequence[OutputTensor], target: Path) -> dict[str, TensorEntry]:
    """The tensors as transformers' loading will see them, of which names, shapes and dtypes matter here."""
    return {one.name: TensorEntry(one.name, target, one.dtype, one.shape, 0, one.num_bytes) for one in tensors}


def _check_target(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        raise TargetError(f"{target} is not empty, and an export writes a new checkpoint: name another directory")
    if target.exists() and not target.is_dir():
        raise TargetError(f"{target} is a file: name a new directory")


@contextmanager
def _named_at_the_end(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes `target` when the block ends without an error; else it is removed.

    A folder that a killed export left is used again, and what it holds is removed.
    """
    folder = target.with_name(target.name + ".partial")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TargetError(f"another export writes {target}: wait for it, or name another directory") from None
        _empty(folder)
        try:
            yield folder
            sync_directory(folder)
            _check_target(target)
            os.replace(folder, target)
        except BaseException:
            _empty(folder)
            folder.rmdir()
            raise
        sync_directory(target.parent)
    finally:
        os.close(lock)


def _empty(folder: Path) -> None:
    """Remove the files of an unfinished export. Raises TargetError, removing nothing, if there are folders."""
    paths = list(folder.iterdir())
    if any(path.is_dir() for path in paths):
        raise TargetError(f"{folder} holds folders, so no export left it: remove it, or name another directory")
    for path in paths:
        path.unlink()


def _disk_full(work: Export, free: int) -> str:
    return (
        f"the disk of {work.target} is too small: the checkpoint has {format_size(work.total_bytes)}, "
        f"{format_size(free)} are free; make room, keep fewer experts, or name a directory on another disk"
    )
