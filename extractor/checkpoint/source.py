"""Reads single experts from a store's source checkpoint while serving, for `on_missing="fetch"`.

Only a checkpoint on this machine is read, never downloaded, and only one with the store's fingerprint and layout.
Invariant: a span equals the bytes that extraction would write, or the read raises; files that changed since the
checkpoint was opened are never read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from expert_store.errors import ExpertUnavailableError
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.layout import ExpertsLayout
from extractor.checkpoint.tensor_file import CopiedPiece
from extractor.errors import ExtractError

Stamp = tuple[int, int, int]
"""Inode, size and time of last change of a file."""


class CheckpointSource:
    """Reads spans from a checkpoint; see `expert_store.store.SourceReader`. Any thread may read.

    Args:
        layout: of the checkpoint.
    """

    def __init__(self, layout: ExpertsLayout) -> None:
        self._layout = layout
        self._stamps = {file.path: _stamp(file.path) for file in layout.checkpoint.files}

    def read_expert(self, layer: int, expert: int, out: memoryview) -> None:
        """Fill `out` (exactly the span's bytes) with the span of (layer, expert).

        Raises:
            ExpertUnavailableError: a file cannot be read, or is not the one that was opened.
        """
        at, read_from = 0, set[Path]()
        try:
            for piece in self._layout.span(layer, expert):
                into = out[at : at + piece.num_bytes]
                if isinstance(piece, CopiedPiece):
                    read_from.add(piece.source.path)
                    _read_fully(piece.source.path, into, piece.offset)
                else:
                    read_from.update(self._stamps)
                    into[:] = piece.load()
                at += piece.num_bytes
            self._check_unchanged(read_from)
        except (ExtractError, OSError) as error:
            raise ExpertUnavailableError(
                f"expert {expert} of MoE layer {layer} is not in the store and cannot be read from the checkpoint "
                f"{self._layout.checkpoint.path}: {error}"
            ) from error
        assert at == len(out), f"the span of expert {expert} of layer {layer} has {at} bytes, wanted {len(out)}"

    def _check_unchanged(self, paths: Iterable[Path]) -> None:
        for path in paths:
            if _stamp(path) != self._stamps[path]:
                raise OSError(f"{path} was changed after the server had checked it; restart the server")


def attach_source(store: Store, location: str | None = None) -> str:
    """Attach the store's checkpoint if it can be read; return the reason if it was not attached.

    `location` is the checkpoint's present location, if it has moved. Reads about 1 MiB of every weights file for the
    fingerprint. Blocks.
    """
    manifest = store.manifest
    if manifest.trained is not None:
        return "the store's experts were trained (deepfew adapt --experts), and those of a checkpoint do not fit them"
    try:
        checkpoint = Checkpoint.open(local_directory(location or manifest.source.location))
        if checkpoint.fingerprint != manifest.source.fingerprint:
            return (
                f"{checkpoint.path} has the fingerprint {checkpoint.fingerprint}, the store was extracted from "
                f"{manifest.source.fingerprint}: it is another checkpoint, or a changed one"
            )
        layout = ExpertsLayout.of_store(checkpoint, manifest, store.path)
        if layout.layers != manifest.layers:
            return (
                f"this release of deepfew or of transformers lays the experts of {checkpoint.path} out differently: "
                "extract into an empty directory"
            )
        store.attach_source(CheckpointSource(layout))
    except (ExtractError, OSError) as error:
        return str(error)
    return ""


def local_directory(location: str) -> Path:
    """The directory of a checkpoint on this machine: the directory itself, or a snapshot in the hub's cache.

    Raises:
        OSError: it is not on this machine.
    """
    if Path(location).is_dir():
        return Path(location)
    name, at, revision = location.partition("@")
    if at and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True))
        except Exception as error:  # the hub's client raises its own and the system's errors
            raise FileNotFoundError(f"{location} is not in the hub's cache on this machine ({error})") from error
    raise FileNotFoundError(f"{location} is no directory on this machine")


def _read_fully(path: Path, memory: memoryview, offset: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < memory.nbytes:
            count = os.preadv(descriptor, [memory[done:]], offset + done)
            if count == 0:
                raise OSError(f"{path} ends after {offset + done} bytes, wanted {offset + memory.nbytes}")
            done += count
    finally:
        os.close(descriptor)


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
