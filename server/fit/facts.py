"""The sizes of a model that placing and predicting need, from a store, a checkpoint, or the headers of one on the hub.

Invariant: no weights are read. The experts' spans are those that extraction would write, the trunk is transformers'
model on the meta device, and the captured step's shape is the one that `deepfew serve` captures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expert_store.manifest import DTYPE_BYTES, MANIFEST_NAME, LayerSpec, TensorSpec, expert_encodings, read_manifest
from expert_store.residency.slots import slot_bytes
from expert_store.rows import TORCH_DTYPES
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.conversion import model_names
from extractor.checkpoint.layout import ExpertsLayout
from extractor.checkpoint.quantised import group_of, is_eight_bit
from extractor.encoding.making import Maker
from extractor.encoding.names import ExpertsDtype, TrunkDtype, experts_dtype_of
from extractor.statistics.file import read_statistics
from router.ledger import UsageLedger
from server.errors import UsageError
from server.fit.demand import Demand, of_counts, recorded
from server.fit.hub import described_checkpoint
from server.model.host.assembly import COMPUTE_DTYPES
from server.model.kv_memory import kv_token_bytes
from server.model.seam.trunk import context_tokens, is_experts_module, trunk_skeleton


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model in the dtype that it computes in.

    Attributes:
        name: of the store or the checkpoint.
        layers: the spans of the experts of each MoE layer.
        num_layers: layers of the model, those without routed experts included.
        num_experts, top_k: of a MoE layer; `num_available` of them are in the store.
        dtype: of the computation.
        experts_dtype: the encoding of the experts by the name that `extract` takes.
        skeleton: the trunk on the meta device, in `dtype`.
        eight_bits: codes and scales, on the meta device, of the skeleton's linear layers that the store has in 8 bits.
        trunk_bytes: of the trunk in memory, as transformers has it: in `dtype`.
        step_bytes: of these, the weights that every decode step reads: without the embedding.
        kv_bytes: of one token's keys and values.
        max_context: tokens that the model was made for.
        demand: popularity of the experts.
    """

    name: str
    layers: tuple[LayerSpec, ...]
    num_layers: int
    num_experts: int
    num_available: int
    top_k: int
    dtype: torch.dtype
    experts_dtype: ExpertsDtype
    skeleton: Any
    eight_bits: Mapping[nn.Linear, tuple[Tensor, Tensor]]
    trunk_bytes: int
    step_bytes: int
    kv_bytes: int
    max_context: int
    demand: Demand

    @property
    def span_bytes(self) -> float:
        """Bytes of one expert in a slot, mean over the layers."""
        return sum(slot_bytes(spec, self.dtype) for spec in self.layers) / len(self.layers)

    @property
    def expert_values(self) -> float:
        """Weights of one expert, mean over the layers."""
        return sum(math.prod(tensor.shape) for spec in self.layers for tensor in spec.tensors) / len(self.layers)

    @property
    def experts_bytes(self) -> int:
        """Bytes of all experts that are in the store."""
        return self.num_available * sum(spec.span_bytes for spec in self.layers)

    @property
    def codes(self) -> str | None:
        """The codes of the experts' first encoded tensor; None if they are plain."""
        return next((t.encoding.codes for t in self.layers[0].tensors if t.encoding is not None), None)

    @property
    def encoding(self) -> str:
        """The encoding of the experts in words."""
        found = sorted(set(expert_encodings(self.layers).values()))
        return " and ".join(found) if found else str(self.dtype).removeprefix("torch.")

    def encoded(self, experts_dtype: ExpertsDtype) -> ModelFacts:
        """The same model with its experts in another encoding. Raises ExtractError if they cannot be made so."""
        modules = () if self.skeleton is None else self.skeleton.modules()
        transposed = any(module.is_transposed for module in modules if is_experts_module(module))
        layers = tuple(_encoded(spec, Maker.of(experts_dtype), transposed) for spec in self.layers)
        return replace(self, layers=layers, experts_dtype=experts_dtype)


