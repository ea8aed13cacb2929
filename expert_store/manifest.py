"""The manifest: the files and experts that a store holds, and the hashes that prove them intact.

Owns `manifest.json` (format "deepfew-store", version 4 if the trunk has layers in 8 bits, else 3 if the store has
adapters, else 2 if experts are encoded, else 1) and the records that it consists of. Invariant: a `Manifest` returned
by `read_manifest` has no contradictions (sizes, offsets, ids, paths), names only files inside the store's directory,
and was complete when it was written: it is the commit point of a store, written last, by rename.
Sizes and offsets are bytes; `layer` counts the MoE layers from 0; an expert's id is the checkpoint's, per layer.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from expert_store.encoding import RowEncoding
from expert_store.errors import ManifestError
from expert_store.files import replacing

FORMAT = "deepfew-store"
VERSION, ENCODED_VERSION, ADAPTED_VERSION, TRUNK_VERSION = 1, 2, 3, 4
"""Of stores with plain experts, which older programs read too, of those with an encoding, of those with adapters, of
those whose trunk has layers in 8 bits."""
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 512 * 2**20
REMEDY = "; the manifest was damaged or written by another program: extract into an empty directory"

DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
"""Bytes of one element, by the safetensors name of the dtype."""


def _check_inside(name: str) -> str:
    """A path that stays in the store: relative, normalised, printable, without `..`."""
    path = PurePosixPath(name)
    if not name.isprintable() or path.is_absolute() or str(path) != name or not path.parts or ".." in path.parts:
        raise ValueError("a path inside the store")
    return name


_Text = Annotated[str, StringConstraints(max_length=4096)]
_Word = Annotated[str, StringConstraints(pattern=r"^\w+$", max_length=4096)]
_Path = Annotated[str, StringConstraints(max_length=1024), AfterValidator(_check_inside)]
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Xxh3 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
_Ids = Annotated[str, StringConstraints(pattern=r"^[0-9,-]*$")]
_Count = Annotated[int, Field(ge=0, le=2**62)]
_Positive = Annotated[int, Field(ge=1, le=2**62)]


ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class _Record:
    """A part of the document. JSON must have the exact types of the fields, and no other keys."""

    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class Source(_Record):
    """The checkpoint: its name, the fingerprint of its content, and the place where it was read."""

    name: _Text
    fingerprint: _Sha256
    location: _Text


@dataclass(frozen=True, slots=True)
class ModelSpec(_Record):
    """The shape of the model's experts; `num_layers` counts the MoE layers, `num_experts` is per layer."""

    family: _Word
    architecture: _Word
    num_layers: Annotated[int, Field(ge=1, le=100_000)]
    num_experts: Annotated[int, Field(ge=1, le=1_000_000)]
    top_k: Annotated[int, Field(ge=1, le=1_000_000)]
    dtype: _Word


@dataclass(frozen=True, slots=True)
class TensorSpec(_Record):
    """One tensor of a span: `shape` without the expert axis, `offset` and `bytes` within the span.

    With an `encoding` the shape is [O, N], output rows first whichever order the model has, the bytes are those of O
    encoded rows, and `dtype` is the one to compute in.
    """

    name: _Word
    dtype: Annotated[str, StringConstraints(pattern=f"^({'|'.join(DTYPE_BYTES)})$")]
    shape: tuple[_Positive, ...]
    offset: _Count
    bytes: _Positive
    encoding: RowEncoding | None = None

    @property
    def bits(self) -> float:
        """Bits of one of its numbers, with its share of scales and padding."""
        return 8 * self.bytes / math.prod(self.shape)

    @property
    def stored(self) -> tuple[str, tuple[int, ...]]:
        """dtype and shape of the tensor in a shard."""
        if self.encoding is None:
            return self.dtype, self.shape
        return "U8", (self.shape[0], self.encoding.row_bytes(self.shape[1]))


