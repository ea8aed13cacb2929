"""The files of a store as functions of the checkpoint: names, sizes and the source of every byte.

Invariant: an `OutputFile` depends on the checkpoint's content and the selection alone, so writing or hashing it again
gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expert_store.manifest import DTYPE_BYTES, Manifest
from expert_store.shard import ShardLayout, encode_header, shard_name
from extractor.checkpoint.checkpoint import WEIGHTS_KEY, Checkpoint
from extractor.checkpoint.quantised import CONFIG_KEYS, MODELOPT_CONFIG
from extractor.checkpoint.tensor_file import Piece, TensorEntry
from extractor.encoding.importance import FILE_NAME
from extractor.writing.linears import OutputTensor, made_tensors, shipped_tensors

if TYPE_CHECKING:
    from extractor.checkpoint.layout import ExpertsLayout

MAX_TRUNK_FILE_BYTES = 4 * 10**9
WEIGHTS_STEM = "trunk/model"


@dataclass(frozen=True)
class OutputFile:
    """A file of the store: `head`, then the pieces. `cuts` are the file offsets between which spans lie."""

    name: str
    file_bytes: int
    head: bytes
    pieces: Callable[[], Iterator[Piece]]
    cuts: tuple[int, ...] = ()

    @property
    def is_side_file(self) -> bool:
        """Whether it is a small file, such as a config or a tokenizer's file, with all of its bytes in `head`."""
        return not self.cuts and self.file_bytes == len(self.head)


def shard_indices(existing: Manifest | None, num_deep_experts: int) -> list[int]:
    """The index of each deep expert of a store: existing ones keep theirs, and new ones get larger, unused indices."""
    held = [] if existing is None else [deep.index for deep in existing.deep_experts]
    first = 0 if existing is None else existing.next_index
    return held + list(range(first, first + num_deep_experts - len(held)))


def shard_output(layout: ExpertsLayout, index: int, experts: tuple[int, ...]) -> OutputFile:
    """The shard of deep expert `index`."""
    return shard_file(ShardLayout(layout.layers, index, experts), layout.span)


def shard_file(shard: ShardLayout, span: Callable[[int, int], Iterator[Piece]]) -> OutputFile:
    """A shard, the bytes of whose spans are those of `span(layer, expert)`."""

    def pieces() -> Iterator[Piece]:
        for layer, expert in enumerate(shard.experts):
            yield from span(layer, expert)

    cuts = (*shard.span_offsets, shard.file_bytes)
    return OutputFile(shard_name(shard.index), shard.file_bytes, shard.header, pieces, cuts)


def trunk_outputs(
    checkpoint: Checkpoint,
    trunk: Sequence[TensorEntry],
    max_file_bytes: int = MAX_TRUNK_FILE_BYTES,
    shipped: Collection[str] = (),
    made: Collection[str] = (),
    family: str | None = None,
) -> list[OutputFile]:
    """The files below trunk/: side files, and the tensors under their names, as in `weights_outputs`; those in
    `shipped` and `made` are linear layers in 8 bits (`linears`). The config gets the model type `family` in the place
    of one of the checkpoint's own code."""
    sidecars = [_sidecar(path, family) for path in checkpoint.sidecars if path.name != MODELOPT_CONFIG]
    tensors: list[OutputTensor] = []
    for entry in trunk:
        if entry.name in shipped:
            tensors += shipped_tensors(entry)
        elif entry.name in made:
            tensors += made_tensors(entry)
        else:
            tensors.append(OutputTensor.of(entry))
    return sidecars + weights_outputs(WEIGHTS_STEM, tensors, max_file_bytes)


def weights_outputs(stem: str, tensors: Sequence[OutputTensor], max_file_bytes: int) -> list[OutputFile]:
    """Files of at most `max_file_bytes` with the tensors (one that is larger gets a file of its own).

    They are called `stem`.safetensors; several are numbered and have an index.
    """
    groups = _group(tensors, max_file_bytes)
    if len(groups) == 1:
        return [_tensors(f"{stem}.safetensors", groups[0])]
    names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    weight_map = {tensor.name: Path(name).name for name, group in zip(names, groups, strict=True) for tensor in group}
    index = {"metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)}, "weight_map": weight_map}
    files = [_tensors(name, group) for name, group in zip(names, groups, strict=True)]
    return [file_of(f"{stem}.safetensors.index.json", json_bytes(index)), *files]


def all_trunk_outputs(layout: ExpertsLayout) -> list[OutputFile]:
    """The files below trunk/, with the weights of errors if the experts were made with some."""
    outputs = trunk_outputs(
        layout.checkpoint, layout.trunk, shipped=layout.shipped, made=layout.made, family=layout.model.family
    )
    if layout.maker is not None and layout.maker.importance is not None:
        outputs.append(file_of(FILE_NAME, layout.maker.importance.content))
    return outputs


def _group(trunk: Sequence[OutputTensor], max_file_bytes: int) -> list[list[OutputTensor]]:
    """Wide dtypes first, so that every tensor is aligned to its dtype; then by name, so that the order of the
    checkpoint's files does not matter."""
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in sorted(trunk, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name)):
        if groups[-1] and filled + tensor.num_bytes > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.num_bytes
    return groups


def _tensors(name: str, group: Sequence[OutputTensor]) -> OutputFile:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in group:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.num_bytes],
        }
        at += tensor.num_bytes
    head = encode_header(entries)

    def pieces() -> Iterator[Piece]:
        return chain.from_iterable(tensor.pieces() for tensor in group)

    return OutputFile(name, len(head) + at, head, pieces)


def _sidecar(path: Path, family: str | None) -> OutputFile:
    """A side file as it is, without references to the checkpoint's own code, and a config without its quantisation,
    which is undone here, and without the name of a weights file, which the trunk does not have."""
    content = path.read_bytes()
    if path.suffix == ".json" and b'"auto_map"' in content:
        told = json.loads(content)
        if path.name == "config.json" and family is not None:
            told["model_type"] = family
        content = json_bytes(_without(told, "auto_map"))
    dropped = (*CONFIG_KEYS, WEIGHTS_KEY)
    if path.name == "config.json" and any(f'"{key}"'.encode() in content for key in dropped):
        config = json.loads(content)
        for key in dropped:
            config = _without(config, key)
        content = json_bytes(config)
    return file_of(f"trunk/{path.name}", content)


def _without(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, name) for key, item in value.items() if key != name}
    return [_without(item, name) for item in value] if isinstance(value, list) else value


def json_bytes(value: Any) -> bytes:
    """A JSON file that people can read."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def file_of(name: str, content: bytes) -> OutputFile:
    """A small file with this content."""
    return OutputFile(name, len(content), content, lambda: iter(()))