def _encoded(spec: LayerSpec, maker: Maker | None, transposed: bool) -> LayerSpec:
    """The span of a layer whose matrices `maker` makes; None: they are plain. Plain ones of a `transposed` model have
    their columns first, encoded ones never."""
    tensors: list[TensorSpec] = []
    offset = 0
    for tensor in spec.tensors:
        encoding = None
        size = math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
        is_matrix = len(tensor.shape) == 2
        shape = tensor.shape
        if is_matrix and transposed and (tensor.encoding is None) != (maker is None):
            shape = shape[::-1]
        if maker is not None and is_matrix:
            encoding = maker.encoding(tensor.name, shape[1])
            size = shape[0] * encoding.row_bytes(shape[1])
        tensors.append(replace(tensor, shape=shape, offset=offset, bytes=size, encoding=encoding))
        offset += size
    return replace(spec, span_bytes=offset, tensors=tuple(tensors))


@contextmanager
def facts_of(
    source: str,
    experts_dtype: ExpertsDtype | None,
    dtype: str,
    statistics: Path | None = None,
    trunk_dtype: TrunkDtype | None = None,
) -> Iterator[ModelFacts]:
    """The facts of a store or checkpoint in a directory, or of a model of the hub, valid until the context ends.

    Args:
        source: a directory, or owner/name.
        experts_dtype: the experts as `extract --experts-dtype` would make them; None: as they are.
        dtype: of the computation, or auto.
        trunk_dtype: the trunk as `extract --trunk-dtype` would make it; None: as `extract` does by default.
        statistics: file of `calibrate`, for the popularity of experts; None: a store's usage.json, or the recorded one.

    Raises:
        CheckpointError, UnsupportedFamilyError, ExtractError, ManifestError: see `extract`. StatisticsError, OSError:
        the statistics cannot be read. UsageError: they are of another model, or a store has experts or a trunk of
            another encoding.
    """
    path = Path(source)
    with ExitStack() as stack:
        if (path / MANIFEST_NAME).is_file():
            model = _of_store(path, experts_dtype, trunk_dtype, dtype)
        elif path.exists() or source.count("/") != 1:
            model = _of_checkpoint(Checkpoint.open(path), experts_dtype, trunk_dtype, dtype)
        else:
            described = stack.enter_context(described_checkpoint(source))
            model = _of_checkpoint(described, experts_dtype, trunk_dtype, dtype)
        yield model if statistics is None else _with_statistics(model, statistics)


def _with_statistics(model: ModelFacts, path: Path) -> ModelFacts:
    """The model with the popularity that statistics counted, over all of their domains."""
    statistics = read_statistics(path)
    counts = statistics.totals["demand"].sum(axis=0)
    if counts.shape != model.demand.shares.shape:
        raise UsageError(
            f"{path} is of a model with {counts.shape[1]} experts in {counts.shape[0]} layers, and {model.name} has "
            f"{model.num_experts} in {len(model.layers)}: name statistics of this model"
        )
    told = f"{path}, {int(statistics.num_tokens.sum())} tokens"
    return replace(model, demand=of_counts(counts.astype(np.int64), model.top_k, told))


def _of_store(path: Path, experts_dtype: ExpertsDtype | None, trunk_dtype: TrunkDtype | None, dtype: str) -> ModelFacts:
    manifest = read_manifest(path)
    held = experts_dtype_of(manifest)
    pairs = (("experts", experts_dtype, held), ("trunk", trunk_dtype, manifest.trunk_dtype or "16bit"))
    for part, wanted, found in pairs:
        if wanted not in (None, found):
            verb = "are of" if part == "experts" else "has"
            raise UsageError(
                f"{path} is a store whose {part} {verb} the dtype {found}, wanted {wanted}: leave --{part}-dtype out, "
                f"or name its checkpoint, {manifest.source.location}"
            )
    model, groups = manifest.model, {}
    if manifest.trunk_dtype is not None:
        entries = Checkpoint.open(path / "trunk").tensors
        groups = {name: group_of(entry) for name, entry in entries.items() if is_eight_bit(entry)}
    return _facts(
        manifest.source.name, path / "trunk", manifest.layers, model.num_experts, len(manifest.deep_experts),
        model.top_k, model.dtype if dtype == "auto" else dtype, held, groups,
        _usage(path, manifest.source.fingerprint),
    )  # fmt: skip


