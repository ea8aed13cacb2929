"""The bytes of a checkpoint that form each expert's span.

Owns the map from (MoE layer, expert) to the pieces of its span. A piece is a byte range of a checkpoint file wherever
the in-memory layout is a concatenation of what is on disk (per-expert linears, rows of fused tensors), else a
conversion of one expert's tensors: to encoded rows where the checkpoint has those or they are made, else to plain
values. Invariants: the pieces of a span have together exactly `span_bytes` bytes, in the order of `LayerSpec.tensors`;
a parameter has the same encoding in all layers; every checkpoint tensor that the model reads belongs either to spans or
to the trunk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from expert_store.encoding import RowEncoding
from expert_store.manifest import DTYPE_BYTES, LayerSpec, Manifest, ModelSpec, TensorSpec
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.conversion import Recipe, trace
from extractor.checkpoint.encodings import PLAIN_DTYPES
from extractor.checkpoint.families import check_family
from extractor.checkpoint.quantised import QuantisedEntry, group_of, is_eight_bit, piece_of, read_part, rows_of
from extractor.checkpoint.tensor_file import ConvertedPiece, Piece, TensorEntry
from extractor.encoding.importance import FILE_NAME, Importance
from extractor.encoding.making import Maker
from extractor.encoding.names import ExpertsDtype, TrunkDtype, experts_dtype_of
from extractor.errors import CheckpointError, UnsupportedFamilyError

_MADE = ("_proj.weight", "lm_head.weight")

Part = tuple[TensorEntry, int, int]
"""A tensor of the checkpoint, the number of a part of its first axis, and the number of equal parts."""


@dataclass(frozen=True)
class ExpertsLayout:
    """The experts of a checkpoint. `trunk` are all other tensors; `notes` say what is dequantised, and why; `maker`
    makes the experts smaller, None where they are as shipped or in 16 bits; of the MoE layers in `whole` all experts
    must be extracted. Of the trunk's linear layers those named in `shipped` stay in 8 bits, and those in `made` are
    made so.
    """

    model: ModelSpec
    layers: tuple[LayerSpec, ...]
    recipes: tuple[tuple[Recipe, ...], ...]
    trunk: tuple[TensorEntry, ...]
    checkpoint: Checkpoint
    notes: tuple[str, ...]
    maker: Maker | None
    whole: tuple[int, ...]
    shipped: frozenset[str] = frozenset()
    made: frozenset[str] = frozenset()

    @property
    def trunk_dtype(self) -> Literal["shipped", "fp8"] | None:
        """As the manifest has it."""
        return "fp8" if self.made else "shipped" if self.shipped else None

    @property
    def eight_bit_groups(self) -> dict[str, int]:
        """Columns that share a scale in each of the trunk's linear layers in 8 bits, by the checkpoint's names."""
        return {name: group_of(self.checkpoint.tensors[name]) for name in self.shipped} | {
            name: self.checkpoint.tensors[name].shape[1] for name in self.made
        }

    @classmethod
    def of_store(cls, checkpoint: Checkpoint, manifest: Manifest, root: Path) -> ExpertsLayout:
        """The layout that gives the experts of the store at `root` again. Raises ExtractError."""
        wanted = None if manifest.made is None else manifest.made.statistics
        importance = None if wanted is None else Importance.read(root / FILE_NAME, wanted)
        return cls.of(checkpoint, experts_dtype_of(manifest), importance, manifest.trunk_dtype or "16bit")

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        experts_dtype: ExpertsDtype = "shipped",
        importance: Importance | None = None,
        trunk_dtype: TrunkDtype | None = None,
    ) -> ExpertsLayout:
        """Find the experts of `checkpoint`, to be stored as `experts_dtype`, made with `importance` if they are made;
        the trunk's linear layers are stored as `trunk_dtype`, by default as shipped, or in 16 bits if experts are so.

        Raises UnsupportedFamilyError, CheckpointError, or ExtractError if they cannot be made.
        """
        maker = Maker.of(experts_dtype, importance)
        family = check_family(checkpoint.config, str(checkpoint.path))
        found = trace(checkpoint.path, checkpoint.tensors)
        counts = {recipe.shape[0] for recipes in found.experts.values() for recipe in recipes}
        if len(counts) != 1:
            raise UnsupportedFamilyError(
                f"{checkpoint.path}: its layers have different numbers of experts {sorted(counts)}; only models with "
                "the same number in every MoE layer are supported"
            )
        if found.top_k > min(counts):
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'} gives every token {found.top_k} experts of {min(counts)}; "
                "use the config.json that belongs to the weights"
            )
        encodings, notes = _encodings(checkpoint, found.experts.values()) if experts_dtype == "shipped" else ({}, [])
        layers, recipes = [], []
        for layer, (module, parts) in enumerate(found.experts.items()):
            own = encodings if maker is None else _made(maker, layer, parts)
            layers.append(_layer_spec(checkpoint, layer, module, parts, own))
            recipes.append(parts)
        model = ModelSpec(
            family=family,
            architecture=found.architecture,
            num_layers=len(layers),
            num_experts=counts.pop(),
            top_k=found.top_k,
            dtype=layers[0].tensors[0].dtype,
        )
        trunk = tuple(checkpoint.tensors[key] for key in found.trunk)
        default: TrunkDtype = "16bit" if experts_dtype == "16bit" else "shipped"
        shipped, made = _eight_bits(trunk, found.linears, trunk_dtype or default)
        dequantised = [entry for entry in trunk if isinstance(entry, QuantisedEntry) and entry.name not in shipped]
        if dequantised:
            notes.append(
                f"{len(dequantised)} tensors outside the experts, such as {dequantised[0].name}, are dequantised to "
                f"{dequantised[0].dtype}: only linear layers in FP8 are taken as they are there"
            )
        told = checkpoint.config.get("model_type")
        if told != family:
            notes.append(
                f"config.json says model_type {told}, which is of the checkpoint's own code; it is read as {family}, "
                f"transformers' own type of its architecture {found.architecture}"
            )
        if maker is not None:
            notes += _made_again(checkpoint, found.experts.values(), experts_dtype)
        return cls(
            model, tuple(layers), tuple(recipes), trunk, checkpoint, tuple(notes), maker, found.whole, shipped, made
        )

    def span(self, layer: int, expert: int) -> Iterator[Piece]:
        """The pieces of the span of (MoE layer, expert), in order."""
        for recipe, tensor in zip(self.recipes[layer], self.layers[layer].tensors, strict=True):
            sources = [
                (pattern, *_expert_part(self.checkpoint, recipe, pattern, expert)) for pattern in recipe.source_patterns
            ]
            if tensor.encoding is not None and self.maker is not None:
                make = partial(make_rows, self.maker, layer, expert, recipe, sources)
                yield ConvertedPiece(tensor.bytes, make)
            elif tensor.encoding is not None:
                yield from (rows_of(*part) for _, part, _ in sources)
            elif recipe.is_concatenation:
                yield from (piece_of(*part) for _, part, _ in sources)
            else:
                yield ConvertedPiece(tensor.bytes, partial(convert_expert, recipe, sources))


def _eight_bits(
    trunk: Sequence[TensorEntry], linears: Collection[str], trunk_dtype: TrunkDtype
) -> tuple[frozenset[str], frozenset[str]]:
    """The linear layers of the trunk that stay in 8 bits, and those that are made so: projections and the head, whose
    names end the same in every family."""
    if trunk_dtype == "16bit":
        return frozenset(), frozenset()
    shipped = frozenset(entry.name for entry in trunk if entry.name in linears and is_eight_bit(entry))
    if trunk_dtype == "shipped":
        return shipped, frozenset()
    return shipped, frozenset(name for name in linears if name.endswith(_MADE)) - shipped


Sources = Sequence[tuple[str, Part, tuple[int, ...]]]
"""Source pattern, place and shape of the tensors that become one expert's part of a parameter."""


