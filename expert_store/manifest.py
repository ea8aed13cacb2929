"""The manifest: what a store holds, where, and how to know that it is intact.

Owns `manifest.json` (format "deepfew-store", version 1). Invariant: a `Manifest` returned by
`read_manifest` is free of contradictions (sizes, offsets, ids, paths), names only files below the store's directory,
and was complete when it was written: it is the commit point of a store, written last, by rename.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path, PurePosixPath

from expert_store.errors import ManifestError
from expert_store.fields import REMEDY, Fields
from expert_store.records import (
    DTYPE_BYTES,
    Alignment,
    DeepExpert,
    LayerSpec,
    Manifest,
    ModelSpec,
    Source,
    TensorSpec,
    TrunkFile,
)

__all__ = [
    "DTYPE_BYTES",
    "Alignment",
    "DeepExpert",
    "LayerSpec",
    "Manifest",
    "ModelSpec",
    "Source",
    "TensorSpec",
    "TrunkFile",
    "format_ids",
    "format_manifest",
    "parse_manifest",
    "read_manifest",
    "sync_directory",
    "write_manifest",
]

FORMAT = "deepfew-store"
VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 512 * 2**20


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check `directory/manifest.json`.

    Raises ManifestError when there is none (the store is missing or was never finished), when its version is unknown,
    or when it contradicts itself. Touches no other file.
    """
    path = Path(directory) / MANIFEST_NAME
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise ManifestError(
            f"{directory} holds no {MANIFEST_NAME}, so it is no store or one whose extraction has not finished; "
            "run the same `deepfew extract` command again, or name another directory"
        ) from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error
    if len(content) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{path} has more than {MAX_MANIFEST_BYTES} bytes; that is no manifest: extract again")
    try:
        return parse_manifest(content)
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}") from None