def _of_checkpoint(
    checkpoint: Checkpoint, experts_dtype: ExpertsDtype | None, trunk_dtype: TrunkDtype | None, dtype: str
) -> ModelFacts:
    layout = ExpertsLayout.of(checkpoint, experts_dtype or "shipped", trunk_dtype=trunk_dtype)
    model = layout.model
    return _facts(
        checkpoint.name, checkpoint.path, layout.layers, model.num_experts, model.num_experts, model.top_k,
        model.dtype if dtype == "auto" else dtype, experts_dtype or "shipped",
        layout.eight_bit_groups, None,
    )  # fmt: skip


def _usage(path: Path, fingerprint: str) -> UsageLedger | None:
    """The store's usage, None if it has none yet. Raises LedgerError, OSError."""
    try:
        ledger = UsageLedger.load(path / "usage.json")
    except FileNotFoundError:
        return None
    return ledger if ledger.fingerprint == fingerprint and ledger.num_tokens else None


_DTYPES = TORCH_DTYPES | COMPUTE_DTYPES


def _facts(
    name: str,
    trunk: Path,
    layers: tuple[LayerSpec, ...],
    num_experts: int,
    num_available: int,
    top_k: int,
    dtype: str,
    experts_dtype: ExpertsDtype,
    groups: Mapping[str, int],
    usage: UsageLedger | None,
) -> ModelFacts:
    skeleton: Any = trunk_skeleton(trunk)
    skeleton.to(_DTYPES[dtype])
    config = skeleton.config.get_text_config()
    size = _DTYPES[dtype].itemsize
    if usage is None:
        demand = recorded(len(layers), num_experts, top_k)
    else:
        counts = np.asarray(usage.demand_count)
        demand = of_counts(counts, top_k, f"usage.json of the store, {usage.num_tokens} tokens")
    values = sum(parameter.numel() for parameter in skeleton.parameters())
    return ModelFacts(
        name=name,
        layers=layers,
        num_layers=int(config.num_hidden_layers),
        num_experts=num_experts,
        num_available=num_available,
        top_k=top_k,
        dtype=_DTYPES[dtype],
        experts_dtype=experts_dtype,
        skeleton=skeleton,
        eight_bits=_eight_bits(skeleton, groups),
        trunk_bytes=values * size,
        step_bytes=(values - _embedding_values(skeleton)) * size,
        kv_bytes=kv_token_bytes(config, size),
        max_context=context_tokens(trunk),
        demand=demand,
    )


def _eight_bits(skeleton: Any, groups: Mapping[str, int]) -> dict[nn.Linear, tuple[Tensor, Tensor]]:
    """As `seam.trunk.eight_bits` has them, without memory; `groups` are the columns that share a scale, by name."""
    found = {}
    for name, target in model_names(skeleton, groups).items() if groups else ():
        linear = skeleton.get_submodule(target.removesuffix(".weight"))
        rows, columns = linear.weight.shape
        codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device="meta")
        found[linear] = codes, torch.empty(rows, columns // groups[name], device="meta")
    return found


def _embedding_values(skeleton: Any) -> int:
    """Weights of the embedding, of which a step reads a row for each token; 0 if they are the head's too."""
    embedding, head = skeleton.get_input_embeddings(), skeleton.get_output_embeddings()
    tied = bool(getattr(skeleton.config.get_text_config(), "tie_word_embeddings", False))
    if tied or head is None or not isinstance(embedding, nn.Module):
        return 0
    return sum(parameter.numel() for parameter in embedding.parameters())
