"""Computes the experts of a prompt's chunk: resident ones in their slots, the others streamed through a ring of spans.

A chunk of many tokens demands nearly every expert of every layer, so all allowed experts that are not resident are
copied, layer after layer, before the routers run. A few programs on a stream of their own copy a group in one launch,
several groups ahead of the compute and across layers; each missing expert crosses PCIe once a chunk. Experts that are
in no memory are read from the disk in the same order, several at a time, ahead of their copies. A small chunk waits for
its routers' choice first (one synchronisation a layer), and copies and reads only the chosen experts. Slots and page
table are never changed.
Invariant: a ring group is overwritten only after the products that read it have been enqueued, ordered by events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from expert_store.errors import StoreError
from expert_store.paging.pages import DevicePages
from server.model.device.kernels import packed_prefill
from server.model.device.kernels import prefill as kernels
from server.model.device.kernels.packed import MAGIC
from server.model.device.step.launch import launch
from server.model.device.step.packed import codes_a_word, expert_constants, row_constants
from server.model.device.step.tuning import divisor, pow2
from server.model.device.step.weights import DecodeShape
from server.model.seam.observation import OutputObserver

GROUP = 8
"""Plain experts that are copied, waited for and computed together; of packed ones so many as have as many bytes."""

RING_GROUPS = 4
COPY_PROGRAMS = 16
COPY_PIECES = 16
COPY_BYTES = 32 << 10
"""Programs of a copy, pieces of a span, and bytes that a program has on their way."""

AHEAD_PICKS = 12
"""Picks for each expert from which a chunk streams all experts ahead: recorded traces then demand 96 % of a layer."""

PACKED_WORDS = 16
"""Words of codes that a dot takes from each of a tile's rows: the least that tensor cores take."""


