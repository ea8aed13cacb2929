"""The statistics file: one safetensors file with a versioned description in its metadata, written atomically.

Invariant: `read_statistics` returns bit for bit what `write_statistics` wrote, and refuses any other file with the
reason. Totals are float64, samples float16 and uint16.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from expert_store.files import replacing
from extractor.statistics.channels import ChannelSquares
from extractor.statistics.sample import KeyedSample
from extractor.statistics.statistics import (
    TOTALS,
    WINDOW_TOKENS,
    EncodingPoint,
    ExpertStatistics,
    PricePoint,
    StatisticsError,
)

FORMAT = "deepfew-statistics"
VERSION = 1
MAX_FILE_BYTES = 8 << 30

Arrays = dict[str, npt.NDArray[np.generic]]


def write_statistics(path: Path, statistics: ExpertStatistics) -> None:
    """Write `statistics` to `path`, replacing the file as a whole. Raises OSError."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": statistics.fingerprint,
        "num_layers": statistics.num_layers,
        "num_experts": statistics.num_experts,
        "top_k": statistics.top_k,
        "expert_bytes": statistics.expert_bytes,
        "trunk_bytes": statistics.trunk_bytes,
        "window_tokens": WINDOW_TOKENS,
        "domains": statistics.domains,
        "price": [dataclasses.asdict(point) for point in statistics.price],
        "encodings": [dataclasses.asdict(point) for point in statistics.encodings],
    }
    arrays: Arrays = {
        **statistics.totals,
        "num_tokens": statistics.num_tokens,
        "coactivation": statistics.coactivation,
    }
    for name, sample in (("windows", statistics.windows), ("tokens", statistics.tokens)):
        arrays |= {f"{name}.keys": sample.keys.view(np.int64), f"{name}.domains": sample.domains}
        arrays |= {f"{name}.{part}": array for part, array in sample.arrays.items()}
    if statistics.weight_flatness is not None:
        arrays["weight_flatness"] = statistics.weight_flatness
    if statistics.channels is not None:
        arrays["channels.picks"] = statistics.channels.picks
        for layer in range(statistics.num_layers):
            arrays[f"channels.input.{layer}"] = statistics.channels.input[layer]
            arrays[f"channels.inner.{layer}"] = statistics.channels.inner[layer]
    contents = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with replacing(path) as file:  # not with the library, whose files only their owner may read
        file.write(save(contents, {"deepfew": json.dumps(header)}))


def read_statistics(path: Path) -> ExpertStatistics:
    """Read a statistics file.

    Raises:
        StatisticsError: it is no statistics file, has an unknown version, or its arrays do not fit together.
        OSError: it cannot be read.
    """
    if path.is_dir():  # the library would report a missing device
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.stat().st_size > MAX_FILE_BYTES:
        raise StatisticsError(f"{path} is larger than {MAX_FILE_BYTES} bytes: no statistics file")
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {}).get("deepfew", "{}"))
            _check_version(path, header)
            arrays: Arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise StatisticsError(f"{path} is no statistics file ({error}): write it with `deepfew calibrate`") from error
    try:
        return _statistics(header, arrays)
    except StatisticsError as error:
        raise StatisticsError(f"{path}: {error}; write it again with `deepfew calibrate`") from None
    except (KeyError, TypeError, ValueError) as error:
        raise StatisticsError(f"{path} is damaged ({error!r}); write it again with `deepfew calibrate`") from error


def _check_version(path: Path, header: Any) -> None:
    found = [header.get(name) for name in ("format", "version")] if isinstance(header, dict) else [None, None]
    if found != [FORMAT, VERSION]:
        raise StatisticsError(
            f"{path} is {found[0]} version {found[1]}, wanted {FORMAT} version {VERSION}: write it again with "
            "`deepfew calibrate`"
        )


