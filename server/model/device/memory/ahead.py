"""Reads that run ahead of a prompt's chunk: experts that are in no memory, in the order in which layers compute them.

Invariant: a row is written again only after its span was copied, and belongs to no expert until the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from torch import Tensor

from expert_store.errors import StoreError
from server.model.device.memory.reading import Expert, Failures, SpanReader

if TYPE_CHECKING:
    from server.model.device.memory.tier import SpanTier


class AheadReads:
    """Reads experts in order through a few rows of the tier, several at a time; a row is written again after its span
    was copied.

    Args:
        rows: memory of each row [span_elements].

    Attributes:
        experts: in the order in which they must be taken.
    """

    def __init__(self, tier: SpanTier, reader: SpanReader, experts: list[Expert], rows: dict[int, Tensor]) -> None:
        self._tier, self._reader, self.experts = tier, reader, experts
        self._rows = list(rows.items())
        self._reads: list[Future[StoreError | None]] = []
        for _ in self._rows[: len(experts)]:
            self._submit(None)

    def is_read(self, at: int) -> bool:
        """Whether the expert at this place in the order can be had without a wait."""
        return at < len(self._reads) and self._reads[at].done()

    def wait(self, at: int) -> Tensor | StoreError:
        """The span [span_elements] of the expert at this place, valid until `copied`, or why it cannot be read."""
        began = time.perf_counter()
        error = self._reads[at].result()
        self._tier.waited(time.perf_counter() - began)
        return self._row(at)[1] if error is None else error

    def copied(self, wait: Callable[[], object] | None) -> None:
        """The next span in the order is no longer needed after `wait` has returned; None: it is not needed now."""
        if len(self._reads) < len(self.experts):
            self._submit(wait)

    def finish(self) -> None:
        """Waits for what is being read. The experts that were read last keep the rows."""
        last: dict[int, Expert] = {}
        failures: Failures = {}
        for at, read in enumerate(self._reads):
            error = read.result()
            if error is not None:
                failures[self.experts[at]] = error
            last[self._row(at)[0]] = self.experts[at]
        num_gone = len(self._reads) - len(last) - len(failures.keys() - set(last.values()))
        self._tier.place([(expert, row) for row, expert in last.items()], failures, num_gone)
        self._tier.give_back(row for row, _ in self._rows if row not in last)

    def _row(self, at: int) -> tuple[int, Tensor]:
        return self._rows[at % len(self._rows)]

    def _submit(self, wait: Callable[[], object] | None) -> None:
        at = len(self._reads)
        self._reads.append(self._reader.submit(self.experts[at], self._row(at)[1], wait))
