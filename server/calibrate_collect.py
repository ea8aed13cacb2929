"""Collects statistics from a model as it runs: its routing, and the norms of what each expert put out.

`observe` stands between transformers' experts modules and ours for as long as it is open. Invariant: an observed model
computes exactly what the unobserved one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from expert_store.slots import TORCH_DTYPES
from expert_store.store import Store
from extractor.statistics import WINDOW_TOKENS, ExpertStatistics
from extractor.statistics_sample import item_keys
from router.ledger import StepRecord
from server.model.assembly import SelectiveModel
from server.model.experts import LAYER_ATTRIBUTE, ExpertsLayer

MEMORY_ELEMENTS = 1 << 25
"""Values of a (token, layer, expert) table that are held at once."""


@dataclass
class OutputNorms:
    """What the experts put out in one forward: norms ‖E(h)‖ [T, K] and 1 − cos(h, h + out) [T], of each layer."""

    norms: list[Tensor | None]
    changes: list[Tensor | None]

    def take(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Both as arrays [L, T, K] and [L, T], and forget them."""
        norms, changes = ([part for part in parts if part is not None] for parts in (self.norms, self.changes))
        assert len(norms) == len(self.norms), f"{len(norms)} of {len(self.norms)} layers' experts ran"
        taken = torch.stack(norms).cpu().numpy(), torch.stack(changes).cpu().numpy()
        self.norms[:] = self.changes[:] = [None] * len(self.norms)
        return taken


class _Observed:
    """An `ExpertsLayer` that also notes norms: every pick is computed as a token of its own, with weight one."""

    def __init__(self, inner: ExpertsLayer, layer: int, into: OutputNorms) -> None:
        self._inner, self._layer, self._into = inner, layer, into

    def forward(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        num_tokens, num_picks = index.shape
        ones = torch.ones_like(weights).view(-1, 1)
        outputs = self._inner.forward(module, hidden.repeat_interleave(num_picks, 0), index.reshape(-1, 1), ones)
        outputs = outputs.view(num_tokens, num_picks, -1)
        mixed = (outputs * weights[:, :, None]).sum(dim=1).to(hidden.dtype)
        before, after = hidden.float(), hidden.float() + mixed.float()
        self._into.norms[self._layer] = outputs.float().norm(dim=-1)
        self._into.changes[self._layer] = 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)
        return mixed


@contextmanager
def observe(model: SelectiveModel) -> Iterator[OutputNorms]:
    """Note output norms while the context is open; the model is put back as it was afterwards."""
    modules = [module for module in model.model.modules() if hasattr(module, LAYER_ATTRIBUTE)]
    norms = OutputNorms([None] * len(modules), [None] * len(modules))
    inner = [getattr(module, LAYER_ATTRIBUTE) for module in modules]
    for layer, (module, own) in enumerate(zip(modules, inner, strict=True)):
        object.__setattr__(module, LAYER_ATTRIBUTE, _Observed(own, layer, norms))
    try:
        yield norms
    finally:
        for module, own in zip(modules, inner, strict=True):
            object.__setattr__(module, LAYER_ATTRIBUTE, own)


@dataclass(frozen=True)
class SequenceRun:
    """What happened to one sequence that ran from its first token.

    Attributes:
        key: of the sequence, see `sequence_key`.
        record: its routing.
        norms, changes: [L, T, K] and [L, T], see `OutputNorms`.
    """

    key: int
    record: StepRecord
    norms: npt.NDArray[np.float32]
    changes: npt.NDArray[np.float32]