@dataclass(frozen=True, slots=True)
class LayerSpec(_Record):
    """MoE layer `layer` is the model's layer `model_layer`; its experts live in `module`, one span of bytes each."""

    layer: _Count
    model_layer: _Count
    module: Annotated[str, StringConstraints(pattern=r"^[\w.]+$", max_length=4096)]
    span_bytes: _Positive
    tensors: tuple[TensorSpec, ...]

    @property
    def is_encoded(self) -> bool:
        """Whether a tensor of the span is in fewer bits."""
        return any(tensor.encoding is not None for tensor in self.tensors)


def expert_encodings(layers: Iterable[LayerSpec]) -> dict[str, str]:
    """The encoding of the experts' encoded tensors in words, by the tensors' names."""
    tensors = (tensor for layer in layers for tensor in layer.tensors)
    return {tensor.name: str(tensor.encoding) for tensor in tensors if tensor.encoding is not None}


def expert_bits(layers: Iterable[LayerSpec]) -> float:
    """Bits of one weight of the experts, with its share of scales and padding, mean over all layers."""
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    return 8 * sum(tensor.bytes for tensor in tensors) / sum(math.prod(tensor.shape) for tensor in tensors)


@dataclass(frozen=True, slots=True)
class Alignment(_Record):
    """The way in which experts of different layers were joined to deep experts; `statistics` is free-form JSON."""

    kind: _Text
    statistics: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Making(_Record):
    """The encoding that extraction made of the experts. `statistics` is the hash of the trunk's file with the weights
    of errors by input channel; None if all errors weighed alike.
    """

    experts_dtype: Annotated[str, StringConstraints(pattern=r"^[\w-]+$", max_length=64)]
    statistics: _Sha256 | None = None


@dataclass(frozen=True, slots=True)
class Training(_Record):
    """The training of the experts, which are no longer those of a checkpoint: the fingerprint of the one that they were
    of, the tokens trained, and the name of the adapter that was trained with them."""

    fingerprint: _Sha256
    tokens: _Positive
    adapter: Annotated[str, StringConstraints(pattern=ADAPTER_NAME)]


@dataclass(frozen=True, slots=True)
class DeepExpert(_Record):
    """One shard: `experts[layer]` is the expert of that MoE layer, `span_hashes[layer]` the XXH3-64 of its span."""

    index: _Count
    file: _Path
    bytes: _Positive
    sha256: _Sha256
    data_offset: Annotated[int, Field(ge=8, le=2**62)]
    experts: tuple[_Count, ...]
    span_hashes: tuple[_Xxh3, ...]


@dataclass(frozen=True, slots=True)
class TrunkFile(_Record):
    """One file below `trunk/`; `name` is its path below the store."""

    name: _Path
    bytes: _Count
    sha256: _Sha256


@dataclass(frozen=True, slots=True)
class AdapterFile(_Record):
    """The file of the adapter called `name`; `file` is its path below the store."""

    name: Annotated[str, StringConstraints(pattern=ADAPTER_NAME)]
    file: _Path
    bytes: _Positive
    sha256: _Sha256


@dataclass(frozen=True, slots=True)
class Manifest(_Record):
    """All that a reader knows about a store.

    `deep_experts` ascend by `index`; a store that has shrunk has gaps. `retired_below` is 0, or the index below which
    no new deep expert may be numbered, because a reader may still know the file of a removed one. `made` is None if the
    experts are as shipped, or dequantised. If they were `trained`, the source's fingerprint is of the result.
    `trunk_dtype` tells where the trunk's linear layers in 8 bits come from: the checkpoint has them, or extraction made
    them fp8; None: the trunk has none.
    """

    source: Source
    model: ModelSpec
    layers: tuple[LayerSpec, ...]
    alignment: Alignment
    deep_experts: tuple[DeepExpert, ...]
    trunk: tuple[TrunkFile, ...]
    retired_below: _Positive = 0
    made: Making | None = None
    adapters: tuple[AdapterFile, ...] = ()
    trained: Training | None = None
    trunk_dtype: Literal["shipped", "fp8"] | None = None

    @property
    def next_index(self) -> int:
        """The index of the next deep expert to be added, which no deep expert of the store has or had."""
        return max(self.retired_below, *(deep.index + 1 for deep in self.deep_experts), 0)

    @property
    def absent_experts(self) -> tuple[tuple[int, ...], ...]:
        """For each MoE layer the ids of the experts that are nowhere in the store, ascending."""
        everyone = range(self.model.num_experts)
        held = [{deep.experts[layer] for deep in self.deep_experts} for layer in range(self.model.num_layers)]
        return tuple(tuple(expert for expert in everyone if expert not in here) for here in held)


