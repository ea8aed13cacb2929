"""The handling of an expert whose bytes cannot be read, as the operator chooses.

"fail": the requests whose tokens need it fail. The next request that needs it reads it again, so a repaired file works
at once. "mask": the expert is masked for all requests until a restart. Invariant: no token is computed from bytes whose
hash is wrong, and the last expert of a layer is never masked.
"""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np

from expert_store.errors import ShardCorruptError, StoreError
from expert_store.store import Store
from router.errors import MaskError
from router.mask import ExpertMask
from server.engine.sequence import Sequence
from server.model.runner import Runner, StepFault

log = logging.getLogger(__name__)

CorruptExperts = Literal["fail", "mask"]


class UnreadableExperts:
    """Decides about the experts that a step could not read; called on the engine thread between two steps.

    Args:
        runner: runs the steps; masking an expert changes its store and its routing.
        corrupt_experts: "mask" masks corrupt experts, "fail" does not.

    Attributes:
        num_faults: reads that failed a step.
    """

    def __init__(self, runner: Runner, corrupt_experts: CorruptExperts) -> None:
        self._runner, self._store, self._routing = runner, runner.model.store, runner.model.routing
        self._gives_up = corrupt_experts == "mask"
        self.num_faults = 0

    def those_in_need(self, sequences: list[Sequence], error: StoreError) -> tuple[list[Sequence], StoreError]:
        """Return the sequences that cannot run the step again, and the read error that caused `error`."""
        fault = error if isinstance(error, StepFault) else StepFault(error, (), is_repeatable=False)
        needing = [sequences[at] for at in fault.positions] or sequences
        if self._give_up(fault.cause):
            self._runner.adopt()
            if fault.is_repeatable:
                return [], fault.cause
        log.error("%d of %d requests failed: %s", len(needing), len(sequences), fault.cause)
        return needing, fault.cause

    def _give_up(self, cause: StoreError) -> bool:
        """Mask the expert that could not be read, if `corrupt_experts` is "mask" and its layer keeps another one.

        Returns whether it was masked."""
        self.num_faults += 1
        if not self._gives_up or not isinstance(cause, ShardCorruptError) or cause.expert is None:
            return False
        layer, expert = cause.expert
        if not self._store.available[layer, expert]:
            return False
        allowed = np.array(self._routing.mask.allowed)
        allowed[layer, expert] = False
        try:
            mask = ExpertMask(allowed)
        except MaskError:
            log.error("expert %d of layer %d is corrupt and cannot be masked: it is the layer's last", expert, layer)
            return False
        self._store.exclude(layer, expert)
        self._routing.set_mask(mask)
        log.error("expert %d of layer %d is masked for every request until a restart: %s", expert, layer, cause)
        return True


def exclude_damaged(store: Store, cause: StoreError) -> bool:
    """While loading: remove from the store the unreadable experts of the shard that `cause` names.

    Blocks while it reads the shard. Returns whether it removed any.
    """
    if cause.expert is None or not store.available[cause.expert]:
        return False
    deep = store.deep_expert(*cause.expert)
    found = False
    for layer, expert in enumerate(deep.experts):
        try:
            if store.available[layer, expert]:
                store.read_expert(layer, expert, memoryview(bytearray(store.layer_spec(layer).span_bytes)))
        except ShardCorruptError as error:
            log.error("expert %d of layer %d is masked for every request until a restart: %s", expert, layer, error)
            store.exclude(layer, expert)
            found = True
    return found
