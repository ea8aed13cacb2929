"""Streaming files through a fixed amount of memory: read, hash and write at the same time.

One thread reads the checkpoint into a pool of buffers, one hashes them, one writes them, one makes finished files
durable. Each of these calls releases the interpreter lock, so they overlap. Invariants: memory is bounded by the pool,
whatever the files' sizes; a file gets its final name only when all of it is on the disk; results come in file order;
an error in any thread ends them all and is raised to the caller.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from extractor.errors import CheckpointError
from extractor.layout import CopiedPiece
from extractor.outputs import OutputFile

BUFFER_BYTES = 4 * 2**20
NUM_BUFFERS = 24
FLUSH_BYTES = 64 * 2**20
MAX_UNSYNCED_FILES = 8
MAX_OPEN_SOURCES = 128


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A finished file: its sha256 and, for a shard, the XXH3-64 of each span (hex)."""

    name: str
    file_bytes: int
    sha256: str
    span_hashes: tuple[str, ...]


@dataclass(slots=True)
class _Chunk:
    """`memory[:length]` at `offset` of file number `file`; returned to the pool by the last of its `users`."""

    file: int
    offset: int
    memory: memoryview
    length: int
    users: int
    last: bool


def stream(
    files: Sequence[OutputFile], target: Path | None, on_bytes: Callable[[int], None] | None = None
) -> Iterator[FileDigest]:
    """Produce `files` below the directory `target` (which has their folders), or only hash them when it is None.

    Yields each file's digest when it is durable under its final name. `on_bytes` is called on the pipeline's threads,
    one at a time, with the number of bytes finished since the last call. Raises CheckpointError when the source cannot
    be read, OSError when the target cannot be written; files already yielded stay.
    """
    run = _Run(files, target, on_bytes)
    run.start()
    try:
        for _ in files:
            digest = run.results.get()
            if digest is None:
                break
            yield digest
    finally:
        run.stop()
    if run.error is not None:
        raise run.error


