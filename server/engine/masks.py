"""The mask and the adapter of each running sequence, and the check of those that refuse to do without an expert.

A request may narrow the server's mask (`Masking`), read experts that the store lacks from the source
(`on_missing="fetch"`), or fail when an expert that it demands is missing (`on_missing="refuse"`).
Invariant: a sequence's mask changes only between two of its steps.
"""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from expert_store.adapter import made_for
from expert_store.errors import StoreError
from router.ledger import StepRecord
from router.mask import ExpertMask
from server.engine.request import ExpertMissingError
from server.engine.sequence import Sequence
from server.model.runner import Runner

log = logging.getLogger(__name__)


class SequenceMasks:
    """Masks of the sequences of one runner.

    Args:
        runner: its routing has the server's mask; its `prefetch` is called with each new mask.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._everything = ExpertMask(np.ones(runner.model.routing.mask.allowed.shape, dtype=np.bool_))
        self._adapted: WeakKeyDictionary[Sequence, tuple[ExpertMask, str | None]] = WeakKeyDictionary()
        self._narrowed: WeakKeyDictionary[Sequence, tuple[ExpertMask, ExpertMask, ExpertMask]] = WeakKeyDictionary()

    def next(self, sequence: Sequence) -> ExpertMask | None:
        """The mask of the sequence's next tokens, None for the server's mask. Tokens that are read again get the mask
        that they had, without the experts that were removed since.

        Raises:
            MaskError: a layer is left without an expert.
        """
        if not sequence.is_rereading:
            mask = self.of(sequence)
            used = mask or self._runner.model.routing.mask
            if not sequence.masks_used or sequence.masks_used[-1][1] is not used:
                sequence.masks_used.append((sequence.num_in_row, used))
            return mask
        used = next(mask for start, mask in reversed(sequence.masks_used) if start <= sequence.num_in_row)
        served = self._runner.model.routing.mask
        if used is served:
            return None
        return used if sequence.request.on_missing == "fetch" else self._narrow(sequence, used, served)

    def of(self, sequence: Sequence) -> ExpertMask | None:
        """The request's mask within the experts that it may use, or None if that is the server's mask.

        A request that fetches may use every expert, so only its own mask narrows it.

        Raises:
            MaskError: a layer is left without an expert.
        """
        masking = sequence.request.masking
        own = None if masking is None else masking.mask
        served = self._runner.model.routing.mask
        if sequence.request.on_missing == "fetch":
            return own or (None if served.is_full else self._everything)
        return None if own is None else self._narrow(sequence, own, served)

    def adapter(self, sequence: Sequence, mask: ExpertMask | None) -> str | None:
        """The name of the sequence's adapter under `mask`, that of its next step; notes it for the answer."""
        used, adapters = mask or self._runner.model.routing.mask, self._runner.model.adapters
        if not adapters or sequence.request.adapter == "none" or used.is_full:
            return None
        if sequence.request.adapter != "auto":
            sequence.adapter = sequence.request.adapter
            return sequence.adapter
        known = self._adapted.get(sequence)
        if known is None or known[0] is not used:
            known = self._adapted[sequence] = (used, made_for(adapters, used.allowed))
        sequence.adapter = known[1]
        return known[1]

    def _narrow(self, sequence: Sequence, own: ExpertMask, served: ExpertMask) -> ExpertMask:
        """`own & served`; returns the same object while neither changes, so that runners see no new mask."""
        known = self._narrowed.get(sequence)
        if known is None or known[0] is not own or known[1] is not served:
            known = self._narrowed[sequence] = (own, served, own & served)
        return known[2]

    def observe(self, sequence: Sequence, record: StepRecord, tokens: slice, missed: npt.NDArray[np.float64]) -> None:
        """Tell the request's observer and its masking what its tokens of a step demand; the mask may change.

        Args:
            tokens: the sequence's in `record`.
            missed: mass [L] that they demanded and that was not available.

        Raises:
            ExpertMissingError: the request has `on_missing="refuse"` and a demanded expert was missing.
        """
        request, demand = sequence.request, record.demand_of(tokens)
        if request.on_missing == "refuse" and missed.any():
            check_nothing_missing(*demand, self.of(sequence) or self._runner.model.routing.mask)
        if request.observe_demand is not None:
            request.observe_demand(*demand)
        if request.masking is None:
            return
        before = request.masking.mask
        request.masking.observe(*demand)
        chosen = request.masking.mask
        if chosen is not None and chosen is not before:
            try:
                self._runner.prefetch(chosen)
            except StoreError as error:  # the step that needs the expert fails then, with the reason
                log.warning("experts could not be fetched ahead: %s", error)


def check_nothing_missing(
    demand_index: npt.NDArray[np.int64], demand_weight: npt.NDArray[np.float32], mask: ExpertMask
) -> None:
    """Raise if a token demanded an expert outside `mask`.

    Args:
        demand_index, demand_weight: [L, T, K] of the unmasked choice; ids ≥ E are picks that do not exist.

    Raises:
        ExpertMissingError: names the first such token's first such layer, and its most demanded missing expert.
    """
    num_layers, num_experts = mask.allowed.shape
    exists = demand_index < num_experts
    allowed = mask.allowed[np.arange(num_layers)[:, None, None], np.minimum(demand_index, num_experts - 1)]
    missing = np.where(exists & ~allowed & (demand_weight > 0), demand_weight, 0.0)  # [L, T, K]
    places = np.argwhere((missing > 0).any(axis=2).T)  # (token, layer), tokens first
    if not len(places):
        return
    token, layer = (int(value) for value in places[0])
    pick = int(missing[layer, token].argmax())
    share = float(missing[layer, token, pick] / demand_weight[layer, token].sum())
    raise ExpertMissingError(layer, int(demand_index[layer, token, pick]), share)
