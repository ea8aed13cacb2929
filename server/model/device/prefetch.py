"""What fetching ahead holds on the device, and its place beside the captured step: see `kernels.prefetch`.

A second stream, forked off after each layer's router, runs `fetch_ahead` while the first goes on; the two are joined
once, at the step's end, so that a captured step stays one graph. Invariant: the step's results do not depend on
whether, when or how far it runs. It fetches what is in no slot, for one row of batch 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expert_store.paging.pages import DevicePages
from server.model.device.kernels.prefetch import DISTANCES, NUM_LANES
from server.model.device.weights import DecodeShape


class Prefetch:
    """Lanes for guessed experts and the words by which the two streams agree on them.

    Args:
        tile_rows: rows of gate, and as many of up, that are fetched at a time.
        num_programs: programs that fetch.
        forced: guesses [num_steps, L, 2, K] int32, best first, that replace the gates' (replayed traces): for each
            layer those made one layer before it and two.
        most_tiles: fetched of one guess at most; None: all.
    """

    def __init__(
        self,
        shape: DecodeShape,
        pages: DevicePages,
        *,
        tile_rows: int,
        num_programs: int = 16,
        forced: Tensor | None = None,
        most_tiles: int | None = None,
    ) -> None:
        device, tiles = pages.device, -(-shape.intermediate // tile_rows)
        self.num_programs, self.tile_rows, self.forced = num_programs, tile_rows, forced
        self.most_tiles = tiles if most_tiles is None else min(most_tiles, tiles)
        self.lanes = torch.zeros(
            NUM_LANES.value, 2 * shape.intermediate * shape.hidden, dtype=shape.dtype, device=device
        )
        self.lanes_at = (self.lanes.data_ptr() - pages.slots.data_ptr()) // shape.dtype.itemsize
        self.scores = torch.zeros(DISTANCES.value, shape.num_experts, dtype=torch.float32, device=device)

        def words(*size: int) -> Tensor:
            return torch.full(size, -1, dtype=torch.int64, device=device)

        self.guess, self.state, self.flags = (
            words(2 * NUM_LANES.value),
            words(NUM_LANES.value, tiles),
            words(num_programs),
        )
        self.progress, self.idle = words(1), words(1)
        self.fetched = torch.zeros(1, dtype=torch.int32, device=device)
        self._stream = torch.cuda.Stream(device, priority=-1) if self.lanes.is_cuda else None  # type: ignore[no-untyped-call]

    def reset(self) -> None:
        """Forgets everything; needed where the pages' step counter is set back."""
        for words in (self.guess, self.state, self.flags, self.progress, self.idle):
            words.fill_(-1)

    def fork(self) -> None:
        """What is enqueued on the current stream so far comes before the next kernel of the second one."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.lanes.device))

    def beside(self) -> torch.cuda.StreamContext:
        """Context in which kernels go to the second stream (on the CPU: to the only one)."""
        return torch.cuda.stream(self._stream)

    def join(self) -> None:
        """What comes next on the current stream waits for the second one."""
        if self._stream is not None:
            torch.cuda.current_stream(self.lanes.device).wait_stream(self._stream)
