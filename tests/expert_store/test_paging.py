"""Paging kernels under random choices, against a page table kept by hand in Python; Triton's interpreter on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from expert_store.errors import SlotsError
from expert_store.paging.kernels import LFU, LRU, copy_span, list_work
from expert_store.paging.pages import DevicePages, PagesShape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS, EXPERTS, TOP_K, BATCH, SPAN = 2, 7, 2, 2, 16


@triton.jit
def list_and_fetch(
    choice, layer, step_at, page_table, slot_owner, last_use, use_count, kept, host_offset, pool_offset, stats,
    header, target, source, count, pairs, pair_target, pair_source, scratch, span, anchor,
    B: tl.constexpr, K: tl.constexpr, E: tl.constexpr, S: tl.constexpr, EP: tl.constexpr, SP: tl.constexpr,
    PAIRS: tl.constexpr, STRIDE: tl.constexpr, L: tl.constexpr, POLICY: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """choice [B, E] int32: which pick an expert is, -1 none. One program lists the work and then fetches."""
    rows, experts = tl.arange(0, B), tl.arange(0, EP)
    order = tl.load(choice + rows[:, None] * E + experts[None, :], mask=(experts < E)[None, :], other=-1)
    slot = tl.load(page_table + layer * E + experts, mask=experts < E, other=-1)
    list_work(
        order >= 0, order, slot, tl.load(pool_offset + layer), tl.load(pool_offset + L), layer, tl.load(step_at),
        page_table, slot_owner, last_use, use_count, kept, host_offset, stats,
        header, target, source, count, pairs, pair_target, pair_source, scratch, span,
        B, K, E, S, B, EP, SP, PAIRS, STRIDE, POLICY, PAGED,
    )  # fmt: skip
    tl.debug_barrier()
    for miss in range(tl.load(header + 1)):
        origin = tl.multiple_of(tl.load(source + miss), 8)
        copy_span(anchor, origin, tl.multiple_of(tl.load(target + miss), 8), span, 16)


def make(num_slots: int, policy: str = "lru", num_kept: int = 0, least_slots: int | None = None) -> DevicePages:
    """Pages with a spill area for as few slots."""
    spans = torch.arange(LAYERS * EXPERTS * SPAN, dtype=torch.float32).view(LAYERS, EXPERTS, SPAN)
    if DEVICE == "cuda":
        spans = spans.pin_memory()
    shape = PagesShape(LAYERS, EXPERTS, TOP_K, num_slots, SPAN, BATCH, torch.float32)
    num_spill = replace(shape, num_slots=least_slots or num_slots).num_spill(num_kept)
    memory = torch.full((LAYERS * num_slots + num_spill, SPAN), torch.nan, device=DEVICE)
    pages = DevicePages(shape, spans, device=DEVICE, policy=policy, num_kept=num_kept, memory=memory)
    pages.seed(torch.arange(num_slots).expand(LAYERS, num_slots))
    return pages


def step(pages: DevicePages, layer: int, picks: list[list[int]]) -> None:
    shape = pages.shape
    choice = torch.full((BATCH, EXPERTS), -1, dtype=torch.int32)
    for row, experts in enumerate(picks):
        for pick, expert in enumerate(experts):
            choice[row, expert] = pick
    pages.step += 1
    list_and_fetch[(1,)](
        choice.to(DEVICE), layer, pages.step, pages.page_table, pages.slot_owner, pages.last_use, pages.use_count,
        pages.kept, pages.host_offset, pages.pool_offset, pages.stats, pages.header, pages.target, pages.source,
        pages.count, pages.pairs, pages.pair_target, pages.pair_source, pages.scratch, SPAN, pages.slots,
        B=BATCH, K=TOP_K, E=EXPERTS, S=shape.num_slots, EP=8, SP=1 << (shape.num_slots - 1).bit_length(), PAIRS=4,
        STRIDE=pages.pairs.shape[1], L=LAYERS, POLICY=(LFU if pages.policy == "lfu" else LRU).value, PAGED=shape.paged,
    )  # fmt: skip


def check_work_list(pages: DevicePages, layer: int, picks: list[list[int]]) -> None:
    """Every wanted expert is listed once, with its tokens, and its bytes are where the list says."""
    listed: dict[int, set[int]] = {}
    for entry in range(int(pages.header[0])):
        row, column = divmod(int(pages.target[entry]), SPAN)
        assert column == 0
        content = pages.slots[row].cpu()
        expert = int(content[0]) // SPAN - layer * EXPERTS
        assert torch.equal(content, pages.host_span(layer, expert).cpu())
        assert (int(pages.source[entry]) != 0) == (entry < int(pages.header[1]))
        listed[expert] = {int(pair) for pair in pages.pairs[entry, : int(pages.count[entry])]}
    wanted: dict[int, set[int]] = {}
    for row, experts in enumerate(picks):
        for pick, expert in enumerate(experts):
            wanted.setdefault(expert, set()).add(row * TOP_K + pick)
    assert listed == wanted


class ByHand:
    """The same policy over dictionaries: last uses of the experts of one layer, and how often each was wanted."""

    def __init__(self, num_slots: int, policy: str, num_kept: int) -> None:
        self.slots: list[int] = list(range(num_slots))
        self.last = dict.fromkeys(self.slots, -1)
        self.uses = dict.fromkeys(range(EXPERTS), 0)
        self.policy, self.kept = policy, set(self.slots[:num_kept])
        self.hits = self.misses = self.spilled = 0

    def use(self, step: int, picks: list[list[int]]) -> None:
        wanted = {expert for experts in picks for expert in experts}
        missing = sorted(wanted - set(self.slots))
        self.hits += len(wanted) - len(missing)
        self.misses += len(missing)
        for expert in wanted & set(self.slots):
            self.last[expert] = step

        victims = [slot for slot in self.order() if self.slots[slot] not in wanted | self.kept]
        for expert, slot in zip(missing, victims, strict=False):
            self.slots[slot] = expert
            self.last[expert] = step
        self.spilled += max(0, len(missing) - len(victims))
        for experts in picks:
            for expert in experts:
                self.uses[expert] += 1

    def order(self) -> list[int]:
        """The slots, the next victim first: empty ones, and kept ones last."""

        def key(slot: int) -> tuple[bool, bool, int, int, int]:
            owner = self.slots[slot]
            uses = self.uses[owner] if self.policy == "lfu" and owner >= 0 else 0
            return (owner in self.kept, owner >= 0, uses, self.last.get(owner, -1), slot)

        return sorted(range(len(self.slots)), key=key)

    def resize(self, num_slots: int) -> None:
        order = self.order()
        leaving, staying = order[: max(0, len(order) - num_slots)], order[max(0, len(order) - num_slots) :]
        to, at = ([slot for slot in leaving if slot < num_slots], [slot for slot in staying if slot >= num_slots])
        for slot, other in zip(to, at, strict=True):
            self.slots[slot] = self.slots[other]
        self.slots = [*self.slots[:num_slots], *[-1] * (num_slots - len(self.slots))]


@pytest.mark.parametrize(
    ("policy", "num_slots", "num_kept"), [("lru", 2, 0), ("lru", 4, 0), ("lfu", 3, 0), ("lru", 5, 3)]
)
def test_random_steps_match_a_page_table_kept_by_hand(policy, num_slots, num_kept):
    pages = make(num_slots, policy, num_kept)
    hands = [ByHand(num_slots, policy, num_kept) for _ in range(LAYERS)]
    generator = torch.Generator().manual_seed(num_slots)
    for _ in range(10):
        for layer in range(LAYERS):
            rows = int(torch.randint(0, BATCH + 1, (1,), generator=generator))
            picks = [torch.randperm(EXPERTS, generator=generator)[:TOP_K].tolist() for _ in range(rows)]
            step(pages, layer, picks)
            hands[layer].use(int(pages.step), picks)
            check_work_list(pages, layer, picks)
            assert pages.slot_owner[layer].tolist() == hands[layer].slots
        pages.check_integrity(contents=True)
    assert pages.stats[:, :3].tolist() == [[hand.hits, hand.misses, hand.spilled] for hand in hands]


@pytest.mark.parametrize(("policy", "num_kept"), [("lru", 0), ("lfu", 1)])
def test_slots_that_close_lose_the_next_victims_and_those_that_open_are_filled_again(policy, num_kept):
    pages = make(5, policy, num_kept, least_slots=2)
    hands = [ByHand(5, policy, num_kept) for _ in range(LAYERS)]
    generator = torch.Generator().manual_seed(3)
    for num_open in (5, 3, 4, 2, 5, 2, 3):
        pages.resize(num_open, num_kept)
        for layer, hand in enumerate(hands):
            hand.resize(num_open)
            assert pages.slot_owner[layer, :num_open].tolist() == hand.slots
        pages.check_integrity(contents=True)
        for _ in range(2):
            for layer in range(LAYERS):
                picks = [torch.randperm(EXPERTS, generator=generator)[:TOP_K].tolist()]
                step(pages, layer, picks)
                hands[layer].use(int(pages.step), picks)
                check_work_list(pages, layer, picks)
                assert pages.slot_owner[layer, :num_open].tolist() == hands[layer].slots
                assert (pages.slot_owner[layer, num_open:] == -1).all()


def test_a_slot_used_in_this_step_is_never_a_victim():
    pages = make(2)
    step(pages, 0, [[0, 5], [1, 6]])  # both slots are in use: the misses go to the spill area
    assert pages.slot_owner[0].tolist() == [0, 1]
    assert pages.stats[0].tolist() == [2, 2, 2, 1]
    check_work_list(pages, 0, [[0, 5], [1, 6]])


def test_with_a_slot_for_every_expert_nothing_moves():
    pages = make(EXPERTS)
    step(pages, 1, [[6, 2], [3, 2]])
    assert pages.header.tolist() == [3, 0]
    assert pages.stats.sum() == 0
    check_work_list(pages, 1, [[6, 2], [3, 2]])


def test_kept_experts_stay_whatever_is_wanted():
    pages = make(3, num_kept=2)
    for expert in (3, 4, 5, 6, 3):
        step(pages, 0, [[expert, 2]])
    assert pages.slot_owner[0, :2].tolist() == [0, 1]


def test_experts_added_between_steps_are_fetched_like_any_other():
    pages = make(3)
    for expert in (5, 6):
        pages.host_index[:, expert] = -1
    pages._write_offsets()
    pages.adopt(torch.tensor([[0, 1, 2], [0, 1, -1]]))
    step(pages, 0, [[0, 4]])
    offsets = pages.host_offset
    added = [(0, 6), (1, 5), (0, 5)]
    spans = torch.stack([torch.arange(SPAN) + float((layer * EXPERTS + expert) * SPAN) for layer, expert in added])
    pages.add_spans(spans.pin_memory() if DEVICE == "cuda" else spans, added)
    assert pages.host_offset is offsets, "a captured graph holds its address"
    assert pages.servable.sum(dim=1).tolist() == [EXPERTS, EXPERTS - 1]
    for layer, picks in ((0, [[6, 5], [4, 1]]), (1, [[5, 0], [2, 3]])):
        step(pages, layer, picks)
        check_work_list(pages, layer, picks)
    pages.check_integrity(contents=True)


def test_experts_added_where_every_expert_has_a_slot_go_there_at_once():
    pages = make(EXPERTS)
    pages.adopt(torch.tensor([[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, -1]]))
    assert pages.servable.sum(dim=1).tolist() == [EXPERTS, EXPERTS - 1]
    pages.add_spans(torch.full((1, SPAN), 9.0), [(1, 0)])
    assert pages.servable.all()
    assert pages.page_table[1, 0] == 6
    assert (pages.slots[EXPERTS + 6] == 9.0).all()
    pages.check_integrity()


def test_fewer_slots_than_one_token_needs_are_refused():
    with pytest.raises(SlotsError, match=r"from 2 .* to 7"):
        make(1)


def test_integrity_check_sees_a_page_table_that_lies():
    pages = make(3)
    pages.page_table[1, 0] = 2
    with pytest.raises(SlotsError, match="layer 1"):
        pages.check_integrity()


def test_integrity_check_sees_wrong_bytes():
    pages = make(3)
    pages.slots[1, 3] += 1
    with pytest.raises(SlotsError, match="bytes of expert 1"):
        pages.check_integrity(contents=True)
