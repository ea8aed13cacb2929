"""The journal of an unfinished extraction: the finished files, with their hashes.

Owns `extract.journal` in the store's directory: a first line that identifies the extraction, then a line for every file
that is durable under its final name. Invariant: a line is written only after its file is on the disk, so the next run
can rely on it; an incomplete last line is dropped. The open file is locked, so only one extraction writes a store.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from expert_store.manifest import LayerSpec, Making
from extractor.errors import TargetError
from extractor.writing.pipeline import FileDigest

JOURNAL_NAME = "extract.journal"
FORMAT = "deepfew-journal"
VERSION = 1


class Journal:
    """An open, locked journal. `done` maps the finished files' names to their digests."""

    def __init__(self, path: Path, descriptor: int, done: dict[str, FileDigest]) -> None:
        self.done = done
        self._path = path
        self._descriptor = descriptor

    @classmethod
    def open(cls, directory: Path, head: dict[str, Any], stale: dict[str, Any] | None = None) -> Journal:
        """Continue the journal in `directory`, or begin one with `head`.

        A journal with the head `stale` is of a run that was killed after it had written the manifest; it is replaced.
        Raises TargetError if another process holds the journal, or if it has another head.
        """
        path = directory / JOURNAL_NAME
        while True:
            if not path.exists():
                _begin(path, head)
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise TargetError(
                    f"another extraction is writing {directory}; wait for it, or name another directory"
                ) from None
            if not _is_open_file(path, descriptor):  # the other one finished and removed it between our open and lock
                os.close(descriptor)
                continue
            try:
                found, done, whole = _read(path)
            except TargetError:
                os.close(descriptor)
                raise
            if found == head:
                os.ftruncate(descriptor, whole)
                return cls(path, descriptor, done)
            if found == stale:
                os.unlink(path)
            os.close(descriptor)
            if found != stale:
                raise TargetError(unfinished_message(directory))

    def add(self, digest: FileDigest) -> None:
        """Record a finished file durably."""
        os.write(self._descriptor, _line(asdict(digest)))
        os.fsync(self._descriptor)
        self.done[digest.name] = digest

    def remove(self) -> None:
        """After the extraction: delete the journal and release the lock."""
        os.unlink(self._path)
        self.close()

    def close(self) -> None:
        """Release the lock and keep the journal for the next run."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_journal(directory: Path) -> tuple[dict[str, Any], dict[str, FileDigest]] | None:
    """The head and the finished files of the journal in `directory`, or None if there is none."""
    path = directory / JOURNAL_NAME
    if not path.exists():
        return None
    head, done, _ = _read(path)
    return head, done


def journal_head(
    fingerprint: str,
    layers: Sequence[LayerSpec],
    deep_experts: Sequence[tuple[int, ...]],
    made: Making | None = None,
) -> dict[str, Any]:
    """The identity of an extraction: checkpoint, the experts' encodings and how they were made, all deep experts of the
    finished store."""
    tensors = (tensor for layer in layers for tensor in layer.tensors)
    encodings = {tensor.name: asdict(tensor.encoding) for tensor in tensors if tensor.encoding is not None}
    return {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint,
        "columns": [list(experts) for experts in deep_experts],
        **({"encodings": encodings} if encodings else {}),
        **({} if made is None else {"made": asdict(made)}),
    }


def unfinished_message(directory: Path) -> str:
    """The message for an extraction that differs from the unfinished one in `directory`."""
    return (
        f"{directory} holds a half-made extraction of another checkpoint, selection or encoding; run that command "
        f"again to finish it, or delete {directory / JOURNAL_NAME} (and, where there is no manifest.json, the whole "
        "directory) to give it up, or name another directory"
    )


def _begin(path: Path, head: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(_line(head))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, FileDigest], int]:
    """The head, the finished files, and the number of bytes in whole lines."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines()
    try:
        head = json.loads(lines[0])
        digests = [
            FileDigest(item["name"], item["file_bytes"], item["sha256"], tuple(item["span_hashes"]))
            for item in map(json.loads, lines[1:])
        ]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise TargetError(
            f"{path} is damaged ({error!r}); delete it (and, where there is no manifest.json, the whole directory), "
            "then run the same command again"
        ) from None
    return head, {digest.name: digest for digest in digests}, whole


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _is_open_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
