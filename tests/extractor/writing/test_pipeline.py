"""Streaming: the right bytes and hashes at every size, and errors that end it."""

import hashlib
import os
import random
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from extractor.checkpoint.tensor_file import CopiedPiece, Piece, TensorEntry
from extractor.errors import CheckpointError
from extractor.writing import pipeline
from extractor.writing.outputs import OutputFile
from extractor.writing.pipeline import FileDigest, partial_path, stream

BUFFER = 1000


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "BUFFER_BYTES", BUFFER)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(random.Random(0).randbytes(20_000))
    return path


def copied(source: Path, offset: int, size: int) -> CopiedPiece:
    return CopiedPiece(TensorEntry("t", source, "U8", (size,), offset, size), offset, size)


def output(name: str, source: Path, head: bytes, ranges: list[tuple[int, int]], spans: bool = True) -> OutputFile:
    """A file of `head` and these ranges of the source; each range is a span."""
    cuts = [len(head)]
    for _, size in ranges:
        cuts.append(cuts[-1] + size)

    def pieces() -> Iterator[Piece]:
        return (copied(source, offset, size) for offset, size in ranges)

    return OutputFile(name, cuts[-1], head, pieces, tuple(cuts) if spans else ())


def wanted(source: Path, head: bytes, ranges: list[tuple[int, int]]) -> bytes:
    content = source.read_bytes()
    return head + b"".join(content[offset : offset + size] for offset, size in ranges)


@pytest.mark.parametrize("size", [1, BUFFER - 8, BUFFER - 7, BUFFER, 2 * BUFFER - 8, 5432])
def test_files_have_the_bytes_and_hashes_of_their_pieces(source: Path, tmp_path: Path, size: int) -> None:
    ranges = [(17, size), (9000, 3), (100, size)]
    (digest,) = stream([output("file", source, b"01234567", ranges)], tmp_path)
    content = (tmp_path / "file").read_bytes()
    assert content == wanted(source, b"01234567", ranges)
    spans = [content[8 : 8 + size], content[8 + size : 11 + size], content[11 + size :]]
    assert digest == FileDigest(
        "file",
        len(content),
        hashlib.sha256(content).hexdigest(),
        tuple(xxhash.xxh3_64_hexdigest(span) for span in spans),
    )
    assert not partial_path(tmp_path, "file").exists()


def test_hashing_alone_gives_the_same_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    files = [output(f"file{i}", source, b"head", [(i, 1500), (0, i + 1)]) for i in range(9)]
    written = {digest.name: digest for digest in stream(files, tmp_path)}
    before = sorted(tmp_path.iterdir())
    assert {digest.name: digest for digest in stream(files, None)} == written
    assert sorted(tmp_path.iterdir()) == before


def test_an_empty_file_is_a_file(source: Path, tmp_path: Path) -> None:
    (digest,) = stream([output("empty", source, b"", [], spans=False)], tmp_path)
    assert (tmp_path / "empty").read_bytes() == b""
    assert digest.sha256 == hashlib.sha256(b"").hexdigest()


def test_every_byte_is_reported_once(source: Path, tmp_path: Path) -> None:
    counted: list[int] = []
    files = [output(f"file{i}", source, b"head", [(0, 700 * i)]) for i in range(1, 9)]
    list(stream(files, tmp_path, counted.append))
    assert sum(counted) == sum(file.file_bytes for file in files)


def test_memory_does_not_grow_with_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "BUFFER_BYTES", 2**20)
    source, size = tmp_path / "sparse", 40 * 2**20
    source.touch()
    os.truncate(source, size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    list(stream([output(f"file{i}", source, b"", [(0, size)]) for i in range(8)], None))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 3 * pipeline.NUM_WORKERS * 2**20


def test_a_source_that_is_too_short_ends_it(source: Path, tmp_path: Path) -> None:
    files = [output(f"file{i}", source, b"", [(0, 5000)]) for i in range(20)]
    files[5] = output("file5", source, b"", [(19_000, 5000)])
    with pytest.raises(CheckpointError, match="became shorter"):
        list(stream(files, tmp_path))
    assert not (tmp_path / "file5").exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "extract"]


def test_a_source_that_is_gone_is_named(source: Path, tmp_path: Path) -> None:
    file = output("file", tmp_path / "absent", b"", [(0, 10)])
    with pytest.raises(CheckpointError, match=r"absent cannot be read: No such file"):
        list(stream([file], tmp_path))


def test_a_target_that_cannot_be_written_is_an_oserror(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(stream([output("no/such/folder", source, b"", [(0, 10)])], tmp_path))


def test_leaving_early_ends_the_workers(source: Path, tmp_path: Path) -> None:
    files = [output(f"file{i}", source, b"", [(0, 20_000)] * 20) for i in range(40)]
    run = stream(files, tmp_path)
    next(run)
    run.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "extract"]
    assert len([path for path in tmp_path.iterdir() if path.suffix != ".partial"]) < 40


def test_a_partial_file_that_is_a_link_is_not_followed(source: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    partial_path(tmp_path, "file").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        list(stream([output("file", source, b"", [(0, 10)])], tmp_path))
    assert victim.read_text() == "precious"
