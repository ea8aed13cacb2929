"""Fetching ahead, in Triton's interpreter: whatever is guessed and however far it gets, results and slots are the same.

Layers are planned by hand here, since only the order of planning, guessing and fetching matters.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

import triton
import triton.language as tl

from expert_store.paging.kernels import LRU, plan_layer
from expert_store.paging.pages import DevicePages, PagesShape
from server.model.device.kernels import experts, prefetch
from server.model.device.prefetch import Prefetch
from server.model.device.weights import DecodeShape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS, EXPERTS, TOP_K, SLOTS, HIDDEN, INTERMEDIATE, TILE_ROWS = 5, 8, 2, 3, 32, 8, 2
TILES = INTERMEDIATE // TILE_ROWS
SHAPE = DecodeShape(
    num_layers=LAYERS, hidden=HIDDEN, num_heads=2, num_kv_heads=1, head_dim=32, vocab=8, num_experts=EXPERTS,
    top_k=TOP_K, intermediate=INTERMEDIATE, max_rows=1, max_tokens=4, dtype=torch.float32,
)  # fmt: skip


@triton.jit
def plan(
    choice, layer, step_at, page_table, slot_owner, last_use, use_count, pinned, host_offset, pool_offset, stats,
    header, target, source, count, pairs, pair_target, pair_source, scratch, span,
    K: tl.constexpr, E: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, L: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """choice [1, E] int32: which pick an expert is, -1 none; one program."""
    rows, columns = tl.arange(0, 1), tl.arange(0, E)
    order = tl.load(choice + rows[:, None] * E + columns[None, :])
    slot = tl.load(page_table + layer * E + columns)
    plan_layer(
        order >= 0, order, slot, tl.load(pool_offset + layer), tl.load(pool_offset + L), layer, tl.load(step_at),
        page_table, slot_owner, last_use, use_count, pinned, host_offset, stats,
        header, target, source, count, pairs, pair_target, pair_source, scratch, span,
        1, K, E, S, 1, E, SP, K, 1, POLICY, True,
    )  # fmt: skip


class Layers:
    """A step's layers without their attention: plan, gate_up, and fetching ahead beside it."""

    def __init__(self, *, forced: torch.Tensor | None = None, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.spans = torch.randn(LAYERS, EXPERTS, SHAPE.span_elements, generator=random)
        if DEVICE == "cuda":
            self.spans = self.spans.pin_memory()
        shape = PagesShape(LAYERS, EXPERTS, TOP_K, SLOTS, SHAPE.span_elements, 1, torch.float32)
        self.pages = DevicePages(shape, self.spans, device=DEVICE)
        self.pages.seed(torch.arange(SLOTS).expand(LAYERS, SLOTS))
        self.ahead = Prefetch(SHAPE, self.pages, tile_rows=TILE_ROWS, num_programs=1, forced=forced)
        self.normed = torch.randn(1, HIDDEN, generator=random).to(DEVICE)
        self.act = torch.zeros(TOP_K, INTERMEDIATE, device=DEVICE)
        self.gates = torch.randn(LAYERS, EXPERTS, HIDDEN, generator=random).to(DEVICE)
        self.rows = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.masks = torch.ones(1, LAYERS, EXPERTS, dtype=torch.int8, device=DEVICE)

    def choose(self, layer: int, chosen: list[int]) -> None:
        pages, choice = self.pages, torch.full((1, EXPERTS), -1, dtype=torch.int32)
        for pick, expert in enumerate(chosen):
            choice[0, expert] = pick
        plan[(1,)](
            choice.to(DEVICE), layer, pages.step, pages.page_table, pages.slot_owner, pages.last_use, pages.use_count,
            pages.pinned, pages.host_offset, pages.pool_offset, pages.stats, pages.header, pages.target, pages.source,
            pages.count, pages.pairs, pages.pair_target, pages.pair_source, pages.scratch, SHAPE.span_elements,
            K=TOP_K, E=EXPERTS, S=SLOTS, SP=4, L=LAYERS, POLICY=LRU.value,
        )  # fmt: skip

    def gate_up(self, layer: int) -> torch.Tensor:
        pages, ahead = self.pages, self.ahead
        experts.gate_up[(2 + TOP_K * TILES,)](
            self.normed, pages.slots, pages.header, pages.target, pages.source, pages.count, pages.pairs, self.act,
            ahead.guess, ahead.state, ahead.progress, ahead.idle, ahead.fetched, pages.step, pages.host_offset,
            ahead.lanes_at, layer,
            K=TOP_K, H=HIDDEN, HP=HIDDEN, I=INTERMEDIATE, BP=16, BI=TILE_ROWS, BK=32, STRIDE=1, FETCHERS=2, COPY=64,
            ONE=True, DOWN=True, AHEAD=True, E=EXPERTS, L=LAYERS, PDL=False,
        )  # fmt: skip
        return self.act.clone()

    def fetch_ahead(self, layer: int, most_tiles: int = TILES, *, masked: bool = False) -> None:
        pages, ahead = self.pages, self.ahead
        forced = self.rows if ahead.forced is None else ahead.forced
        prefetch.fetch_ahead[(1,)](
            self.normed, self.gates[layer + 1], self.gates[min(layer + 2, LAYERS - 1)], self.rows, self.masks, forced,
            ahead.scores, ahead.flags, ahead.guess, ahead.state, ahead.progress, ahead.idle, pages.step,
            pages.page_table, pages.host_offset, pages.slots, ahead.lanes_at, layer, forced.shape[0], most_tiles,
            K=TOP_K, KP=TOP_K, E=EXPERTS, EP=EXPERTS, H=HIDDEN, HP=HIDDEN, I=INTERMEDIATE, L=LAYERS, BI=TILE_ROWS,
            BE=4, COPY=64, PROGRAMS=1, MASKED=masked, FORCED=ahead.forced is not None, SLEEP=DEVICE == "cuda",
            THREADS=128, PDL=False,
        )  # fmt: skip

    def wanted(self, layer: int, chosen: list[int]) -> torch.Tensor:
        """act [K, I] computed from the host tier."""
        spans = self.spans[layer, chosen].to(DEVICE)[:, : 2 * INTERMEDIATE * HIDDEN]
        gate, up = (spans.view(TOP_K, 2 * INTERMEDIATE, HIDDEN) @ self.normed[0]).chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up

    def step(self) -> None:
        self.pages.step += 1


def some(random: torch.Generator) -> list[int]:
    return torch.randperm(EXPERTS, generator=random)[:TOP_K].tolist()


def test_random_guesses_reached_to_any_tile_change_neither_results_nor_slots():
    random = torch.Generator().manual_seed(1)
    num_steps = 6
    choices = [[some(random) for _ in range(LAYERS)] for _ in range(num_steps)]
    forced = torch.tensor([[[some(random) for _ in range(2)] for _ in range(LAYERS)] for _ in range(num_steps)])
    right = torch.rand(num_steps, LAYERS, 2, generator=random) < 0.6
    forced[right] = torch.tensor(choices)[:, :, None].expand(forced.shape)[right]
    layers = Layers(forced=forced.to(torch.int32).to(DEVICE))
    layers.pages.step.fill_(-1)
    taken = 0
    for chosen in choices:
        layers.step()
        for layer in range(LAYERS):
            layers.choose(layer, chosen[layer])
            torch.testing.assert_close(layers.gate_up(layer), layers.wanted(layer, chosen[layer]))
            if layer + 1 < LAYERS and torch.rand((), generator=random) < 0.8:
                layers.fetch_ahead(layer, int(torch.randint(TILES + 1, (), generator=random)))
                taken += int((layers.ahead.state % 4 == prefetch.DONE.value).sum())
        layers.pages.check_integrity(contents=True)
    assert taken > 0, "nothing was ever fetched ahead"


def begun(layers: Layers, *, guess: int, most_tiles: int = TILES) -> int:
    """Layer 0 served, and tiles of `guess`, which is in no slot, fetched for layer 1; returns what layer 1 misses."""
    layers.step()
    layers.choose(0, [0, 1])
    layers.gate_up(0)
    layers.fetch_ahead(0, most_tiles)
    assert int(layers.ahead.guess[2]) & 0xFFFF == guess
    return guess


def forced_to(expert: int) -> torch.Tensor:
    return torch.tensor([0, expert], dtype=torch.int32, device=DEVICE).expand(1, LAYERS, 2, TOP_K).contiguous()


def test_tiles_that_are_in_a_lane_do_not_cross_the_bus_again():
    layers = Layers(forced=forced_to(6))
    begun(layers, guess=6, most_tiles=2)
    span, wanted = layers.spans[1, 6], layers.wanted(1, [6, 0])
    fetched = span[: 2 * TILE_ROWS * HIDDEN].clone()
    span[: 2 * TILE_ROWS * HIDDEN] = torch.nan
    layers.choose(1, [6, 0])
    got = layers.gate_up(1)
    torch.testing.assert_close(got[0, : 2 * TILE_ROWS], wanted[0, : 2 * TILE_ROWS])
    slot = int(layers.pages.page_table[1, 6])
    assert torch.equal(layers.pages.slots[SLOTS + slot, : len(fetched)].cpu(), fetched)


def test_a_wrong_guess_evicts_nothing_and_stays_out_of_the_slots():
    layers = Layers(forced=forced_to(6))
    before = layers.pages.page_table.clone()
    begun(layers, guess=6)
    assert torch.equal(layers.pages.page_table, before)
    layers.ahead.lanes.fill_(torch.nan)
    layers.choose(1, [5, 0])
    torch.testing.assert_close(layers.gate_up(1), layers.wanted(1, [5, 0]))
    layers.pages.check_integrity(contents=True)


def test_what_an_earlier_step_left_in_a_lane_is_not_taken():
    layers = Layers(forced=forced_to(6))
    begun(layers, guess=6)
    layers.step()
    layers.ahead.lanes.fill_(torch.nan)
    layers.choose(1, [6, 0])
    torch.testing.assert_close(layers.gate_up(1), layers.wanted(1, [6, 0]))


def test_nothing_is_begun_once_the_next_router_has_decided():
    layers = Layers(forced=forced_to(6))
    layers.step()
    layers.choose(0, [0, 1])
    layers.gate_up(0)
    layers.choose(1, [6, 0])
    layers.gate_up(1)
    before = layers.ahead.state.clone()
    layers.fetch_ahead(0)
    assert torch.equal(layers.ahead.state, before)


@pytest.mark.parametrize("masked", [False, True])
def test_the_guess_is_the_gates_best_expert_that_is_in_no_slot_and_not_hidden(masked):
    layers = Layers(seed=4)
    scores = layers.gates @ layers.normed[0]
    if masked:
        layers.masks[0, 1, int(scores[1].argmax())] = 0
        layers.masks[0, 2, int(scores[2].argmax())] = 0
        scores = scores.masked_fill(layers.masks[0] == 0, -torch.inf)
    layers.step()
    layers.choose(0, [0, 1])
    layers.gate_up(0)
    layers.fetch_ahead(0, masked=masked)
    for layer, lane in ((1, 2), (2, 5)):
        best = [e for e in scores[layer].topk(TOP_K).indices.tolist() if int(layers.pages.page_table[layer, e]) < 0]
        word = int(layers.ahead.guess[lane])
        assert word >> 16 == int(layers.pages.step) * LAYERS + layer
        assert word & 0xFFFF == (best[0] if best else prefetch.NOBODY.value)
