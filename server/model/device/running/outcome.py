"""What a captured step is asked for and what it has to tell, in the engine's terms; also of a batch that runs in parts.

A report is in memory that the next step writes, so what is taken from it is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from router.ledger import StepRecord
from router.mask import ExpertMask
from server.model.device.step.sampling import TokenDraw
from server.model.device.step.state import Report
from server.model.host.runner import Choice, Chosen, StepOutput
from server.model.seam.routing import RowShare


@dataclass(frozen=True)
class Asked:
    """One step: see `Runner.decode`; all of one length."""

    rows: Sequence[int]
    tokens: Sequence[int]
    masks: Sequence[ExpertMask | None]
    temperatures: Sequence[float]
    choices: Sequence[Choice | None]
    fetching: Sequence[bool]

    def part(self, at: slice) -> Asked:
        """The same for some of the rows."""
        return Asked(
            self.rows[at], self.tokens[at], self.masks[at], self.temperatures[at], self.choices[at], self.fetching[at]
        )


def chosen_tokens(report: Report, draw: TokenDraw | None, num: int) -> Chosen:
    """The tokens of a step's first `num` entries, drawn where there was something to draw."""
    token, logit = report.best_token[:num], report.best_logit[:num]
    if draw is not None:
        token, logit = draw.drawn[0, :num], draw.drawn[1, :num]
    normaliser = report.normaliser[:num].numpy().copy()
    return Chosen(token.numpy().astype(np.int64), logit.numpy().astype(np.float32), normaliser)


def routing_of(
    report: Report, num: int, masked: bool, hidden: npt.NDArray[np.bool_] | None = None
) -> tuple[StepRecord, RowShare]:
    """The routing of a step's first `num` entries.

    What was wanted and not served counts as missed. `hidden` [L, B, E], where given, says what rows could not have, and
    only that counts: under a mask a router of groups may leave a wanted expert that is there for another group's.
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


def together(parts: Sequence[StepOutput]) -> StepOutput:
    """The outputs of steps over parts of a batch as that of one over all of it, in their order."""
    wanted = [part.record.demand_of(slice(None)) for part in parts]
    chosen = [part.chosen for part in parts if part.chosen is not None]
    missed = np.concatenate([part.share.missed for part in parts])
    record = StepRecord(
        np.concatenate([part.record.served_index for part in parts], axis=1),
        np.concatenate([part.record.served_weight for part in parts], axis=1),
        np.concatenate([index for index, _ in wanted], axis=1),
        np.concatenate([weight for _, weight in wanted], axis=1),
        missed.sum(axis=0),
    )
    return StepOutput(
        torch.cat([part.logits for part in parts]),
        record,
        RowShare(np.concatenate([part.share.demanded for part in parts]), missed),
        Chosen(
            np.concatenate([one.token for one in chosen]),
            np.concatenate([one.logit for one in chosen]),
            np.concatenate([one.normaliser for one in chosen]),
        ),
    )
