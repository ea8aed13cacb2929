"""Masks: the experts that routing may choose, a boolean per (layer, expert).

Invariant: an `ExpertMask` is immutable and every layer has at least one available expert. Masks combine by
intersection. Words: an *available* expert is in the store; a *mask* selects some of the available experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.errors import MaskError

MAX_EXPERTS = 65536


@dataclass(frozen=True, eq=False)
class ExpertMask:
    """Availability of experts.

    Attributes:
        allowed: bool [L, E], read-only; True where routing may choose the expert.
    """

    allowed: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.allowed.ndim != 2 or self.allowed.dtype != np.bool_:
            raise MaskError(f"a mask is bool [L, E], got {self.allowed.dtype} {self.allowed.shape}")
        empty = np.flatnonzero(~self.allowed.any(axis=1))
        if empty.size:
            raise MaskError(
                f"no expert of layer {int(empty[0])} is left by the mask; every layer needs at least one: "
                "allow more experts"
            )
        self.allowed.setflags(write=False)

    @classmethod
    def of(cls, allowed: npt.NDArray[np.bool_]) -> ExpertMask:
        """A mask from bool [L, E], which is copied. Raises `MaskError`."""
        return cls(np.array(allowed, dtype=np.bool_))

    @classmethod
    def same_in_every_layer(cls, experts: Iterable[int], num_layers: int, num_experts: int) -> ExpertMask:
        """The mask that allows the same expert ids in each layer. Raises `MaskError`."""
        allowed = np.zeros((num_layers, num_experts), dtype=np.bool_)
        for expert in experts:
            if not 0 <= expert < num_experts:
                raise MaskError(f"expert {expert} does not exist: the model has experts 0 to {num_experts - 1}")
            allowed[:, expert] = True
        return cls(allowed)

    @property
    def is_full(self) -> bool:
        """Whether nothing is masked."""
        return bool(self.allowed.all())

    @property
    def num_allowed(self) -> npt.NDArray[np.int64]:
        """Experts allowed in each layer, [L]."""
        counts: npt.NDArray[np.int64] = self.allowed.sum(axis=1, dtype=np.int64)
        return counts

    def __and__(self, other: ExpertMask) -> ExpertMask:
        """The experts that both allow. Raises `MaskError` when a layer is left empty."""
        return ExpertMask(self.allowed & other.allowed)


def parse_experts(text: str) -> tuple[int, ...]:
    """Expert ids from text such as ``0-7,12``: sorted, distinct.

    Raises:
        MaskError: the text is not a list of ids and ranges.
    """
    ids: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not part.isascii() or not first.isdecimal() or (dash and not last.isdecimal()):
            raise MaskError(f"experts {text!r}: {part.strip()!r} is no id or range; write for instance 0-7,12")
        low, high = int(first), int(last) if dash else int(first)
        if high < low or high >= MAX_EXPERTS:
            raise MaskError(f"experts {text!r}: the range {part.strip()!r} is empty or past {MAX_EXPERTS - 1}")
        ids.update(range(low, high + 1))
    return tuple(sorted(ids))