class _Run:
    def __init__(
        self, files: Sequence[OutputFile], target: Path | None, on_bytes: Callable[[int], None] | None
    ) -> None:
        self.files = files
        self.target = target
        self.on_bytes = on_bytes
        self.error: BaseException | None = None
        self.results: queue.SimpleQueue[FileDigest | None] = queue.SimpleQueue()
        self._pool: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._to_hash: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._to_write: queue.SimpleQueue[_Chunk | None] = queue.SimpleQueue()
        self._to_sync: queue.Queue[int] = queue.Queue(MAX_UNSYNCED_FILES)
        self._digests: queue.SimpleQueue[FileDigest | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        jobs = [self._read, self._hash]
        if target is not None:
            jobs += [self._write, self._sync]
        self._threads = [threading.Thread(target=self._guard, args=(job,), name=job.__name__) for job in jobs]

    def start(self) -> None:
        for _ in range(NUM_BUFFERS):
            self._pool.put(memoryview(bytearray(BUFFER_BYTES)))
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End all threads, wherever they are, and wait for them."""
        self._wake()
        for thread in self._threads:
            thread.join()
        while not self._to_sync.empty():
            item = self._to_sync.get()
            os.close(item if item >= 0 else -item - 1)

    def _wake(self) -> None:
        self._stopped.set()
        for waiting in (self._pool, self._to_hash, self._to_write, self._digests, self.results):
            waiting.put(None)

    def _guard(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            with self._lock:
                self.error = self.error or error
            self._wake()

    def _read(self) -> None:
        consumers = [self._to_hash] if self.target is None else [self._to_hash, self._to_write]
        with _Sources() as sources:
            for number, file in enumerate(self.files):
                offset = 0
                for memory, length in _fill(file, sources, self._pool):
                    if self._stopped.is_set():
                        return
                    last = offset + length == file.file_bytes
                    chunk = _Chunk(number, offset, memory, length, len(consumers), last)
                    for consumer in consumers:
                        consumer.put(chunk)
                    offset += length
                if offset != file.file_bytes and not self._stopped.is_set():
                    raise CheckpointError(f"{file.name} came to {offset} bytes instead of {file.file_bytes}")

    def _hash(self) -> None:
        while (chunk := self._to_hash.get()) is not None:
            if chunk.offset == 0:
                file = self.files[chunk.file]
                whole, spans = hashlib.sha256(), _SpanHashes(file.cuts)
            data = chunk.memory[: chunk.length]
            whole.update(data)
            spans.update(data, chunk.offset)
            self._release(chunk)
            if chunk.last:
                digest = FileDigest(file.name, file.file_bytes, whole.hexdigest(), tuple(spans.digests))
                (self.results if self.target is None else self._digests).put(digest)

    def _write(self) -> None:
        assert self.target is not None
        descriptor, unflushed = -1, 0
        try:
            while (chunk := self._to_write.get()) is not None:
                if chunk.offset == 0:
                    path = partial_path(self.target, self.files[chunk.file].name)
                    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
                    descriptor = os.open(path, flags, 0o666)
                done = 0
                while done < chunk.length:
                    done += os.pwrite(descriptor, chunk.memory[done : chunk.length], chunk.offset + done)
                unflushed += chunk.length
                last = chunk.last
                self._release(chunk)
                if last:
                    self._hand_over(descriptor)
                    descriptor, unflushed = -1, 0
                elif unflushed >= FLUSH_BYTES:
                    self._hand_over(os.dup(descriptor), finished=False)
                    unflushed = 0
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _hand_over(self, descriptor: int, finished: bool = True) -> None:
        """Give a descriptor to the syncing thread; -descriptor - 1 means that the file goes on."""
        item = descriptor if finished else -descriptor - 1
        while not self._stopped.is_set():
            try:
                self._to_sync.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
        os.close(descriptor)

    def _sync(self) -> None:
        assert self.target is not None
        while not self._stopped.is_set():
            try:
                item = self._to_sync.get(timeout=0.1)
            except queue.Empty:
                continue
            descriptor = item if item >= 0 else -item - 1
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if item < 0:
                continue
            digest = self._digests.get()
            if digest is None:
                return
            os.replace(partial_path(self.target, digest.name), self.target / digest.name)
            self.results.put(digest)

    def _release(self, chunk: _Chunk) -> None:
        with self._lock:
            chunk.users -= 1
            if chunk.users > 0:
                return
            if self.on_bytes is not None:
                self.on_bytes(chunk.length)
        self._pool.put(chunk.memory)


class _SpanHashes:
    """XXH3-64 of the bytes between consecutive cuts, fed in file order."""

    def __init__(self, cuts: Sequence[int]) -> None:
        self.digests: list[str] = []
        self._ends = list(cuts)
        self._hash = xxhash.xxh3_64()

    def update(self, data: memoryview, offset: int) -> None:
        at = 0
        while len(self.digests) < len(self._ends) - 1 and at < len(data):
            begin, end = self._ends[len(self.digests)] - offset, self._ends[len(self.digests) + 1] - offset
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
    """Open checkpoint files; the least recently used are closed."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *exc: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, path: Path, memory: memoryview, offset: int) -> int:
        """Read what one call gives of `path` into `memory`; at least one byte."""
        try:
            descriptor = self._open.get(path)
            if descriptor is None:
                descriptor = self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                if len(self._open) > MAX_OPEN_SOURCES:
                    os.close(self._open.popitem(last=False)[1])
            self._open.move_to_end(path)
            count = os.preadv(descriptor, [memory], offset)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error.strerror}; check the disk, or download it again"
            ) from error
        if count == 0:
            raise CheckpointError(f"{path} became shorter while it was read; leave it alone, or download it again")
        return count


def _fill(
    file: OutputFile, sources: _Sources, pool: queue.SimpleQueue[memoryview | None]
) -> Iterator[tuple[memoryview, int]]:
    """Buffers from `pool` filled with the bytes of `file`, in order; ends early when the pool gives None."""
    buffer = pool.get()
    if buffer is None:
        return
    filled = 0
    for data in _parts(file):
        at, length = 0, data.num_bytes if isinstance(data, CopiedPiece) else len(data)
        while at < length:
            room = min(length - at, BUFFER_BYTES - filled)
            if isinstance(data, CopiedPiece):
                room = sources.read(data.source.path, buffer[filled : filled + room], data.offset + at)
            else:
                buffer[filled : filled + room] = data[at : at + room]
            at += room
            filled += room
            if filled == BUFFER_BYTES:
                yield buffer, filled
                buffer = pool.get()
                if buffer is None:
                    return
                filled = 0
    if filled or file.file_bytes == 0:
        yield buffer, filled
    else:
        pool.put(buffer)


def _parts(file: OutputFile) -> Iterator[memoryview | CopiedPiece]:
    yield memoryview(file.head)
    for piece in file.pieces():
        yield piece if isinstance(piece, CopiedPiece) else piece.load()


def partial_path(target: Path, name: str) -> Path:
    """The name that a file has while it is written; no reader takes it for a file of the store."""
    return target / f"{name}.partial"