def _statistics(header: dict[str, Any], arrays: Arrays) -> ExpertStatistics:
    if header["window_tokens"] != WINDOW_TOKENS:
        raise StatisticsError(f"its windows have {header['window_tokens']} tokens, wanted {WINDOW_TOKENS}")
    loaded = ExpertStatistics(
        fingerprint=str(header["fingerprint"]),
        num_layers=int(header["num_layers"]),
        num_experts=int(header["num_experts"]),
        top_k=int(header["top_k"]),
        expert_bytes=int(header["expert_bytes"]),
        trunk_bytes=int(header["trunk_bytes"]),
        domains=[str(name) for name in header["domains"]],
    )
    loaded.num_tokens = _array(arrays, "num_tokens", loaded.num_tokens.shape).astype(np.int64)
    for name in TOTALS:
        loaded.totals[name] = _array(arrays, name, loaded.totals[name].shape).astype(np.float64)
    loaded.coactivation = _array(arrays, "coactivation", loaded.coactivation.shape).astype(np.float64)
    _fill(loaded.windows, "windows", arrays, len(loaded.domains))
    _fill(loaded.tokens, "tokens", arrays, len(loaded.domains))
    if "weight_flatness" in arrays:
        shape = (loaded.num_layers, loaded.num_experts)
        loaded.weight_flatness = _array(arrays, "weight_flatness", shape).astype(np.float64)
    if "channels.picks" in arrays:
        loaded.channels = _channels(arrays, loaded.num_layers, loaded.num_experts)
    loaded.price = [_price_point(point) for point in header["price"]]
    loaded.encodings = [_encoding_point(point) for point in header.get("encodings", ())]  # older files have none
    if loaded.tokens.arrays["experts"].size and int(loaded.tokens.arrays["experts"].max()) > loaded.num_experts:
        raise StatisticsError(f"a token names an expert above {loaded.num_experts}")
    return loaded


def _price_point(item: dict[str, Any]) -> PricePoint:
    """Price points; `part`, `per_layer` and `is_wrong` were added later, and get defaults in older files."""
    return PricePoint(
        domain=str(item["domain"]),
        deficit=float(item["deficit"]),
        loss_change=float(item["loss_change"]),
        num_tokens=int(item["num_tokens"]),
        kept_share=float(item["kept_share"]),
        part=int(item.get("part", 0)),
        per_layer=tuple(float(value) for value in item.get("per_layer", ())),
        is_wrong=bool(item.get("is_wrong", False)),
    )


def _encoding_point(item: dict[str, Any]) -> EncodingPoint:
    return EncodingPoint(
        domain=str(item["domain"]),
        experts_dtype=str(item["experts_dtype"]),
        expert_bytes=int(item["expert_bytes"]),
        loss_change=float(item["loss_change"]),
        num_tokens=int(item["num_tokens"]),
    )


def _channels(arrays: Arrays, num_layers: int, num_experts: int) -> ChannelSquares:
    channels = ChannelSquares(num_layers, num_experts)
    channels.picks = _array(arrays, "channels.picks", channels.picks.shape).astype(np.float64)
    for layer in range(num_layers):
        width, inner = arrays[f"channels.input.{layer}"].shape, arrays[f"channels.inner.{layer}"].shape[1:]
        channels.input[layer] = _array(arrays, f"channels.input.{layer}", (*width[:1],)).astype(np.float64)
        channels.inner[layer] = _array(arrays, f"channels.inner.{layer}", (num_experts, *inner[:1])).astype(np.float64)
    return channels


def _fill(sample: KeyedSample, name: str, arrays: Arrays, num_domains: int) -> None:
    count = len(arrays[f"{name}.keys"])
    domains = _array(arrays, f"{name}.domains", (count,)).astype(np.int32)
    if count and not 0 <= int(domains.min()) <= int(domains.max()) < num_domains:
        raise StatisticsError(f"{name} name a domain that does not exist")
    parts = {part: _array(arrays, f"{name}.{part}", (count, *array.shape[1:])) for part, array in sample.arrays.items()}
    sample.offer(arrays[f"{name}.keys"].astype(np.int64).view(np.uint64), domains, parts)


def _array(arrays: Arrays, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if name not in arrays or arrays[name].shape != shape:
        raise StatisticsError(f"{name} has shape {arrays[name].shape if name in arrays else 'nothing'}, wanted {shape}")
    return arrays[name]
