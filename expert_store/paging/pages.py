"""Device-side state of the paged experts: slots, page table, owners, last uses, work list; mutated by kernels alone.

`DevicePages` owns the tensors that `kernels.list_work` reads and writes. The host reads them (statistics, integrity)
only between steps, and changes them only in place, so that captured graphs stay valid. Invariant: page table and slot
owners are inverse to each other, layer by layer; a slot's bytes are the owner's span. A step may need more experts than
a layer has slots: the others go to a spill area, which all layers share and each layer overwrites, so no batch needs a
second pass. An expert may be in a slot *alone*, without a span in the host tier: its slot is then never evicted. The
last slots of each layer may be *closed*: they hold no expert and may have no memory, and kernels see them as kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expert_store.errors import SlotsError

Policy = Literal["lru", "lfu"]
KEPT, CLOSED = 1, 2
"""Marks of slots that are never evicted: for the expert in it, and because it has no memory."""


@dataclass(frozen=True)
class PagesShape:
    """L layers of E experts, top-K, S slots a layer, spans of `span_elements` of `dtype`, batches of at most B
    tokens.
    """

    num_layers: int
    num_experts: int
    top_k: int
    num_slots: int
    span_elements: int
    max_batch: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def max_distinct(self) -> int:
        """Most distinct experts that one layer of one step can need."""
        return min(self.num_experts, self.max_batch * self.top_k)

    @property
    def paged(self) -> bool:
        return self.num_slots < self.num_experts

    def num_spill(self, num_kept: int) -> int:
        """Number of spill slots, so that every expert that a step needs has a place even if no slot can be evicted."""
        return max(0, self.max_distinct - (self.num_slots - num_kept)) if self.paged else 0


class DevicePages:
    """Slots and page table of all layers on one device.

    `host_spans` [N, span_elements] (or [L, E, span_elements]) is pinned host memory (any memory for the CPU
    interpreter), or None when every expert has a slot or spans come later (`add_spans`); `host_index` [L, E] int64 says
    which span an expert has, -1 for experts that have none: the caller masks those that are in no slot either. At most
    `num_kept` slots of a layer are never evicted; the spill area is made for that. Raises SlotsError when there are
    fewer slots than the top-k.

    `memory` [L * S + spill, span_elements] is that of all slots, layer by layer, and of the spill area; None: it is
    made. Of each layer the first `num_open` slots are open (None: all); only these and the spill area are read.
    """

    def __init__(
        self,
        shape: PagesShape,
        host_spans: Tensor | None,
        host_index: Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
        policy: Policy = "lru",
        num_kept: int = 0,
        memory: Tensor | None = None,
        num_open: int | None = None,
    ) -> None:
        num_layers, num_experts, num_slots = shape.num_layers, shape.num_experts, shape.num_slots
        if num_slots < min(shape.top_k, num_experts) or num_slots > num_experts:
            raise SlotsError(
                f"{num_slots} slots a layer: wanted from {shape.top_k} (one token's experts) to {num_experts} (all)"
            )
        if not 0 <= num_kept <= num_slots:
            raise SlotsError(f"{num_kept} kept slots a layer: wanted from 0 to {num_slots}, the slots there are")
        if shape.span_elements * shape.dtype.itemsize % 16:
            raise SlotsError(f"spans of {shape.span_elements * shape.dtype.itemsize} bytes: wanted a multiple of 16")
        self.shape, self.policy, self.num_kept, self.device = shape, policy, num_kept, torch.device(device)
        self.num_open = num_slots if num_open is None else num_open
        if memory is None:
            total = num_layers * num_slots + shape.num_spill(num_kept)
            memory = torch.empty(total, shape.span_elements, dtype=shape.dtype, device=device)
        self.slots = memory
        self.spill = self.slots[num_layers * num_slots :]
        self._arenas: list[Tensor] = []
        self._first_rows: list[int] = []

        ints = self._ints
        self.page_table = ints(num_layers, num_experts, fill=-1)
        self.slot_owner = ints(num_layers, num_slots, fill=-1)
        self.last_use = ints(num_layers, num_slots, fill=-1)
        self.use_count = ints(num_layers, num_experts)
        self.kept = ints(num_layers, num_slots, dtype=torch.int8)
        self.kept[:, self.num_open :] = CLOSED
        self.stats = ints(num_layers, 4, dtype=torch.int64)
        self.step = ints(1)
        spans = torch.arange(num_layers + 1, dtype=torch.int64) * num_slots
        self.pool_offset = (spans * shape.span_elements).to(device)
        self.host_index = self._index(host_spans, host_index)
        self.alone = torch.zeros(num_layers, num_experts, dtype=torch.bool)
        self.host_offset = ints(num_layers, num_experts, dtype=torch.int64)
        self.offsets = torch.zeros(num_layers, num_experts, dtype=torch.int64)  # the same on the host
        if host_spans is not None:
            self._add_arena(host_spans.view(-1, shape.span_elements))
            self._write_offsets()
        self._make_work_list()

    def _ints(self, *size: int, fill: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full(size, fill, dtype=dtype, device=self.device)

    def _make_work_list(self) -> None:
        """Makes the work list of the current layer; layers run one after the other, so one is enough."""
        shape, ints = self.shape, self._ints
        distinct, batch = shape.max_distinct, 1 << (shape.max_batch - 1).bit_length()
        self.header = ints(2)
        self.target = ints(distinct, dtype=torch.int64)
        self.source = ints(distinct, dtype=torch.int64)
        self.count = ints(distinct)
        self.pairs = ints(distinct, batch)
        pairs = 1 << (shape.max_batch * shape.top_k - 1).bit_length()
        self.pair_target = ints(pairs, fill=-1, dtype=torch.int64)
        self.pair_source = ints(pairs, dtype=torch.int64)
        self.scratch = ints(2 << (shape.num_slots - 1).bit_length(), dtype=torch.int64)

    def _index(self, host_spans: Tensor | None, host_index: Tensor | None) -> Tensor:
        shape = self.shape
        if host_index is not None:
            return host_index.to("cpu", torch.int64)
        if host_spans is None:
            return torch.full((shape.num_layers, shape.num_experts), -1, dtype=torch.int64)
        return torch.arange(shape.num_layers * shape.num_experts).view(shape.num_layers, shape.num_experts)

    def _add_arena(self, spans: Tensor) -> int:
        """Appends spans [n, span_elements] to the host tier; returns the row of the first."""
        if (spans.data_ptr() - self.slots.data_ptr()) % 16:
            raise SlotsError("host spans and slots differ in alignment: both must start at a multiple of 16 bytes")
        first = self._first_rows[-1] + len(self._arenas[-1]) if self._arenas else 0
        self._arenas.append(spans)
        self._first_rows.append(first)
        return first

    def _write_offsets(self) -> None:
        """Element offset of each expert's span from the slots' first element: host and device share one address space.
        In place, ordered after the steps that are enqueued."""
        size = self.shape.dtype.itemsize
        origins = [(arena.data_ptr() - self.slots.data_ptr()) // size for arena in self._arenas]
        firsts = torch.tensor(self._first_rows)
        arena = torch.searchsorted(firsts, self.host_index.clamp(min=0), right=True) - 1
        rows = self.host_index - firsts[arena]
        offsets = torch.tensor(origins)[arena] + rows * self.shape.span_elements
        self.offsets = torch.where(self.host_index >= 0, offsets, 0)
        self.host_offset.copy_(self.offsets)

    def host_span(self, layer: int, expert: int) -> Tensor:
        """The span of an expert in the host tier, a view [span_elements]. Raises SlotsError if it has none."""
        row = int(self.host_index[layer, expert])
        if row < 0:
            raise SlotsError(f"expert {expert} of layer {layer} has no span in the host tier")
        return self.host_row(row)

    @property
    def servable(self) -> Tensor:
        """Experts that a step can use, [L, E] bool on the host: their span is in the host tier, or they are in slots
        that are never evicted. Synchronises if every expert has a slot."""
        return (self.host_index >= 0) | self.alone if self.shape.paged else self.page_table.cpu() >= 0

    @property
    def open_bytes(self) -> int:
        """Bytes of the open slots and the spill area."""
        return (self.shape.num_layers * self.num_open + len(self.spill)) * self.slots[0].nbytes

    @property
    def num_host_spans(self) -> int:
        """Number of spans that the host tier has room for."""
        return sum(map(len, self._arenas))

    def host_row(self, row: int) -> Tensor:
        """The memory of a row of the host tier, a view [span_elements]; write it only while it belongs to no expert."""
        at = bisect_right(self._first_rows, row) - 1
        return self._arenas[at][row - self._first_rows[at]]

    def add_spans(self, spans: Tensor, experts: Sequence[tuple[int, int] | None]) -> None:
        """Adds (layer, expert) that were in no tier, with their spans [n, span_elements] in pinned memory.

        Call it between two steps. If every expert has a slot they go to their slots at once, else to the host tier,
        which keeps `spans`; they are then fetched like any other. None is a span without an expert.
        """
        if not self.shape.paged:
            for span, expert in zip(spans, experts, strict=True):
                if expert is not None:
                    layer, slot = expert[0], int((self.slot_owner[expert[0]] < 0).nonzero()[0])
                    self.slots[layer * self.shape.num_slots + slot].copy_(span)
                    self.slot_owner[layer, slot] = expert[1]
                    self.page_table[expert] = slot
            return
        first = self._add_arena(spans)
        self.reassign((), {expert: first + row for row, expert in enumerate(experts) if expert is not None})

    def reassign(
        self,
        dropped: Iterable[tuple[int, int]],
        placed: Mapping[tuple[int, int], int],
        alone: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Between two steps: remove the span of some (layer, expert) from the host tier, or from the slot where they
        are alone; give their slots for good to those of `alone`, which are in evictable slots and lose their span in
        the host tier; assign rows of the host tier to others, which had none. The caller must mask the removed ones
        before the next step."""
        dropped, alone = list(dropped), list(alone)
        leaving = [expert for expert in dropped if self.alone[expert]]
        if leaving or alone:
            table, kept = self.page_table.cpu(), self.kept.cpu()
            owner = self.slot_owner.cpu()
            for layer, expert in leaving:
                slot = int(table[layer, expert])
                kept[layer, slot], owner[layer, slot], table[layer, expert] = 0, -1, -1
                self.alone[layer, expert] = False
            for layer, expert in alone:
                slot = int(table[layer, expert])
                assert slot >= 0, f"expert {expert} of layer {layer} is in no slot"
                kept[layer, slot] = 1
                self.alone[layer, expert] = True
            most = int((kept == KEPT).sum(dim=1).max())
            assert most <= self.num_kept, f"{most} kept slots, and the spill area is made for {self.num_kept}"
            self.page_table.copy_(table)
            self.kept.copy_(kept)
            self.slot_owner.copy_(owner)
        for one in (*dropped, *alone):
            self.host_index[one] = -1
        for one, row in placed.items():
            assert int(self.host_index[one]) < 0, f"expert {one[1]} of layer {one[0]} has a span already"
            self.host_index[one] = row
        self._write_offsets()

    def exchange(self, layer: int, warm: int, cool: int) -> None:
        """Between two steps: `warm`, in an evictable slot, gives its row of the host tier to `cool`, which is alone in
        another slot; then `warm` is alone, and the slot of `cool` can be evicted. Copies a span from the device."""
        table, row = self.page_table[layer].cpu(), int(self.host_index[layer, warm])
        self.host_row(row).copy_(self.slots[layer * self.shape.num_slots + int(table[cool])])
        self.host_index[layer, cool], self.host_index[layer, warm] = row, -1
        self.kept[layer, int(table[cool])], self.kept[layer, int(table[warm])] = 0, 1
        self.alone[layer, cool], self.alone[layer, warm] = False, True
        self._write_offsets()

    def seed(self, experts: Tensor) -> None:
        """Fills slots 0..n-1 of each layer with experts [L, n] (n <= those open, -1: none), from the host tier; the
        kept ones come first. Experts without a span there must be in their slots already.

        Mutates everything; call it before the first step or between steps.
        """
        for layer, chosen in enumerate(experts.tolist()):
            for slot, expert in enumerate(chosen):
                if expert >= 0 and int(self.host_index[layer, expert]) >= 0:
                    target = self.slots[layer * self.shape.num_slots + slot]
                    target.copy_(self.host_span(layer, expert), non_blocking=True)
        self.adopt(experts)

    def adopt(self, experts: Tensor) -> None:
        """Declares that slot i of layer l holds experts[l, i] ([L, n], n <= those open, -1: nothing) and that all other
        slots are empty. The first `num_kept` slots are never evicted; an expert there without a span is alone."""
        layers, width = experts.shape
        owners = torch.full((layers, self.shape.num_slots), -1, dtype=torch.int32)
        owners[:, :width] = experts.to("cpu", torch.int32)
        table = torch.full((layers, self.shape.num_experts), -1, dtype=torch.int32)
        at_layer, at_slot = (owners >= 0).nonzero(as_tuple=True)
        table[at_layer, owners[at_layer, at_slot].long()] = at_slot.to(torch.int32)
        self.slot_owner.copy_(owners)
        self.page_table.copy_(table)
        self.last_use.fill_(-1)
        self.kept[:, : self.num_open] = 0
        self.kept[:, : self.num_kept] = (self.slot_owner[:, : self.num_kept] >= 0).to(torch.int8)
        self.alone.zero_()
        for layer, slot in (owners[:, : self.num_kept] >= 0).nonzero().tolist():
            expert = int(owners[layer, slot])
            self.alone[layer, expert] = self.shape.paged and int(self.host_index[layer, expert]) < 0
        self.stats.zero_()

    def resize(self, num_open: int, num_kept: int) -> None:
        """Between two steps: open slots, or close the last ones, until each layer has `num_open`; `num_kept` of them
        may be kept, and no more are. Experts in slots that close change places with the next victims, which leave.

        Slots that open must have memory before; those that closed need none as soon as the copies that this enqueues
        have ended.
        """
        assert num_kept <= num_open <= self.shape.num_slots, f"{num_open} slots a layer, {num_kept} of them kept"
        tensors = self.page_table, self.slot_owner, self.last_use, self.kept
        table, owner, used, kept = (one.cpu().numpy().copy() for one in tensors)
        num_leaving = max(0, self.num_open - num_open)
        for layer, order in enumerate(self._eviction_order(owner, used, kept) if num_leaving else ()):
            leaving, staying = order[:num_leaving], order[num_leaving:]
            assert (kept[layer, leaving] == 0).all(), f"layer {layer} keeps more than {num_open} experts"
            gone = owner[layer, leaving]
            table[layer, gone[gone >= 0]] = -1
            for to, at in zip(leaving[leaving < num_open], staying[staying >= num_open], strict=True):
                self.slots[layer * self.shape.num_slots + to].copy_(self.slots[layer * self.shape.num_slots + at])
                for one in (owner, used, kept):
                    one[layer, to] = one[layer, at]
                if owner[layer, to] >= 0:
                    table[layer, owner[layer, to]] = to
        owner[:, num_open:], used[:, num_open:], kept[:, num_open:] = -1, -1, CLOSED
        kept[:, self.num_open : num_open] = 0
        for now, then in zip(tensors, (table, owner, used, kept), strict=True):
            now.copy_(torch.from_numpy(then))
        self.num_open, self.num_kept = num_open, num_kept

    def _eviction_order(
        self, owner: npt.NDArray[np.int32], used: npt.NDArray[np.int32], kept: npt.NDArray[np.int8]
    ) -> npt.NDArray[np.int64]:
        """The open slots of each layer, [L, those], the next victim first as in `kernels._rank_victims`; kept ones
        last."""
        opened = slice(self.num_open)
        key = used[:, opened].astype(np.int64)
        if self.policy == "lfu":
            uses = self.use_count.cpu().numpy().astype(np.int64)
            key += np.take_along_axis(uses, np.maximum(owner[:, opened], 0), axis=1) << 32
        key = np.where(owner[:, opened] < 0, -1, key)
        return np.argsort(np.where(kept[:, opened] == KEPT, 1 << 62, key), axis=1, kind="stable")

    def hit_rate(self) -> float:
        """Share of the distinct experts needed, over layers and steps, that were in a slot. Synchronises."""
        hits, misses = self.stats[:, 0].sum().item(), self.stats[:, 1].sum().item()
        return float(hits) / max(float(hits + misses), 1.0)

    def check_integrity(self, *, contents: bool = False) -> None:
        """Raises SlotsError if the invariant is broken; with `contents` also compares the bytes of resident experts
        with their spans in the host tier."""
        table, owners = self.page_table.cpu(), self.slot_owner.cpu()
        closed = self.kept.cpu() == CLOSED
        if (owners[closed] >= 0).any() or not closed[:, self.num_open :].all() or closed[:, : self.num_open].any():
            raise SlotsError(f"of each layer the first {self.num_open} slots are open, marks and owners say {closed}")
        for layer in range(self.shape.num_layers):
            for expert, slot in enumerate(table[layer].tolist()):
                if slot >= 0 and int(owners[layer, slot]) != expert:
                    raise SlotsError(
                        f"layer {layer}: expert {expert} maps to slot {slot}, owned by {owners[layer, slot]}"
                    )
            for slot, expert in enumerate(owners[layer].tolist()):
                if expert >= 0 and int(table[layer, expert]) != slot:
                    raise SlotsError(
                        f"layer {layer}: slot {slot} owned by {expert}, which maps to {table[layer, expert]}"
                    )
                if contents and expert >= 0 and int(self.host_index[layer, expert]) >= 0:
                    span = self.host_span(layer, expert)
                    here = self.slots[layer * self.shape.num_slots + slot].cpu()
                    if not torch.equal(here.view(torch.uint8), span.cpu().view(torch.uint8)):
                        raise SlotsError(f"layer {layer}: slot {slot} does not hold the bytes of expert {expert}")
