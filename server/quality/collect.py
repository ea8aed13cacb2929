"""Collects statistics from a model as it runs: its routing, and the norms of what each expert put out.

`observe` stands between transformers' experts modules and ours for as long as it is open. Invariant: an observed model
computes exactly what the unobserved one does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from expert_store.slots import TORCH_DTYPES
from expert_store.store import Store
from extractor.statistics.sample import item_keys
from extractor.statistics.statistics import WINDOW_TOKENS, ExpertStatistics
from router.ledger import StepRecord
from server.engine.token_statistics import add_tokens, window_masses
from server.model.runner import SelectiveModel
from server.model.seam.experts import LAYER_ATTRIBUTE, ExpertsLayer
from server.model.seam.observation import ExpertOutputs

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
    num_tokens = run.record.served_index.shape[1]
    step = max(WINDOW_TOKENS, MEMORY_ELEMENTS // (statistics.num_layers * statistics.num_experts) // 32 * 32)
    for start in range(0, num_tokens, step):
        _add_part(statistics, domain, run, slice(start, min(start + step, num_tokens)))


def _add_part(statistics: ExpertStatistics, domain: str, run: SequenceRun, part: slice) -> None:
    record = run.record
    routed = StepRecord(record.served_index[:, part], record.served_weight[:, part])
    if record.demand_index is not None and record.demand_weight is not None:
        routed = replace(routed, demand_index=record.demand_index[:, part], demand_weight=record.demand_weight[:, part])
    at = np.arange(part.start, part.stop)
    outputs = ExpertOutputs(run.norms[:, part], run.changes[:, part])
    add_tokens(statistics, domain, routed, outputs, item_keys(run.key ^ 1, at))
    masses = window_masses(*routed.demand_of(slice(None)), statistics.num_experts)
    if len(masses):
        at = np.arange(len(masses)) + part.start // WINDOW_TOKENS
        domains = np.full(len(masses), statistics.domain_index(domain))
        statistics.windows.offer(item_keys(run.key, at), domains, {"mass": masses})


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
