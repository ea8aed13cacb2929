"""The tensors of a pruned checkpoint, by their published names, and where their bytes are.

Experts come from the store's shards, everything else from its trunk. A tensor of the trunk has an axis of experts
exactly where the shapes of the whole and of the pruned model differ, so that no family needs code of its own. Source of
the published names: transformers' own saving. Invariant: a tensor's bytes are made when they are written, at most a few
experts at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from expert_store.manifest import DTYPE_BYTES, LayerSpec
from expert_store.rows import TORCH_DTYPES, plain_values
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.conversion import model_names, publisher
from extractor.checkpoint.quantised import read_part
from extractor.checkpoint.tensor_file import ConvertedPiece, TensorEntry
from extractor.errors import UnsupportedFamilyError
from extractor.exporting.merging import Change, Merging
from extractor.writing.linears import OutputTensor

Kept = Sequence[Sequence[int]]
"""The experts that each MoE layer keeps, ascending."""
NUM_CACHED_EXPERTS = 16
"""Experts in memory: one for each thread that writes, and some that several tensors are made of."""
CHUNK_BYTES = 64 * 2**20
_FURTHER_TOKENS = re.compile(r"(^|\.)(mtp|nextn|draft|eagle|medusa)(_\w+)?(\.|$)")
_FLOATS = ("F32", "F16", "BF16")


def trunk_tensors(
    store: Store, whole: Any, pruned: Any, kept: Kept, dtype: str | None, merging: Merging
) -> list[OutputTensor]:
    """The trunk's tensors without the rows of experts that are not kept.

    Args:
        whole, pruned: the models with all experts and with the kept ones, on the meta device.
        dtype: safetensors name for the tensors of the model's dtype; others, such as biases of float32, stay.
        merging: changes of an adapter.

    Raises:
        UnsupportedFamilyError: an axis of experts cannot be told from others.
    """
    entries = Checkpoint.open(store.trunk_path).tensors
    names = model_names(whole, entries)
    before, after = whole.state_dict(), pruned.state_dict()
    num_layers = whole.config.get_text_config().num_hidden_layers
    tensors = []
    for key, name in names.items():
        wanted = dtype if entries[key].dtype == store.manifest.model.dtype else None
        if name not in before:
            if not _predicts_further_tokens(name, num_layers):
                tensors.append(_copied(entries[key], wanted))
        elif before[name].shape == after[name].shape:
            change = merging.change(name) if entries[key].shape == tuple(before[name].shape) else None
            tensors.append(_copied(entries[key], wanted) if change is None else _merged(entries[key], wanted, change))
        else:
            axis = _experts_axis(entries[key], tuple(before[name].shape), tuple(after[name].shape), store)
            rows = _rows(store, name, entries[key].shape[axis], kept)
            change = merging.change(name) if entries[key].shape == tuple(before[name].shape) else None
            tensors.append(_cut(entries[key], axis, rows, wanted, change))
    return tensors


def _predicts_further_tokens(name: str, num_layers: int) -> bool:
    layer = re.search(r"\.layers\.(\d+)\.", f".{name}")
    return bool(_FURTHER_TOKENS.search(name)) or (layer is not None and int(layer[1]) >= num_layers)


def _experts_axis(entry: TensorEntry, before: tuple[int, ...], after: tuple[int, ...], store: Store) -> int:
    """The axis of `entry` that has experts, from the shapes in the whole and in the pruned model."""
    axes = [axis for axis, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    found = (
        axes
        if entry.shape == before
        else [axis for axis in range(len(entry.shape)) if entry.shape[axis] == before[axes[0]]]
    )
    if len(axes) != 1 or len(found) != 1:
        raise UnsupportedFamilyError(
            f"the family {store.manifest.model.family!r} cannot be exported: {entry.name} {list(entry.shape)} does not "
            f"tell its axis of experts ({list(before)} becomes {list(after)})"
        )
    return found[0]


def _rows(store: Store, name: str, size: int, kept: Kept) -> list[int]:
    """The rows of a tensor that stay: those of kept experts, and those after all experts, such as a pick of none."""
    model = store.manifest.model
    number = re.search(r"\.layers\.(\d+)\.", f".{name}")
    layer = next((one.layer for one in store.manifest.layers if number and one.model_layer == int(number[1])), None)
    if layer is None or size < model.num_experts:
        raise UnsupportedFamilyError(
            f"the family {model.family!r} cannot be exported: {name} has {size} rows of experts and belongs to no "
            f"MoE layer with {model.num_experts}"
        )
    return [*kept[layer], *range(model.num_experts, size)]


def _copied(entry: TensorEntry, dtype: str | None) -> OutputTensor:
    if dtype is None or dtype == entry.dtype:
        return OutputTensor.of(entry)
    rows = entry.shape[0] if entry.shape else 1
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and (n == rows or entry.bytes // n <= CHUNK_BYTES))
    size = math.prod(entry.shape) * DTYPE_BYTES[dtype]

    def load(part: int) -> memoryview:
        return _bytes(read_part(entry, part, parts), dtype)

    def pieces() -> Iterator[ConvertedPiece]:
        for part in range(parts):
            yield ConvertedPiece(size // parts, partial(load, part))

    return OutputTensor(entry.name, dtype, entry.shape, size, pieces)


def _merged(entry: TensorEntry, dtype: str | None, change: Change) -> OutputTensor:
    dtype = dtype or entry.dtype
    size = math.prod(entry.shape) * DTYPE_BYTES[dtype]

    def load() -> memoryview:
        return _bytes(change(read_part(entry)), dtype)

    return OutputTensor(entry.name, dtype, entry.shape, size, lambda: iter((ConvertedPiece(size, load),)))


def _cut(entry: TensorEntry, axis: int, rows: Sequence[int], dtype: str | None, change: Change | None) -> OutputTensor:
    dtype = dtype or entry.dtype
    shape = (*entry.shape[:axis], len(rows), *entry.shape[axis + 1 :])
    size = math.prod(shape) * DTYPE_BYTES[dtype]

    def load() -> memoryview:
        whole = read_part(entry) if change is None else change(read_part(entry))
        return _bytes(whole.index_select(axis, torch.tensor(rows)), dtype)

    return OutputTensor(entry.name, dtype, shape, size, lambda: iter((ConvertedPiece(size, load),)))


def _bytes(tensor: Tensor, dtype: str) -> memoryview:
    stored = tensor.to(TORCH_DTYPES[dtype]) if tensor.is_floating_point() else tensor
    return memoryview(stored.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def experts_tensors(store: Store, whole: Any, kept: Kept, dtype: str | None, merging: Merging) -> list[OutputTensor]:
    """The experts' tensors as checkpoints of the family have them: one for each expert, or one for all of a layer.

    Args: see `trunk_tensors`; experts in fewer bits are dequantised.
    """
    reader = _ExpertsReader(store, whole, dtype, merging)
    return [tensor for spec in store.manifest.layers for tensor in reader.tensors(spec, kept[spec.layer])]


class _ExpertsReader:
    """Reads experts as published tensors. Any thread may call it."""

    def __init__(self, store: Store, whole: Any, dtype: str | None, merging: Merging) -> None:
        self._store, self._whole, self._dtype = store, whole, dtype
        self._gains = [merging.gain(spec) for spec in store.manifest.layers]
        self._publish = publisher(whole, Checkpoint.open(store.trunk_path).tensors)
        self._read = lru_cache(NUM_CACHED_EXPERTS)(self._published_expert)

    def tensors(self, spec: LayerSpec, kept: Sequence[int]) -> list[OutputTensor]:
        """The tensors of one layer.

        Raises:
            UnsupportedFamilyError: transformers publishes the experts neither one by one nor side by side.
        """
        # not the model's own number: transformers leaves a tensor that has a parameter's shape as it is
        together = self._published_shapes(spec, self._store.manifest.model.num_experts + 1)
        alone = self._published_shapes(spec, 1)
        dtypes = {self._dtype or tensor.dtype for tensor in spec.tensors}
        if len(dtypes) > 1:
            raise UnsupportedFamilyError(
                f"the experts of layer {spec.layer} have the dtypes {sorted(dtypes)}: export with --dtype, which gives "
                "all of them one"
            )
        tensors, dtype = [], dtypes.pop()
        for name, shape in alone.items():
            size = math.prod(shape) * DTYPE_BYTES[dtype]
            places = _places(name, list(together), len(kept))
            if places is not None:
                for place, expert in zip(places, kept, strict=True):
                    tensors.append(self._tensor(place, dtype, shape, size, spec, [expert], name))
            elif together.get(name, ())[1:] == shape[1:]:
                fused = (len(kept), *shape[1:])
                tensors.append(self._tensor(name, dtype, fused, size * len(kept), spec, kept, name))
            else:
                raise UnsupportedFamilyError(
                    f"the family {self._store.manifest.model.family!r} cannot be exported: {name} {list(shape)} of one "
                    f"expert is no part of {together.get(name)}"
                )
        return tensors

    def _tensor(
        self,
        place: str,
        dtype: str,
        shape: tuple[int, ...],
        size: int,
        spec: LayerSpec,
        experts: Sequence[int],
        name: str,
    ) -> OutputTensor:
        def load(expert: int) -> memoryview:
            return _bytes(self._read(spec, expert)[name], dtype)

        def pieces() -> Iterator[ConvertedPiece]:
            return (ConvertedPiece(size // len(experts), partial(load, expert)) for expert in experts)

        return OutputTensor(place, dtype, shape, size, pieces)

    def _published_shapes(self, spec: LayerSpec, num_experts: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the published tensors of a layer with so many experts."""
        parameters = self._whole.get_submodule(spec.module).named_parameters(prefix=spec.module, recurse=False)
        values = {name: torch.empty(num_experts, *value.shape[1:], device="meta") for name, value in parameters}
        return {name: tuple(value.shape) for name, value in self._publish(values).items()}

    def _published_expert(self, spec: LayerSpec, expert: int) -> dict[str, Tensor]:
        """The published tensors of a layer that has this expert alone."""
        span = torch.empty(spec.span_bytes, dtype=torch.uint8)
        self._store.read_expert(spec.layer, expert, span)
        is_transposed = self._whole.get_submodule(spec.module).is_transposed
        values, gain = {}, self._gains[spec.layer]
        for name, value in plain_values(spec, span, transposed=is_transposed).items():
            if gain is not None and name.startswith("down_proj"):
                value = value.float() * gain[expert]
            values[f"{spec.module}.{name}"] = value.unsqueeze(0)
        return self._publish(values)


def _places(name: str, together: Sequence[str], num_kept: int) -> list[str] | None:
    """The names of every expert's tensor, where `name` is that of the only one; None if all experts share a tensor."""
    for number in re.finditer(r"(?<=\.)0(?=\.)", name):
        names = [f"{name[: number.start()]}{expert}{name[number.end() :]}" for expert in range(num_kept)]
        if set(names) <= set(together):
            return names
    return None
