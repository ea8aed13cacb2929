"""The likeness of a request: few bytes that say how it begins, whose it is and what it is about, made without a model.

It is made of the body that a client sent, whatever its dialect. Invariant: bodies whose conversations begin with the
same bytes, and whose keys and values depend on the same mask, temperature and adapter, share the hashes of that
beginning; no text can be read back from a likeness.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

BLOCK_BYTES = 256
"""Bytes of a beginning between two of its hashes."""
MAX_BLOCKS = 256
WORD_BUCKETS = 512
MAX_WORDS = 400
TEXT_FIELDS = ("system", "tools", "instructions", "messages", "input", "inputs", "prompt")
"""Fields of all dialects that make the prompt, in the order in which it is made of them."""
SALT_FIELDS = ("profile", "adapter", "router_temperature", "on_missing")
"""Fields on which keys and values of a prompt depend; a pool's prompt is read without a mask."""
_WORD = re.compile(r"[^\W_]{2,}")


@dataclass(frozen=True)
class Likeness:
    """A request as a router sees it.

    Attributes:
        beginning: hashes of its first 1, 2, … blocks; each covers all before it, and the salt.
        keys: hashes of what it belongs to, the most telling first: conversation, profile, beginning.
        words: bool [WORD_BUCKETS], the buckets of its words.
        num_bytes: of its text, from which `beginning` is made.
    """

    beginning: tuple[int, ...]
    keys: tuple[int, ...]
    words: npt.NDArray[np.bool_]
    num_bytes: int = 0


def likeness_of(body: Mapping[str, Any]) -> Likeness:
    """The likeness of a request's parsed body; anything that is no request has an empty one."""
    parts = [_bytes_of(value) for field in TEXT_FIELDS if (value := body.get(field)) is not None]
    whole = b"".join(parts)
    text = whole[: BLOCK_BYTES * MAX_BLOCKS]
    named = [
        ("conversation", body.get("prompt_cache_key") or body.get("user") or _user_of(body.get("metadata"))),
        ("profile", profile_of(body)),
        ("beginning", _hash(text[:BLOCK_BYTES]) if len(text) >= BLOCK_BYTES else None),
    ]
    keys = tuple(_hash(_encoded(f"{kind}:{value}")) for kind, value in named if value)
    salt = [(name, value) for name in SALT_FIELDS if (value := _mask_field(body, name)) is not None]
    beginning = _block_hashes(text, _encoded(repr(salt)) if salt else b"")
    return Likeness(beginning, keys, words_of(text.decode(errors="ignore")), len(whole))


def profile_of(body: Mapping[str, Any]) -> str | None:
    """The name of the profile that a body asks for, whatever its dialect; None if it asks for none."""
    profile = _mask_field(body, "profile")
    return profile if isinstance(profile, str) else None


def _mask_field(body: Mapping[str, Any], name: str) -> Any:
    parameters = body.get("parameters")
    inner = parameters.get(name) if isinstance(parameters, dict) else None
    return body.get(name) if inner is None else inner


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def parsed_body(body: bytes) -> dict[str, Any] | None:
    """The object of a JSON body; None for any other, which a replica refuses with the reason."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def words_of(text: str) -> npt.NDArray[np.bool_]:
    """The buckets of a text's last words, bool [WORD_BUCKETS]; the last ones, since a conversation's topic moves on."""
    words = np.zeros(WORD_BUCKETS, dtype=np.bool_)
    for word in _WORD.findall(text.lower())[-MAX_WORDS:]:
        words[_hash(word.encode()) % WORD_BUCKETS] = True
    return words


def _bytes_of(value: Any) -> bytes:
    """A field of the prompt as bytes; a list is its items one after the other, so that a longer one continues it."""
    if isinstance(value, str):
        return _encoded(value)
    items = value if isinstance(value, list) else [value]
    return b"".join(_encoded(json.dumps(item, sort_keys=True, ensure_ascii=False)) for item in items)


def _block_hashes(text: bytes, salt: bytes) -> tuple[int, ...]:
    state, hashes = xxhash.xxh3_64(salt), []
    for start in range(0, len(text) - BLOCK_BYTES + 1, BLOCK_BYTES):
        state.update(text[start : start + BLOCK_BYTES])
        hashes.append(state.intdigest())
    return tuple(hashes)


def _user_of(metadata: Any) -> Any:
    return metadata.get("user_id") if isinstance(metadata, dict) else None


def _hash(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)