def convert_expert(recipe: Recipe, sources: Sources) -> memoryview:
    """One expert's part of a parameter as bytes."""
    converted = _converted(recipe, sources)
    return memoryview(converted.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def make_rows(maker: Maker, layer: int, expert: int, recipe: Recipe, sources: Sources) -> memoryview:
    """The encoded rows of one expert's part of a parameter."""
    converted = _converted(recipe, sources)
    matrix = converted.t() if recipe.is_transposed else converted
    return memoryview(maker.rows(layer, expert, recipe.name, matrix).view(-1).numpy())  # type: ignore[arg-type]


def _converted(recipe: Recipe, sources: Sources) -> torch.Tensor:
    return recipe.convert({pattern: read_part(*part).view(shape) for pattern, part, shape in sources})


def _made(maker: Maker, layer: int, recipes: Sequence[Recipe]) -> dict[str, RowEncoding]:
    """The encodings of a layer's matrices; other parameters, such as biases, stay plain."""
    columns = {
        recipe.name: recipe.shape[1 if recipe.is_transposed else 2] for recipe in recipes if len(recipe.shape) == 3
    }
    for name, count in columns.items():
        weights = count if maker.importance is None else len(maker.importance.of_matrix(layer, 0, name))
        if weights != count:
            raise CheckpointError(
                f"the statistics have {weights} input channels of {name} in MoE layer {layer}, the checkpoint {count}: "
                "calibrate on this checkpoint"
            )
    return {name: maker.encoding(name, count) for name, count in columns.items()}


def _made_again(checkpoint: Checkpoint, experts: Collection[tuple[Recipe, ...]], experts_dtype: str) -> list[str]:
    """A note for experts that the checkpoint has in few bits already."""
    keys = [key for recipes in experts for recipe in recipes for keys in recipe.keys.values() for key in keys]
    quantised = next((key for key in keys if isinstance(checkpoint.tensors[key], QuantisedEntry)), None)
    if quantised is None:
        return []
    return [
        f"the experts are decoded from the encoding that they are shipped in, and made {experts_dtype}: the errors of "
        f"both add up ({quantised})"
    ]


def _encodings(
    checkpoint: Checkpoint, experts: Collection[tuple[Recipe, ...]]
) -> tuple[dict[str, RowEncoding], list[str]]:
    """The encoding of each experts parameter that a store can hold as shipped, by the parameter's name in its module,
    and for each other quantised one a note."""
    by_name: dict[str, list[Recipe]] = {}
    for recipe in (recipe for recipes in experts for recipe in recipes):
        by_name.setdefault(recipe.name, []).append(recipe)
    encodings, notes = {}, []
    for name, recipes in by_name.items():
        entries = {key: checkpoint.tensors[key] for recipe in recipes for keys in recipe.keys.values() for key in keys}
        quantised = {key: entry for key, entry in entries.items() if isinstance(entry, QuantisedEntry)}
        if not quantised:
            continue
        obstacle = _obstacle(recipes, entries, quantised)
        if obstacle:
            notes.append(f"{name} of the experts is dequantised to {next(iter(quantised.values())).dtype}: {obstacle}")
        else:
            encodings[name] = next(iter(quantised.values())).encoding.rows
    return encodings, notes


def _obstacle(
    recipes: Sequence[Recipe], entries: Mapping[str, TensorEntry], quantised: Mapping[str, QuantisedEntry]
) -> str:
    """The reason why `entries`, one parameter's sources in all layers, do not become rows; empty if they do."""
    if len(quantised) < len(entries):
        plain = next(key for key in entries if key not in quantised)
        return f"{len(entries) - len(quantised)} of its {len(entries)} tensors are plain ({plain})"
    for key, entry in quantised.items():
        if entry.encoding.obstacle:
            return f"{entry.encoding.obstacle} ({key})"
    encodings = {entry.encoding.rows: key for key, entry in quantised.items()}
    if len(encodings) > 1:
        return "its tensors have several encodings: " + ", ".join(f"{rows} ({key})" for rows, key in encodings.items())
    transposed = next(iter(quantised.values())).encoding.is_transposed
    if not all(recipe.is_concatenation and recipe.is_transposed == transposed for recipe in recipes):
        return f"its rows are not those of the checkpoint ({next(iter(quantised))})"
    return ""


def _layer_spec(
    checkpoint: Checkpoint,
    layer: int,
    module: str,
    recipes: tuple[Recipe, ...],
    encodings: Mapping[str, RowEncoding],
) -> LayerSpec:
    numbers = re.findall(r"\.(\d+)\.", f".{module}.")
    if len(numbers) != 1:
        raise UnsupportedFamilyError(f"{module}: the name does not tell which layer of the model this is")
    tensors, offset = [], 0
    for recipe in recipes:
        dtype = _check_sources(checkpoint, recipe)
        shape, encoding = recipe.shape[1:], encodings.get(recipe.name)
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        if encoding is not None:
            shape = shape[::-1] if recipe.is_transposed else shape
            size = shape[0] * encoding.row_bytes(shape[1])
        tensors.append(TensorSpec(recipe.name, dtype, shape, offset, size, encoding))
        offset += size
    return LayerSpec(layer, int(numbers[0]), module, offset, tuple(tensors))


def _check_sources(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """The dtype of the tensors that become `recipe.parameter`, after checking that their number and shapes fit."""
    num_experts, entries = recipe.shape[0], []
    for pattern, keys in recipe.keys.items():
        found = [checkpoint.tensors[key] for key in keys]
        fused = len(found) == 1 and found[0].shape[:1] == (num_experts,) and len(found[0].shape) == len(recipe.shape)
        if len(found) != num_experts and not fused:
            raise CheckpointError(
                f"{checkpoint.path}: {recipe.parameter} needs {num_experts} tensors like {pattern!r}, the checkpoint "
                f"has {len(found)}: get those that are missing, or the config.json that belongs to the weights"
            )
        entries += found
    dtypes = {entry.dtype for entry in entries}
    if len(dtypes) != 1 or not dtypes <= set(PLAIN_DTYPES):
        raise CheckpointError(
            f"{checkpoint.path}: {recipe.parameter} comes from tensors of the dtypes {sorted(dtypes)}; wanted one of "
            f"{', '.join(PLAIN_DTYPES)} for all: use a checkpoint in a plain dtype"
        )
    if recipe.is_concatenation:
        for expert in range(num_experts):
            _check_concatenation(checkpoint, recipe, expert)
    return dtypes.pop()


def _check_concatenation(checkpoint: Checkpoint, recipe: Recipe, expert: int) -> None:
    shapes = [_expert_part(checkpoint, recipe, pattern, expert)[1] for pattern in recipe.source_patterns]
    wanted = recipe.shape[1:]
    rows = sum(shape[0] for shape in shapes if shape)
    if any(len(shape) != len(wanted) or shape[1:] != wanted[1:] for shape in shapes) or rows != wanted[0]:
        raise CheckpointError(
            f"{checkpoint.path}: {recipe.parameter} of expert {expert} has the shape {list(wanted)} by config.json, "
            f"its tensors have {[list(shape) for shape in shapes]}; config.json and weights are of different models"
        )


def _expert_part(checkpoint: Checkpoint, recipe: Recipe, pattern: str, expert: int) -> tuple[Part, tuple[int, ...]]:
    """The place of one expert's values of `pattern`, and their shape: a whole tensor, or a row of a fused one."""
    keys = recipe.keys[pattern]
    if len(keys) == recipe.shape[0] and len(checkpoint.tensors[keys[0]].shape) < len(recipe.shape):
        entry = checkpoint.tensors[keys[expert]]
        return (entry, 0, 1), entry.shape
    entry = checkpoint.tensors[keys[0]]
    return (entry, expert, recipe.shape[0]), entry.shape[1:]