@dataclass(frozen=True, kw_only=True)
class _Document(Manifest):
    """The JSON document: a manifest, and the members that only the file has."""

    format: Literal["deepfew-store"]
    version: Literal[1, 2, 3, 4]
    absent: Annotated[tuple[_Ids, ...], Field(alias="absent_experts")]


_DOCUMENT = TypeAdapter(_Document)


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
        raise ManifestError(_why_no_manifest(Path(directory))) from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from error
    if len(content) > MAX_MANIFEST_BYTES:
        raise ManifestError(
            f"{path} has more than {MAX_MANIFEST_BYTES} bytes; that is no manifest: extract into an empty directory"
        )
    try:
        return parse_manifest(content)
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}") from None


def _why_no_manifest(directory: Path) -> str:
    if (directory / "config.json").is_file():
        return (
            f"{directory} is a checkpoint, not a store: make a store of it with `deepfew extract {directory} STORE`, "
            "and name that"
        )
    if not directory.exists():
        return f"{directory} does not exist; `deepfew extract CHECKPOINT {directory}` makes a store there"
    return (
        f"{directory} holds no {MANIFEST_NAME}, so it is no store or one whose extraction has not finished; "
        "run the same `deepfew extract` command again, or name another directory"
    )


def write_manifest(directory: str | os.PathLike[str], manifest: Manifest) -> None:
    """Write `directory/manifest.json` so that a reader sees the old one or the whole new one, never a part.

    The files that the manifest names must be on disk (fsync) before. Raises ManifestError, writing nothing, when the
    manifest would not be readable, and OSError.
    """
    content = format_manifest(manifest)
    if parse_manifest(content) != manifest:
        raise ManifestError("the manifest does not survive writing and reading: its statistics must be plain JSON")
    with replacing(Path(directory) / MANIFEST_NAME) as file:
        file.write(content)


