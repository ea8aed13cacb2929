"""Writes a store: the files that `prepare` found missing, and at the end the manifest.

Invariants: the manifest is written last and by rename, so a reader never opens an unfinished store; the files that a
killed run finished are taken from the journal; the same command always gives the same bytes; extraction never removes
deep experts from a finished store.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from expert_store.files import sync_directory
from expert_store.manifest import (
    LayerSpec,
    Making,
    Manifest,
    ModelSpec,
    Source,
    TrunkFile,
    read_manifest,
    write_manifest,
)
from expert_store.shard import ShardLayout, shard_name
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.errors import DiskFullError, TargetError
from extractor.planning.selection import Selection
from extractor.planning.sizes import format_size
from extractor.writing.disk import DISK_MARGIN_BYTES, free_bytes, keep_that_fits
from extractor.writing.journal import JOURNAL_NAME, Journal, journal_head, read_journal
from extractor.writing.outputs import OutputFile, shard_indices
from extractor.writing.pipeline import FileDigest, partial_path, stream


@dataclass(frozen=True)
class Extraction:
    """The work to do. `outputs` are all files of the finished store, `done` those that already exist; `notes` say what
    is dequantised, and why; `made` is the manifest's record of experts that are made smaller, `trunk_dtype` that of the
    trunk's linear layers in 8 bits.
    """

    checkpoint: Checkpoint
    target: Path
    model: ModelSpec
    layers: tuple[LayerSpec, ...]
    selection: Selection
    outputs: tuple[OutputFile, ...]
    done: dict[str, FileDigest]
    existing: Manifest | None
    notes: tuple[str, ...] = ()
    made: Making | None = None
    trunk_dtype: Literal["shipped", "fp8"] | None = None

    @property
    def remaining(self) -> tuple[OutputFile, ...]:
        """The files that are not written yet."""
        return tuple(output for output in self.outputs if output.name not in self.done)

    @property
    def total_bytes(self) -> int:
        """The size of the finished store, without its manifest."""
        return sum(output.file_bytes for output in self.outputs)

    @property
    def remaining_bytes(self) -> int:
        """The bytes that are not written yet."""
        return sum(output.file_bytes for output in self.remaining)

    @property
    def trunk_bytes(self) -> int:
        """The bytes below trunk/."""
        return sum(output.file_bytes for output in self.outputs if not output.cuts)

    @property
    def num_existing(self) -> int:
        """Deep experts that the store holds already."""
        return len(self.existing.deep_experts) if self.existing is not None else 0

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing to do."""
        return not self.remaining and self.num_existing == len(self.selection.deep_experts)

    def check_disk(self) -> None:
        """Raise DiskFullError, naming a `--keep` that fits, when the disk has no room for what remains."""
        reclaimed = sum(_size(partial_path(self.target, output.name)) for output in self.remaining)
        free = free_bytes(self.target) + reclaimed
        if self.remaining_bytes + DISK_MARGIN_BYTES > free:
            raise DiskFullError(self._disk_full_message(free, set(self.done)))

    def check_text(self) -> None:
        """Raise CheckpointError if the finished store could not serve text; see `extractor.checkpoint.text`."""
        from extractor.checkpoint.text import check_text  # imports transformers, which a finished store does not need

        with tempfile.TemporaryDirectory(prefix="deepfew-text-") as folder:
            for output in self.outputs:
                if output.is_side_file:
                    (Path(folder) / Path(output.name).name).write_bytes(output.head)
            check_text(Path(folder), str(self.checkpoint.path))

    def run(self, on_bytes: Callable[[int], None] | None = None) -> Manifest:
        """Write the missing files, then the manifest; return it. For a finished store, only remove partial files.

        `on_bytes` is called with the number of bytes written since the last call. Raises DiskFullError, CheckpointError
        or TargetError; files that were finished stay, and the next run continues after them.
        """
        finished = set(self.done)
        try:
            if self.existing is not None and self.is_finished:
                self._tidy()
                return self.existing
            self.check_disk()
            return self._write(on_bytes, finished)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise TargetError(
                    f"{self.target} cannot be written: {error}; check its permissions and disk"
                ) from error
            self._remove_leftovers()
            raise DiskFullError(self._disk_full_message(free_bytes(self.target), finished)) from error

    def _write(self, on_bytes: Callable[[int], None] | None, finished: set[str]) -> Manifest:
        """`finished` collects the names of the files that are done."""
        fingerprint = self.checkpoint.fingerprint
        for folder in ("trunk", "experts"):
            (self.target / folder).mkdir(parents=True, exist_ok=True)
        held = [deep.experts for deep in self.existing.deep_experts] if self.existing is not None else []
        head = journal_head(fingerprint, self.layers, self.selection.deep_experts, self.made)
        stale = journal_head(fingerprint, self.layers, held, self.made)
        journal = Journal.open(self.target, head, stale)
        try:
            self._check_unchanged()
            for digest in stream(self.remaining, self.target, on_bytes):
                journal.add(digest)
                finished.add(digest.name)
            self._remove_leftovers()
            for folder in ("trunk", "experts", ".", ".."):
                sync_directory(self.target / folder)
            manifest = self._manifest(self.done | journal.done)
            write_manifest(self.target, manifest)
            journal.remove()
        finally:
            journal.close()
        return manifest

    def _check_unchanged(self) -> None:
        """Raise TargetError when the store grew or shrank between `prepare` and the lock."""
        if self.existing is not None and read_manifest(self.target) != self.existing:
            raise TargetError(f"{self.target} was changed by somebody else just now; run the same command again")

    def _tidy(self) -> None:
        """Remove the journal of a run that was killed after it had written the manifest."""
        head = journal_head(self.checkpoint.fingerprint, self.layers, self.selection.deep_experts, self.made)
        left = read_journal(self.target)
        if left is not None and left[0] == head:
            Journal.open(self.target, head).remove()

    def _manifest(self, digests: dict[str, FileDigest]) -> Manifest:
        deep_experts = []
        for index, experts in zip(
            shard_indices(self.existing, len(self.selection.deep_experts)), self.selection.deep_experts, strict=True
        ):
            deep_experts.append(digests[shard_name(index)].entry(ShardLayout(self.layers, index, experts)))
        names = [output.name for output in self.outputs if not output.cuts]
        source = Source(self.checkpoint.name, self.checkpoint.fingerprint, self.checkpoint.location)
        return Manifest(
            source=self.existing.source if self.existing is not None else source,
            model=self.model,
            layers=self.layers,
            alignment=self.selection.alignment,
            deep_experts=tuple(deep_experts),
            trunk=tuple(TrunkFile(name, digests[name].file_bytes, digests[name].sha256) for name in names),
            made=self.made,
            adapters=() if self.existing is None else self.existing.adapters,
            trunk_dtype=self.trunk_dtype,
        )

    def _remove_leftovers(self) -> None:
        """Partial files of this and of killed runs."""
        for output in self.outputs:
            partial_path(self.target, output.name).unlink(missing_ok=True)
        for partial in self.target.glob(f"{JOURNAL_NAME}.*.partial"):
            partial.unlink(missing_ok=True)

    def _disk_full_message(self, free: int, finished: set[str]) -> str:
        """The bytes that are needed and free, and a `--keep` that fits."""
        missing = sum(output.file_bytes for output in self.outputs if output.name not in finished)
        head = (
            f"the disk of {self.target} is too small: {format_size(missing + DISK_MARGIN_BYTES)} are still needed, "
            f"{format_size(free)} are free; "
        )
        room = free + self.total_bytes - missing
        shard = max(output.file_bytes for output in self.outputs if output.cuts)
        keep = keep_that_fits(room, self.trunk_bytes, shard, self.model.num_experts, self.num_existing + 1)
        if keep is None:
            return head + "not even one more deep expert fits: make room, or name a directory on another disk"
        if self.existing is None and (self.target / JOURNAL_NAME).exists():
            return head + (
                "make room and run the same command again to continue, or give the half-made store up (delete "
                f"{self.target}) and extract with --keep {keep}, which fits"
            )
        return head + f"make room, or extract with --keep {keep}, which fits"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
