"""Streaming files through a fixed amount of memory, several files at a time.

Each worker thread takes the next file, and reads, hashes and writes it through one buffer; all of these calls release
the interpreter lock, so that one worker's disk waits are another's hashing. Invariants: memory is bounded by the
workers' buffers, whatever the files' sizes; a file gets its final name only when all of it is on the disk; an error in
any worker ends them all and is raised to the caller.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import queue
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import xxhash

from expert_store.manifest import DeepExpert
from expert_store.shard import ShardLayout
from extractor.checkpoint.tensor_file import CopiedPiece
from extractor.errors import CheckpointError
from extractor.writing.outputs import OutputFile

BUFFER_BYTES = 4 * 2**20
NUM_WORKERS = 8
"""More threads than cores, because some wait for the disk while others hash."""
MAX_OPEN_SOURCES = 64


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A finished file: its sha256 and, for a shard, the XXH3-64 of each span (hex)."""

    name: str
    file_bytes: int
    sha256: str
    span_hashes: tuple[str, ...]

    def entry(self, shard: ShardLayout) -> DeepExpert:
        """The manifest's entry of the shard that this file is."""
        return DeepExpert(
            shard.index, self.name, self.file_bytes, self.sha256, shard.data_offset, shard.experts, self.span_hashes
        )


def stream(
    files: Sequence[OutputFile], target: Path | None, on_bytes: Callable[[int], None] | None = None
) -> Iterator[FileDigest]:
    """Produce `files` below the directory `target` (which has their folders), or only hash them when it is None.

    Yields a file's digest, in no particular order, when it is durable under its final name. `on_bytes` is called on the
    workers' threads with the number of bytes finished since the last call. Raises CheckpointError when the source
    cannot be read, OSError when the target cannot be written; files already yielded stay.
    """
    todo: queue.SimpleQueue[OutputFile] = queue.SimpleQueue()
    for file in files:
        todo.put(file)
    results: queue.SimpleQueue[FileDigest | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        try:
            with closing(_Sources()) as sources:
                buffer = _buffer()
                while (digest := _produce(todo.get_nowait(), target, sources, buffer, stopped, on_bytes)) is not None:
                    results.put(digest)
        except queue.Empty:
            pass
        except BaseException as error:  # passed to the caller
            results.put(error)

    workers = [threading.Thread(target=work, name="extract") for _ in range(min(NUM_WORKERS, len(files)))]
    for worker in workers:
        worker.start()
    try:
        for _ in files:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stopped.set()
        for worker in workers:
            worker.join()


def partial_path(target: Path, name: str) -> Path:
    """The name of a file while it is written; no reader opens it."""
    return target / f"{name}.partial"


def _buffer() -> memoryview:
    """A worker's memory, in huge pages if the kernel has them, which makes copies faster."""
    memory = mmap.mmap(-1, BUFFER_BYTES)
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def _produce(
    file: OutputFile,
    target: Path | None,
    sources: _Sources,
    buffer: memoryview,
    stopped: threading.Event,
    on_bytes: Callable[[int], None] | None,
) -> FileDigest | None:
    """Hash `file` and, with a target, write it; None if `stopped` is set."""
    whole, spans, offset = hashlib.sha256(), _SpanHashes(file.cuts), 0
    descriptor = -1
    if target is not None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(partial_path(target, file.name), flags, 0o666)
    try:
        for data in _fill(file, sources, buffer):
            if stopped.is_set():
                return None
            whole.update(data)
            spans.update(data, offset)
            if descriptor >= 0:
                _write_fully(descriptor, data)
                _begin_writeback(descriptor, offset, len(data))
            offset += len(data)
            if on_bytes is not None:
                on_bytes(len(data))
        if offset != file.file_bytes:
            raise CheckpointError(
                f"{file.name} came to {offset} bytes instead of {file.file_bytes}; please report this fault of deepfew"
            )
        if descriptor >= 0:
            os.fsync(descriptor)
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    if target is not None:
        os.replace(partial_path(target, file.name), target / file.name)
    return FileDigest(file.name, file.file_bytes, whole.hexdigest(), tuple(spans.digests))


def _fill(file: OutputFile, sources: _Sources, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes of `file` in order, as slices of `buffer` that are valid until the next one is asked for."""
    filled = 0
    for data in _parts(file):
        at, length = 0, data.num_bytes if isinstance(data, CopiedPiece) else len(data)
        while at < length:
            room = min(length - at, len(buffer) - filled)
            if isinstance(data, CopiedPiece):
                room = sources.read(data.source.path, buffer[filled : filled + room], data.offset + at)
            else:
                buffer[filled : filled + room] = data[at : at + room]
            at += room
            filled += room
            if filled == len(buffer):
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def _parts(file: OutputFile) -> Iterator[memoryview | CopiedPiece]:
    yield memoryview(file.head)
    for piece in file.pieces():
        yield piece if isinstance(piece, CopiedPiece) else piece.load()


def _write_fully(descriptor: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])


def _begin_writeback(descriptor: int, offset: int, length: int) -> None:
    """Ask the kernel to write these pages now instead of at fsync, so that the disk is never idle; it may ignore this.

    On Linux this advice begins the writing of dirty pages and keeps them (mm/fadvise.c); elsewhere there is none.
    """
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


class _SpanHashes:
    """XXH3-64 of the bytes between consecutive cuts, fed in file order."""

    def __init__(self, cuts: Sequence[int]) -> None:
        self.digests: list[str] = []
        self._cuts = cuts
        self._hash = xxhash.xxh3_64()

    def update(self, data: memoryview, offset: int) -> None:
        """Take the bytes `data` at the file offset `offset`."""
        at = 0
        while len(self.digests) < len(self._cuts) - 1:
            begin, end = self._cuts[len(self.digests)] - offset, self._cuts[len(self.digests) + 1] - offset
            at = max(at, begin)
            if at >= len(data):
                return
            part = data[at : min(end, len(data))]
            self._hash.update(part)
            at += len(part)
            if at == end:
                self.digests.append(self._hash.hexdigest())
                self._hash = xxhash.xxh3_64()


class _Sources:
    """One worker's open checkpoint files; the least recently used are closed."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, path: Path, memory: memoryview, offset: int) -> int:
        """Read at least one byte of `path` into `memory`, with one call."""
        try:
            descriptor = self._open.get(path)
            if descriptor is None:
                if len(self._open) == MAX_OPEN_SOURCES:
                    os.close(self._open.popitem(last=False)[1])
                descriptor = self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._open.move_to_end(path)
            count = os.preadv(descriptor, [memory], offset)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error.strerror}; check the disk and the file's permissions"
            ) from error
        if count == 0:
            raise CheckpointError(
                f"{path} became shorter while it was read; run again when nothing writes to it any more"
            )
        return count