def group_spans(shape: DecodeShape) -> int:
    """Experts that are copied, waited for and computed together."""
    plain = 3 * shape.hidden * shape.intermediate * shape.dtype.itemsize
    return GROUP * max(1, plain // shape.span_bytes)


def ring_spans(shape: DecodeShape) -> int:
    """Spans of the ring that the missing experts of a prompt's chunk go through."""
    return RING_GROUPS * group_spans(shape)


class AheadReads(Protocol):
    """Reads experts in their order, through a few rows of host memory."""

    experts: list[tuple[int, int]]

    def is_read(self, at: int) -> bool:
        """Whether the expert at this place in the order can be had without a wait."""

    def wait(self, at: int) -> Tensor | StoreError:
        """The span of the expert at this place, valid until `copied`, or why it cannot be read."""

    def copied(self, wait: Callable[[], object] | None) -> None:
        """The next span in the order is no longer needed after `wait` has returned; None: it is not needed now."""

    def finish(self) -> None:
        """Waits for what is being read."""


class Disk(Protocol):
    """Reads experts that are in no memory."""

    def ahead(self, allowed: npt.NDArray[np.bool_]) -> AheadReads | None:
        """Starts to read those of allowed [L, E], layer by layer; None if there are none, or no room."""

    def in_turns(self, layer: int, experts: Sequence[int]) -> Iterator[list[int]]:
        """Reads a part of a layer's experts and yields it; reads the next part after this one was computed."""


@dataclass
class _Group:
    """Experts of one layer that one launch computes: entries [start, stop) of the chunk's flat ids and targets."""

    layer: int
    start: int
    stop: int
    copies: list[tuple[int, int]]  # (expert, ring entry)
    first_read: int = -1  # the place of the first expert in the reads from disk; -1: they are in host memory
    unread: dict[int, StoreError] = field(default_factory=dict)
    arrived: Any = None
    used: Any = None


class ExpertStream:
    """Computes the experts of prefill chunks over the slots of `pages` and a ring of `num_groups` groups.

    Args:
        shape: of the experts; activations and results are in its dtype.
    """

    def __init__(self, pages: DevicePages, shape: DecodeShape, *, num_groups: int = RING_GROUPS) -> None:
        self._pages, self._shape = pages, shape
        self._hidden, self._intermediate = shape.hidden, shape.intermediate
        self._num_groups = num_groups if pages.shape.paged else 0
        self._group = group_spans(shape)
        self._ring = pages.slots.new_empty(self._num_groups * self._group, pages.shape.span_elements)
        distance = self._ring.data_ptr() - pages.slots.data_ptr() if self._num_groups else 0
        self._ring_offset = distance // pages.slots.itemsize
        self._cuda = pages.slots.is_cuda
        self._stream = torch.cuda.Stream(priority=-1) if self._cuda else None  # type: ignore[no-untyped-call]
        self._table: npt.NDArray[np.int32] = np.zeros((0, 0), np.int32)
        self._wanted: npt.NDArray[np.bool_] = np.zeros((0, 0), np.bool_)
        self._absent: npt.NDArray[np.bool_] = np.zeros((0, 0), np.bool_)
        self._disk: Disk | None = None
        self._reads: AheadReads | None = None
        self._groups: list[_Group] = []
        self._enqueued = self._computed = 0
        self._ids = self._sources = self._targets = torch.empty(0)
        self._ahead = False
        self.copied_spans = 0

    def begin(self, num_tokens: int, allowed: npt.NDArray[np.bool_], disk: Disk | None = None) -> None:
        """Starts a chunk whose mask is allowed [L, E] bool; `end` ends it. Reads the page table back (synchronises).

        Args:
            disk: reads experts that have no slot and no span; without it none of them is chosen.
        """
        shape = self._pages.shape
        few = num_tokens * shape.top_k < AHEAD_PICKS * shape.num_experts
        self._disk, self._reads = disk, None if few or disk is None else disk.ahead(allowed)
        self._read_table(allowed)
        self._ahead = not few and (self._reads is not None or not self._absent.any())
        self._reset()
        if self._ahead:
            self._list_groups(range(shape.num_layers), self._wanted)

    def end(self) -> None:
        """Ends the chunk, whether it was computed or not."""
        if self._reads is not None:
            self._reads.finish()
            self._reads = None

    def forward(
        self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor, observer: OutputObserver | None = None
    ) -> Tensor:
        """Weighted sum of the chosen experts' outputs: hidden [T, H], index [T, K] (ids >= E: none), weights [T, K].

        Raises StoreError for a chosen expert that cannot be read.
        """
        num_tokens, top_k = index.shape
        given, ids = hidden, index.reshape(-1)
        sorted_ids, order = ids.sort(stable=True)
        edges = torch.arange(self._pages.shape.num_experts + 1, device=ids.device, dtype=sorted_ids.dtype)
        offsets = torch.searchsorted(sorted_ids, edges).to(torch.int32)
        if self._shape.packed is not None:  # in planes, see `kernels.packed`
            hidden = hidden.view(num_tokens, -1, codes_a_word(self._shape.packed[0])).transpose(1, 2).flatten(1)
        act = hidden.new_empty(num_tokens * top_k, self._intermediate)
        out = hidden.new_zeros(num_tokens * top_k, self._hidden)
        for _ in (None,) if self._ahead else self._turns(layer, ids):
            while self._computed < len(self._groups) and self._groups[self._computed].layer == layer:
                group = self._groups[self._computed]
                self._enqueue_copies(group)
                for expert in np.unique(ids.cpu().numpy()).tolist() if group.unread else ():
                    if expert in group.unread:
                        raise group.unread[expert]
                self._compute(group, hidden, offsets, order, act, out, top_k)
                self._computed += 1
                self._enqueue_copies()
        weighted = out * weights.reshape(-1, 1).to(out.dtype)
        result = weighted.view(num_tokens, top_k, -1).sum(dim=1)
        if observer is not None and observer.is_on:
            observer.note(layer, given, out, result)
        return result

    def _read_table(self, allowed: npt.NDArray[np.bool_]) -> None:
        self._table = self._pages.page_table.cpu().numpy()
        in_reach = self._pages.servable.numpy() | (self._table >= 0)
        self._wanted, self._absent = allowed & in_reach, allowed & ~in_reach

    def _turns(self, layer: int, ids: Tensor) -> Iterator[None]:
        """Lists the layer's groups by its router's choice: experts in reach first, then the others after each read."""
        picked = np.unique(ids.cpu().numpy())
        picked = picked[picked < self._pages.shape.num_experts]
        here = picked[self._wanted[layer, picked]]
        missing = picked[self._absent[layer, picked]].tolist()
        self._list_only(layer, here)
        yield
        if not missing:
            return
        assert self._disk is not None, f"experts {missing} of layer {layer} were chosen and are in no memory"
        for part in self._disk.in_turns(layer, missing):
            self._read_table(self._wanted | self._absent)
            self._list_only(layer, np.array(part))
            yield

    def _list_only(self, layer: int, experts: npt.NDArray[np.int64]) -> None:
        chosen = np.zeros_like(self._wanted)
        chosen[layer, experts] = True
        self._reset()
        self._list_groups([layer], chosen & self._wanted)

    def _reset(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        self._groups = []
        self._enqueued = self._computed = 0

    def _list_groups(self, layers: Any, wanted: npt.NDArray[np.bool_]) -> None:
        """Lists the groups of the layers, resident experts first, and starts as many copies as the ring holds."""
        span, slots = self._pages.shape.span_elements, self._pages.shape.num_slots
        ids: list[int] = []
        sources: list[int] = []
        targets: list[int] = []
        entry = 0
        first_read: dict[int, int] = {}
        unread: dict[int, list[int]] = {}
        for at, (layer, expert) in enumerate(self._reads.experts if self._reads is not None else ()):
            first_read.setdefault(layer, at)
            unread.setdefault(layer, []).append(expert)
        for layer in layers:
            resident = np.flatnonzero(wanted[layer] & (self._table[layer] >= 0)).tolist()
            missing = np.flatnonzero(wanted[layer] & (self._table[layer] < 0)).tolist()
            if resident:
                self._groups.append(_Group(layer, len(ids), len(ids) + len(resident), []))
                ids += resident
                sources += [0] * len(resident)
                targets += [(layer * slots + int(self._table[layer, expert])) * span for expert in resident]
            reads = unread.get(layer, [])
            for experts, read_at, size in ((missing, -1, self._group), (reads, first_read.get(layer, 0), GROUP)):
                for first in range(0, len(experts), size):
                    part = experts[first : first + size]
                    base = entry % max(self._num_groups, 1) * self._group
                    entry += 1
                    copies = [(expert, base + at) for at, expert in enumerate(part)]
                    group = _Group(
                        layer, len(ids), len(ids) + len(part), copies, read_at if read_at < 0 else read_at + first
                    )
                    self._groups.append(group)
                    ids += part
                    sources += self._pages.offsets[layer, part].tolist()
                    targets += [self._ring_offset + (base + at) * span for at in range(len(part))]
        self._ids = torch.tensor(ids, dtype=torch.int32).to(self._pages.device)
        offsets = torch.tensor([sources, targets], dtype=torch.int64).to(self._pages.device)
        self._sources, self._targets = offsets
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            offsets.record_stream(self._stream)
        self._streamed = [group for group in self._groups if group.copies]
        self._enqueue_copies()

    def _enqueue_copies(self, due: _Group | None = None) -> None:
        """Copies every next group whose place in the ring is free: the products that read it are already enqueued.
        Waits for the disk only for the group that is `due`."""
        while self._enqueued < len(self._streamed):
            group = self._streamed[self._enqueued]
            before = self._enqueued - self._num_groups
            if before >= 0 and self._streamed[before].used is None:
                return
            if group is not due and not self._is_read(group):
                return
            if self._stream is None:
                self._copy(group)
            else:
                with torch.cuda.stream(self._stream):
                    if before >= 0:
                        self._stream.wait_event(self._streamed[before].used)
                    self._copy(group)
                    group.arrived = self._stream.record_event()
            self.copied_spans += len(group.copies)
            self._enqueued += 1

    def _is_read(self, group: _Group) -> bool:
        reads, first = self._reads, group.first_read
        return first < 0 or reads is None or all(reads.is_read(first + at) for at in range(len(group.copies)))

    def _copy(self, group: _Group) -> None:
        """Copies a group's spans into the ring, on the current stream."""
        if group.first_read < 0 or self._reads is None:
            self._copy_spans(self._sources[group.start : group.stop], self._targets[group.start : group.stop], False)
            return
        for at, (expert, entry) in enumerate(group.copies):
            span = self._reads.wait(group.first_read + at)
            if isinstance(span, StoreError):
                group.unread[expert] = span
                self._reads.copied(None)
                continue
            self._ring[entry].copy_(span, non_blocking=True)
            self._reads.copied(None if self._stream is None else self._stream.record_event().synchronize)

    def _copy_spans(self, sources: Tensor, targets: Tensor, compiles: bool) -> None:
        shape = self._pages.shape
        args = (self._pages.slots, sources, targets, len(sources))
        programs = COPY_PROGRAMS if self._cuda else 1
        sizes = {
            "SPAN": shape.span_elements, "PIECES": COPY_PIECES if self._cuda else 1, "PROGRAMS": programs,
            "COPY": COPY_BYTES // shape.dtype.itemsize, "num_warps": 8,
        }  # fmt: skip
        launch(kernels.copy_spans, (programs,), *args, compiles=compiles, **sizes)

    def _compute(
        self, group: _Group, hidden: Tensor, offsets: Tensor, order: Tensor, act: Tensor, out: Tensor, top_k: int
    ) -> None:
        if group.arrived is not None:
            torch.cuda.current_stream().wait_event(group.arrived)
        ids, targets = self._ids[group.start : group.stop], self._targets[group.start : group.stop]
        self._run(ids, targets, hidden, offsets, order, act, out, top_k, 64 if hidden.shape[0] >= 256 else 16, False)
        group.used = torch.cuda.current_stream().record_event() if self._cuda else True

    def _run(
        self, ids: Tensor, targets: Tensor, hidden: Tensor, offsets: Tensor, order: Tensor, act: Tensor, out: Tensor,
        top_k: int, tokens: int, compiles: bool,
    ) -> None:  # fmt: skip
        """Computes both products of a group in tiles of `tokens`, or only compiles them."""
        size, width, inner = len(ids), self._hidden, self._intermediate
        tile = 64 if self._cuda else pow2(min(64, width))
        anchor = self._pages.slots
        run = partial(launch, compiles=compiles, num_warps=4, num_stages=3)
        grids = (size, triton.cdiv(inner, tile)), (size, triton.cdiv(width, tile))
        up = (hidden, anchor, ids, targets, offsets, order, act)
        down = (act, anchor, ids, targets, offsets, order, out)
        kind = expert_constants(self._shape.experts, packed=self._shape.packed is not None)
        up_sizes: dict[str, Any] = {"K": top_k, "H": width, "I": inner, "BT": tokens, "BI": tile, **kind}
        down_sizes = {"H": width, "I": inner, "BT": tokens, "BH": tile, "BIAS": kind["BIAS"]}
        if self._shape.packed is None:
            run(kernels.gate_up_group, grids[0], *up, **up_sizes, BK=divisor(width, 64))
            run(kernels.down_group, grids[1], *down, **down_sizes, BK=divisor(inner, 64))
            return
        rows, columns = self._shape.packed
        of_down = row_constants(columns, inner)
        up_sizes |= {"BW": PACKED_WORDS, "VD": of_down["V"], **row_constants(rows, width)}
        run(packed_prefill.gate_up_group, grids[0], *up, MAGIC, **up_sizes)
        run(
            packed_prefill.down_group, grids[1], *down, MAGIC, **down_sizes, **of_down, BW=PACKED_WORDS,
            BEFORE=self._shape.down_at,
        )  # fmt: skip

    def compile(self) -> None:
        """Compiles copies, and the products of short and of long chunks, without a launch."""
        device, dtype, top_k = self._pages.device, self._shape.dtype, self._pages.shape.top_k
        ids = torch.zeros(1, dtype=torch.int32, device=device)
        longs = torch.zeros(top_k, dtype=torch.int64, device=device)
        offsets = torch.zeros(self._pages.shape.num_experts + 1, dtype=torch.int32, device=device)
        hidden = torch.zeros(1, self._hidden, dtype=dtype, device=device)
        act = torch.zeros(top_k, self._intermediate, dtype=dtype, device=device)
        out = torch.zeros(top_k, self._hidden, dtype=dtype, device=device)
        self._copy_spans(longs[:1], longs[:1], True)
        for tokens in (16, 64):
            self._run(ids, longs[:1], hidden, offsets, longs, act, out, top_k, tokens, True)
