"""The experts that are never evicted from their slots: the most used ones of each layer, by the store's usage."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from expert_store.errors import SlotsError
from expert_store.store import Store
from router.errors import LedgerError
from router.ledger import UsageLedger
from router.mask import ExpertMask

log = logging.getLogger(__name__)


def most_used_experts(store: Store, mask: ExpertMask, count: int) -> list[list[int]] | None:
    """For each layer the first `count` of `experts_by_use`; None if `count` is 0."""
    return [experts[:count] for experts in experts_by_use(store, mask, count)] if count else None


def experts_by_use(store: Store, mask: ExpertMask, num_kept: int) -> list[list[int]]:
    """For each layer the allowed experts by their uses in the store's usage.json, most used first.

    Experts with equal uses are in the order of the store's deep experts, as all are if there is no usage of this
    checkpoint.

    Args:
        num_kept: number of experts that keep their slots, which is checked.

    Raises:
        SlotsError: `num_kept` is more than the mask allows in some layer.
    """
    fewest = int(mask.num_allowed.min())
    if num_kept > fewest:
        raise SlotsError(f"kept_experts is {num_kept}, and a layer serves only {fewest} experts: keep at most so many")
    uses: npt.NDArray[np.int64] = np.zeros(mask.allowed.shape, dtype=np.int64)
    try:
        ledger = UsageLedger.load(store.path / "usage.json")
        if ledger.fingerprint == store.manifest.source.fingerprint:
            uses = ledger.served_count
        else:
            log.warning("usage.json is of another checkpoint: the store's first experts count as the most used")
    except FileNotFoundError:
        log.info("the store has no usage yet: its first experts count as the most used")
    except (LedgerError, OSError) as error:
        log.warning("usage.json cannot be read: the store's first experts count as the most used (%s)", error)
    chosen = []
    for layer, row in enumerate(uses):
        stored = dict.fromkeys(deep.experts[layer] for deep in store.manifest.deep_experts)
        allowed = [expert for expert in stored if mask.allowed[layer, expert]]
        chosen.append(sorted(allowed, key=lambda expert: -int(row[expert])))
    return chosen
