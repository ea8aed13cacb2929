"""Named groups of texts for calibration and evaluation: read from files and folders, cut into sequences of tokens.

A *domain* is a name and its documents. Plain files hold documents separated by lines of `<|endoftext|>`; jsonl files
hold one document a line in the key "text". Documents are packed as in training: one after the other, with the
end-of-text token between them, cut every `context` tokens. Files are read line by line, so they may be larger than
memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from server.errors import ServerError

SEPARATOR = "<|endoftext|>"
MIN_SEQUENCE_TOKENS = 32
MAX_DOCUMENT_CHARS = 1 << 22
"""Longer documents are cut into several."""

Half = Literal["all", "even", "odd"]
"""The documents to take: "all", or the "even" or "odd" ones, so that calibration and evaluation use different ones."""


class TextsError(ServerError):
    """The texts cannot be read, or nothing is left of them."""


@dataclass(frozen=True)
class TextOptions:
    """The part of a domain's text to take.

    Attributes:
        context: tokens of a sequence.
        max_tokens: most tokens of a domain.
        half: of the documents, to keep calibration and evaluation apart.
    """

    context: int = 512
    max_tokens: int = 65536
    half: Half = "all"


@dataclass(frozen=True)
class Domain:
    """A name and the files that hold its documents."""

    name: str
    files: tuple[Path, ...]


def find_domains(arguments: Sequence[str]) -> list[Domain]:
    """Domains from `PATH` or `NAME=PATH` each: a file is a domain, a folder is one of all files in it.

    Raises:
        TextsError: a path that does not exist, an empty folder, or one name for two paths.
    """
    domains: dict[str, Domain] = {}
    for argument in arguments:
        name, equals, rest = argument.partition("=")
        path = Path(rest if equals and not Path(argument).exists() else argument)
        name = name if equals and path == Path(rest) else path.stem
        if path.is_dir():
            files = tuple(sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")))
        else:
            files = (path,) if path.is_file() else ()
        if not name:
            raise TextsError(f"{argument}: the domain has no name; write NAME={path}")
        if not files:
            raise TextsError(f"{path}: no text is there; give a file or a folder of files")
        if name in domains:
            raise TextsError(f"two texts are called {name!r}: write OTHER_NAME={path}")
        domains[name] = Domain(name, files)
    if not domains:
        raise TextsError("no texts were given: name at least one file or folder")
    return list(domains.values())


def documents(domain: Domain, half: Half = "all") -> Iterator[str]:
    """The documents of a domain in order, without empty ones.

    Raises:
        TextsError: a jsonl line without "text", or a file that is not UTF-8.
    """
    for number, text in enumerate(text for file in domain.files for text in _file_documents(file)):
        if half == "all" or (half == "even") == (number % 2 == 0):
            yield text


def pack_sequences(
    texts: Iterable[str], encode: Callable[[str], list[int]], separator: int | None, context: int
) -> Iterator[list[int]]:
    """Packed token sequences of `context` tokens. The last may be shorter; it is dropped if it has fewer than
    `MIN_SEQUENCE_TOKENS`.

    Args:
        encode: text → token ids, without special tokens.
        separator: token id to put before each document; None puts nothing.
    """
    held: list[int] = []
    for text in texts:
        if separator is not None:
            held.append(separator)
        held.extend(encode(text))
        while len(held) >= context:
            yield held[:context]
            held = held[context:]
    if len(held) >= MIN_SEQUENCE_TOKENS:
        yield held


def texts_key(domain: Domain) -> list[list[str]]:
    """[path, hash of the bytes] of each file, to see whether the texts have changed. Raises OSError."""
    found = []
    for path in domain.files:
        with open(path, "rb") as file:
            found.append([str(path), hashlib.file_digest(file, "blake2b").hexdigest()[:32]])
    return found


def sequence_key(tokens: Sequence[int]) -> int:
    """A hash of a sequence of tokens, uint64: the same text has the same key everywhere."""
    data = b"".join(token.to_bytes(4, "little") for token in tokens)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _file_documents(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            yield from _json_lines(path, file) if path.suffix == ".jsonl" else _plain(file)
    except UnicodeDecodeError as error:
        raise TextsError(f"{path} is not UTF-8 text ({error}): convert it, or leave it out") from error


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise TextsError(f'{path}, line {number}: wanted a JSON object with the key "text"') from None
        if isinstance(text, str) and text.strip():
            for start in range(0, len(text), MAX_DOCUMENT_CHARS):
                yield text[start : start + MAX_DOCUMENT_CHARS]


def _plain(lines: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for line in lines:
        if line.strip() == SEPARATOR or size > MAX_DOCUMENT_CHARS:
            if text := "".join(held).strip("\n"):
                yield text
            held, size = [], 0
        if line.strip() != SEPARATOR:
            held.append(line)
            size += len(line)
    if text := "".join(held).strip("\n"):
        yield text