def write_manifest(directory: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write `directory/manifest.json` so that a reader sees the old one or the whole new one, never a part.

    The files that the manifest names must be on disk (fsync) before. Raises ManifestError, writing nothing, when the
    manifest would not be readable.
    """
    content = format_manifest(manifest)
    if parse_manifest(content) != manifest:
        raise ManifestError("the manifest does not survive writing and reading: its statistics must be plain JSON")
    path = Path(directory) / MANIFEST_NAME
    partial = path.with_name(MANIFEST_NAME + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_directory(path.parent)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Make renames and new names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def format_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: equal manifests give equal bytes; one line a layer, deep expert and trunk file."""
    members: list[str] = [f'"format": {json.dumps(FORMAT)}', f'"version": {VERSION}']
    for name in ("source", "model", "alignment"):
        members.append(f'"{name}": {json.dumps(asdict(getattr(manifest, name)), sort_keys=name == "alignment")}')
    absent = [format_ids(ids) for ids in manifest.absent_experts]
    members.append(f'"absent_experts": {json.dumps(absent)}')
    if manifest.retired_below:
        members.append(f'"retired_below": {manifest.retired_below}')
    for name in ("layers", "deep_experts", "trunk"):
        items = ",\n  ".join(json.dumps(asdict(item)) for item in getattr(manifest, name))
        members.append(f'"{name}": [\n  {items}\n ]')
    return ("{\n " + ",\n ".join(members) + "\n}\n").encode()


def parse_manifest(content: bytes) -> Manifest:
    """The manifest in `content`, checked. Raises ManifestError."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"it is not JSON ({error}){REMEDY}") from None
    top = Fields(document, "")
    if top.take("format") != FORMAT:
        raise ManifestError(f"format is {top.take('format')!r}, wanted {FORMAT!r}; this is no deepfew store")
    if top.take("version") != VERSION:
        raise ManifestError(
            f"version is {top.take('version')!r}, this program reads version {VERSION}; "
            "use the deepfew that wrote the store, or extract it again"
        )
    manifest = Manifest(
        source=_source(top.child("source")),
        model=_model(top.child("model")),
        layers=tuple(_layer(item) for item in top.children("layers")),
        alignment=_alignment(top.child("alignment")),
        deep_experts=tuple(_deep_expert(item) for item in top.children("deep_experts")),
        trunk=tuple(_trunk_file(item) for item in top.children("trunk")),
        retired_below=top.integer("retired_below", 1) if top.has("retired_below") else 0,
    )
    absent = top.strings("absent_experts", r"[0-9,-]*")
    top.finish()
    _check_consistency(manifest)
    if absent != tuple(format_ids(ids) for ids in manifest.absent_experts):
        raise ManifestError(f"absent_experts is not what deep_experts leaves over{REMEDY}")
    return manifest


def format_ids(ids: Iterable[int]) -> str:
    """Ascending ids as ranges: (0, 1, 2, 12) gives "0-2,12"."""
    runs: list[list[int]] = []
    for expert in ids:
        if runs and runs[-1][1] == expert - 1:
            runs[-1][1] = expert
        else:
            runs.append([expert, expert])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _source(fields: Fields) -> Source:
    source = Source(fields.string("name"), fields.string("fingerprint", r"[0-9a-f]{64}"), fields.string("location"))
    fields.finish()
    return source


def _model(fields: Fields) -> ModelSpec:
    model = ModelSpec(
        family=fields.string("family", r"\w+"),
        architecture=fields.string("architecture", r"\w+"),
        num_layers=fields.integer("num_layers", 1, 100_000),
        num_experts=fields.integer("num_experts", 1, 1_000_000),
        top_k=fields.integer("top_k", 1, 1_000_000),
        dtype=fields.string("dtype", r"\w+"),
    )
    fields.finish()
    return model


def _layer(fields: Fields) -> LayerSpec:
    layer = LayerSpec(
        layer=fields.integer("layer"),
        model_layer=fields.integer("model_layer"),
        module=fields.string("module", r"[\w.]+"),
        span_bytes=fields.integer("span_bytes", 1),
        tensors=tuple(_tensor(item) for item in fields.children("tensors")),
    )
    fields.finish()
    end = 0
    for tensor in layer.tensors:
        if tensor.offset != end:
            raise ManifestError(f"{fields.where}: {tensor.name} is at {tensor.offset}, wanted {end}{REMEDY}")
        end += tensor.bytes
    if end != layer.span_bytes or len({tensor.name for tensor in layer.tensors}) != len(layer.tensors):
        raise ManifestError(f"{fields.where}: the tensors do not fill span_bytes {layer.span_bytes} once{REMEDY}")
    return layer


def _tensor(fields: Fields) -> TensorSpec:
    tensor = TensorSpec(
        name=fields.string("name", r"\w+"),
        dtype=fields.string("dtype", "|".join(DTYPE_BYTES)),
        shape=fields.integers("shape", 1),
        offset=fields.integer("offset"),
        bytes=fields.integer("bytes", 1),
    )
    fields.finish()
    wanted = math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
    if tensor.bytes != wanted:
        raise ManifestError(f"{fields.where}.bytes is {tensor.bytes}, its shape and dtype need {wanted}{REMEDY}")
    return tensor


def _alignment(fields: Fields) -> Alignment:
    alignment = Alignment(fields.string("kind"), fields.mapping("statistics"))
    fields.finish()
    return alignment


def _deep_expert(fields: Fields) -> DeepExpert:
    deep = DeepExpert(
        index=fields.integer("index"),
        file=_relative(fields, "file"),
        bytes=fields.integer("bytes", 1),
        sha256=fields.string("sha256", r"[0-9a-f]{64}"),
        data_offset=fields.integer("data_offset", 8),
        experts=fields.integers("experts"),
        span_hashes=fields.strings("span_hashes", r"[0-9a-f]{16}"),
    )
    fields.finish()
    return deep


def _trunk_file(fields: Fields) -> TrunkFile:
    file = TrunkFile(_relative(fields, "name"), fields.integer("bytes"), fields.string("sha256", r"[0-9a-f]{64}"))
    fields.finish()
    if not file.name.startswith("trunk/"):
        raise ManifestError(f"{fields.where}.name is {file.name!r}, wanted a path below trunk/{REMEDY}")
    return file


def _relative(fields: Fields, key: str) -> str:
    """A path that stays below the store: relative, normalised, printable, without `..`."""
    name = fields.string(key, max_length=1024)
    path = PurePosixPath(name)
    if not name.isprintable() or path.is_absolute() or str(path) != name or not path.parts or ".." in path.parts:
        raise ManifestError(f"{fields.path(key)} is {name!r}, wanted a path inside the store{REMEDY}")
    return name


def _check_consistency(manifest: Manifest) -> None:
    model, layers = manifest.model, manifest.layers
    if [spec.layer for spec in layers] != list(range(model.num_layers)):
        raise ManifestError(f"layers lists {len(layers)} layers, wanted 0 to {model.num_layers - 1} in order{REMEDY}")
    if not _ascending([spec.model_layer for spec in layers]):
        raise ManifestError(f"layers: model_layer does not ascend{REMEDY}")
    if model.top_k > model.num_experts:
        raise ManifestError(f"model.top_k is {model.top_k}, more than num_experts {model.num_experts}{REMEDY}")
    if not manifest.deep_experts:
        raise ManifestError(f"deep_experts is empty, a store holds at least one{REMEDY}")
    files = [deep.file for deep in manifest.deep_experts] + [file.name for file in manifest.trunk]
    if len(set(files)) != len(files) or MANIFEST_NAME in files:
        raise ManifestError(f"two entries name the same file{REMEDY}")
    if not _ascending([deep.index for deep in manifest.deep_experts]):
        raise ManifestError(f"deep_experts: index does not ascend{REMEDY}")
    taken: list[set[int]] = [set() for _ in layers]
    for position, deep in enumerate(manifest.deep_experts):
        where = f"deep_experts[{position}]"
        if len(deep.experts) != len(layers) or len(deep.span_hashes) != len(layers):
            raise ManifestError(f"{where}: wanted {len(layers)} experts and hashes{REMEDY}")
        for layer, expert in enumerate(deep.experts):
            if expert >= model.num_experts or expert in taken[layer]:
                raise ManifestError(
                    f"{where}.experts[{layer}] is {expert}, wanted an id below {model.num_experts} "
                    f"that no other deep expert has in this layer{REMEDY}"
                )
            taken[layer].add(expert)


def _ascending(values: Sequence[int]) -> bool:
    return all(before < after for before, after in pairwise(values))