def add_run(statistics: ExpertStatistics, domain: str, run: SequenceRun) -> None:
    """Add one sequence to `statistics`, in parts that fit into memory."""
    index = statistics.domain_index(domain)
    num_tokens = run.record.served_index.shape[1]
    statistics.num_tokens[index] += num_tokens
    step = max(WINDOW_TOKENS, MEMORY_ELEMENTS // (statistics.num_layers * statistics.num_experts) // 32 * 32)
    for start in range(0, num_tokens, step):
        _add_part(statistics, index, run, slice(start, min(start + step, num_tokens)))


def _add_part(statistics: ExpertStatistics, domain: int, run: SequenceRun, part: slice) -> None:
    record = run.record
    served = np.minimum(record.served_index[:, part], statistics.num_experts)
    gates = _shares(record.served_weight[:, part])
    outputs = np.where(served < statistics.num_experts, run.norms[:, part], 0.0)
    contributions = record.served_weight[:, part] * outputs
    _scatter(statistics, domain, "picks", served, np.ones_like(gates))
    _scatter(statistics, domain, "gate_mass", served, gates)
    _scatter(statistics, domain, "output_norm", served, outputs)
    _scatter(statistics, domain, "output_norm_squared", served, np.square(outputs))
    _scatter(statistics, domain, "gate_output_norm", served, contributions)
    _scatter(statistics, domain, "residual_change", served, contributions * run.changes[:, part, None])
    wanted, wanted_gates = served, gates
    if record.demand_index is not None and record.demand_weight is not None:
        wanted, wanted_gates = record.demand_index[:, part], _shares(record.demand_weight[:, part])
        missing = ~(wanted[:, :, :, None] == served[:, :, None, :]).any(axis=3)
        _scatter(statistics, domain, "missing", wanted, missing.astype(np.float64))
        _scatter(statistics, domain, "missing_mass", wanted, wanted_gates * missing)
    _scatter(statistics, domain, "demand", wanted, np.ones_like(wanted_gates))
    _scatter(statistics, domain, "demand_mass", wanted, wanted_gates)
    computed = contributions if wanted is served else None
    _add_samples(statistics, domain, run.key, part.start, wanted, wanted_gates, computed)


def _add_samples(
    statistics: ExpertStatistics,
    domain: int,
    key: int,
    first: int,
    wanted: npt.NDArray[np.int64],
    gates: npt.NDArray[np.float64],
    contributions: npt.NDArray[np.floating] | None,
) -> None:
    num_tokens = wanted.shape[1]
    dense = np.zeros((num_tokens, statistics.num_layers, statistics.num_experts + 1), dtype=np.float32)
    np.put_along_axis(dense, wanted.transpose(1, 0, 2), gates.transpose(1, 0, 2).astype(np.float32), axis=2)
    dense = dense[:, :, : statistics.num_experts]
    picked = (dense > 0).astype(np.float32)
    for layer in range(statistics.num_layers - 1):
        statistics.coactivation[layer] += picked[:, layer].T @ picked[:, layer + 1]
    num_windows = num_tokens // WINDOW_TOKENS
    if num_windows:
        whole = dense[: num_windows * WINDOW_TOKENS]
        mass = whole.reshape(num_windows, WINDOW_TOKENS, *dense.shape[1:]).sum(axis=1)
        at = np.arange(num_windows) + first // WINDOW_TOKENS
        statistics.windows.offer(item_keys(key, at), np.full(num_windows, domain), {"mass": mass})
    if contributions is not None:
        arrays = {"experts": wanted, "gates": gates, "contributions": contributions}
        tokens = {name: array.transpose(1, 0, 2) for name, array in arrays.items()}
        at = np.arange(num_tokens) + first
        statistics.tokens.offer(item_keys(key ^ 1, at), np.full(num_tokens, domain), tokens)


def _shares(weights: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Weights [L, T, K] over their sum over the picks; zeros where a token has none."""
    weights = weights.astype(np.float64)
    sums = weights.sum(axis=2, keepdims=True)
    return np.asarray(np.divide(weights, sums, out=np.zeros_like(weights), where=sums > 0))


def _scatter(
    statistics: ExpertStatistics,
    domain: int,
    name: str,
    experts: npt.NDArray[np.int64],
    values: npt.NDArray[np.floating],
) -> None:
    """Add values [L, T, K] to a total at experts [L, T, K]; the sentinel falls away."""
    num_layers, stride = statistics.num_layers, statistics.num_experts + 1
    flat = (experts + (np.arange(num_layers) * stride)[:, None, None]).ravel()
    summed = np.bincount(flat, weights=values.ravel(), minlength=num_layers * stride)
    statistics.totals[name][domain] += summed.reshape(num_layers, stride)[:, :-1]


def weight_flatness(store: Store) -> npt.NDArray[np.float64]:
    """Mean |w| / rms(w) over all weights of each expert (AIMER), float64 [L, E]; reads the whole store once.

    Experts that the store does not hold get their layer's mean. Raises StoreError.
    """
    manifest, available = store.manifest, store.available
    flatness = np.full(available.shape, np.nan)
    for layer, spec in enumerate(manifest.layers):
        memory = torch.empty(spec.span_bytes, dtype=torch.uint8)
        for expert in np.flatnonzero(available[layer]):
            store.read_expert(layer, int(expert), memory)
            parts = [memory[at.offset : at.offset + at.bytes].view(TORCH_DTYPES[at.dtype]) for at in spec.tensors]
            weights = torch.cat([part.float() for part in parts])
            flatness[layer, expert] = float(weights.abs().mean() / weights.square().mean().sqrt())
        flatness[layer, ~available[layer]] = np.nanmean(flatness[layer])
    return flatness