def format_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: equal manifests give equal bytes; one line a layer, deep expert and trunk file."""
    version = ENCODED_VERSION if any(layer.is_encoded for layer in manifest.layers) else VERSION
    if manifest.adapters or manifest.trained is not None:
        version = ADAPTED_VERSION
    if manifest.trunk_dtype is not None:
        version = TRUNK_VERSION
    members: list[str] = [f'"format": {json.dumps(FORMAT)}', f'"version": {version}']
    for name in ("source", "model", "alignment"):
        members.append(f'"{name}": {json.dumps(asdict(getattr(manifest, name)), sort_keys=name == "alignment")}')
    absent = [format_ids(ids) for ids in manifest.absent_experts]
    members.append(f'"absent_experts": {json.dumps(absent)}')
    if manifest.retired_below:
        members.append(f'"retired_below": {manifest.retired_below}')
    if manifest.made is not None:
        members.append(f'"made": {json.dumps(asdict(manifest.made))}')
    if manifest.trained is not None:
        members.append(f'"trained": {json.dumps(asdict(manifest.trained))}')
    if manifest.trunk_dtype is not None:
        members.append(f'"trunk_dtype": {json.dumps(manifest.trunk_dtype)}')
    for name in ("layers", "deep_experts", "trunk", *(["adapters"] if manifest.adapters else [])):
        items = ",\n  ".join(json.dumps(asdict(item, dict_factory=_without_none)) for item in getattr(manifest, name))
        members.append(f'"{name}": [\n  {items}\n ]')
    return ("{\n " + ",\n ".join(members) + "\n}\n").encode()


def _without_none(members: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in members if value is not None}


def parse_manifest(content: bytes) -> Manifest:
    """The manifest in `content`, checked. Raises ManifestError, which says where, what it got and what it wanted."""
    try:
        document = _DOCUMENT.validate_json(content)
    except ValidationError as error:
        raise ManifestError(_refusal(error)) from None
    manifest = Manifest(**{one.name: getattr(document, one.name) for one in fields(Manifest)})
    for layer in manifest.layers:
        _check_span(layer)
    _check_consistency(manifest)
    if document.absent != tuple(format_ids(ids) for ids in manifest.absent_experts):
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


def _refusal(error: ValidationError) -> str:
    """The first fault that pydantic found, in words; a wrong format or version comes before all others."""
    details = error.errors(include_url=False)
    for one in details:
        if one["loc"] == ("format",) and one["type"] != "missing":
            return f"format is {one['input']!r}, wanted {FORMAT!r}; this is no deepfew store"
    for one in details:
        if one["loc"] == ("version",) and one["type"] != "missing":
            return (
                f"version is {one['input']!r}, this program reads versions {VERSION} to {TRUNK_VERSION}; "
                "use the deepfew that wrote the store, or extract into an empty directory"
            )
    return _fault(details[0]) + REMEDY


def _fault(one: ErrorDetails) -> str:
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in one["loc"]).removeprefix(".")
    match one["type"]:
        case "json_invalid":
            return f"it is not JSON ({one['ctx']['error']})"
        case "missing":
            return f"{where} is missing"
        case "unexpected_keyword_argument":
            parent, _, key = where.rpartition(".")
            return f"{parent or 'the document'} has the unknown key {key}"
        case "dataclass_type" | "dict_type":
            wanted = "an object"
        case "tuple_type":
            wanted = "a list"
        case "string_pattern_mismatch":
            wanted = f"something like {one['ctx']['pattern']}"
        case "value_error":
            wanted = str(one["ctx"]["error"])
        case _:
            wanted = one["msg"].removeprefix("Input should be ")
    return f"{where or 'the document'} is {_kind(one['input'])}, wanted {wanted}"


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return repr(value[:80])
    names = {dict: "an object", list: "a list", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"the number {value!r}"[:60])


def _check_span(layer: LayerSpec) -> None:
    """The tensors fill the span, one after the other, and each has the bytes of its shape and dtype."""
    where, end = f"layers[{layer.layer}]", 0
    for position, tensor in enumerate(layer.tensors):
        if tensor.offset != end:
            raise ManifestError(f"{where}: {tensor.name} is at {tensor.offset}, wanted {end}{REMEDY}")
        try:
            dtype, shape = tensor.stored
        except (ValueError, IndexError) as error:
            raise ManifestError(f"{where}.tensors[{position}].encoding: {error}{REMEDY}") from None
        wanted = math.prod(shape) * DTYPE_BYTES[dtype]
        if tensor.bytes != wanted:
            raise ManifestError(
                f"{where}.tensors[{position}].bytes is {tensor.bytes}, its shape and dtype need {wanted}{REMEDY}"
            )
        end += tensor.bytes
    if end != layer.span_bytes or len({tensor.name for tensor in layer.tensors}) != len(layer.tensors):
        raise ManifestError(f"{where}: the tensors do not fill span_bytes {layer.span_bytes} once{REMEDY}")


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
    for position, file in enumerate(manifest.trunk):
        if not file.name.startswith("trunk/"):
            raise ManifestError(f"trunk[{position}].name is {file.name!r}, wanted a path below trunk/{REMEDY}")
    for position, adapter in enumerate(manifest.adapters):
        if not adapter.file.startswith("adapters/"):
            raise ManifestError(f"adapters[{position}].file is {adapter.file!r}, wanted a path below adapters/{REMEDY}")
    if len({adapter.name for adapter in manifest.adapters}) != len(manifest.adapters):
        raise ManifestError(f"two adapters have one name{REMEDY}")
    files = [deep.file for deep in manifest.deep_experts] + [file.name for file in manifest.trunk]
    files += [adapter.file for adapter in manifest.adapters]
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
