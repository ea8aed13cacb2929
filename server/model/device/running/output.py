"""Converts a captured step's report to the engine's `StepOutput`.

Invariant: the next step overwrites the report's memory, so every value taken from it is copied.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from router.ledger import StepRecord
from server.model.device.step.sampling import TokenDraw
from server.model.device.step.state import Report
from server.model.runner import Chosen
from server.model.seam.routing import RowShare


def chosen_tokens(report: Report, draw: TokenDraw | None, num: int) -> Chosen:
    """The tokens of a step's first `num` entries: from `draw`, or the most likely ones if it is None."""
    token, logit = report.best_token[:num], report.best_logit[:num]
    if draw is not None:
        token, logit = draw.drawn[0, :num], draw.drawn[1, :num]
    normaliser = report.normaliser[:num].numpy().copy()
    return Chosen(token.numpy().astype(np.int64), logit.numpy().astype(np.float32), normaliser)


def routing_of(
    report: Report, num: int, masked: bool, hidden: npt.NDArray[np.bool_] | None = None
) -> tuple[StepRecord, RowShare]:
    """The routing of a step's first `num` entries.

    The mass of demanded experts that were not served counts as missed. With `hidden` [L, B, E], the experts that rows
    may not choose, only their mass counts: under a mask, a router with groups may reject a demanded expert that is
    available, because its group is not chosen, and an adapter may choose another one.
    """
    served = report.ids[:, :num].numpy().astype(np.int64)
    weight = report.weights[:, :num].numpy().copy()
    if not masked:
        demanded = weight.sum(axis=2, dtype=np.float64)
        return StepRecord(served, weight), RowShare(demanded.T, np.zeros_like(demanded.T))
    demand = report.demand[:, :num].numpy().astype(np.int64)
    mass = report.mass[:, :num].numpy().copy()
    given = (demand[..., None] == served[..., None, :]).any(axis=-1)
    if hidden is not None:
        given |= ~np.take_along_axis(hidden, np.minimum(demand, hidden.shape[-1] - 1), axis=-1)
    missed = np.where(given, 0.0, mass).sum(axis=2, dtype=np.float64)
    demanded = mass.sum(axis=2, dtype=np.float64)
    record = StepRecord(served, weight, demand, mass, missed.sum(axis=1))
    return record, RowShare(demanded.T, missed.T)
