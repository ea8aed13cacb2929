"""A model on a machine: its placement, its speed, and the changes that would help most, each by the same arithmetic.

Invariant: a change's figures come from the same two functions as the figures that it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from extractor.encoding.names import ExpertsDtype
from extractor.errors import ExtractError
from extractor.planning.sizes import format_size
from server.fit.facts import ModelFacts
from server.fit.placement import Placement, Wish, place
from server.fit.timing import Misses, StepTime, captured_step, host_step, prompt_seconds
from server.machine.rates import MachineRates

WORTH = 1.05
"""Least factor of tokens a second for which a change is told."""
SMALLER: tuple[ExpertsDtype, ...] = ("fp8", "int4")
SHORTEST_CONTEXT = 2048


@dataclass(frozen=True)
class Prediction:
    """Where a model's bytes go, and its speed. Times are of a server that has run for a while.

    Attributes:
        hit_rate: of the slots, for one row; `rows_hit_rate` for the wished number of rows.
        step, rows_step: seconds of a decode step of one row, and of all rows.
        ttft_seconds: of a prompt of `prompt_tokens` that waits for no other request.
    """

    placement: Placement
    wish: Wish
    hit_rate: float
    rows_hit_rate: float
    step: StepTime
    rows_step: StepTime
    prompt_tokens: int
    ttft_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of one request that runs alone."""
        return 1.0 / self.step.total

    @property
    def rows_tokens_per_second(self) -> float:
        """Of all rows together."""
        return self.wish.rows / self.rows_step.total


@dataclass(frozen=True)
class Change:
    """A change that would help, in words, and the prediction with it."""

    change: str
    after: Prediction


def predict(model: ModelFacts, rates: MachineRates, wish: Wish, prompt_tokens: int, chunk: int) -> Prediction:
    """The prediction for a model under a wish; of one that does not fit, for the least that would run.

    Args:
        chunk: tokens of a prompt that are computed at once.
    """
    placement = place(model, wish)
    step, hit_rate = _step(model, rates, placement, wish, 1, prompt_tokens)
    rows_step, rows_hit_rate = _step(model, rates, placement, wish, wish.rows, prompt_tokens)
    behind = placement.disk_bytes + placement.host_bytes
    disk_share = placement.disk_bytes / behind if behind else 0.0
    prompt = prompt_seconds(model, rates, max(placement.slots, 1), prompt_tokens, chunk, disk_share)
    return Prediction(placement, wish, hit_rate, rows_hit_rate, step, rows_step, prompt_tokens, prompt + step.total)


def _step(
    model: ModelFacts, rates: MachineRates, placement: Placement, wish: Wish, num_rows: int, depth: int
) -> tuple[StepTime, float]:
    """A decode step of `num_rows` rows of `depth` tokens, and the hit rate of its slots."""
    hit_rate = 1.0
    on_disk = 0.0
    if placement.slots < model.num_available:
        hit_rate = model.demand.hit_rate(max(placement.slots, 1), num_rows)
        if placement.disk_bytes:
            # Rows of host memory are one pool, whose experts are not those in slots but for a token's.
            behind = placement.host_experts / len(model.layers)
            together = behind + max(0, placement.slots - model.top_k) if placement.path == "captured" else behind
            on_disk = min(1.0 - model.demand.hit_rate(max(together, placement.slots), num_rows), 1.0 - hit_rate)
    misses = Misses(model.demand.distinct(num_rows), num_rows * model.top_k, hit_rate, on_disk)
    if placement.path == "captured":
        read = replace(model, step_bytes=placement.step_bytes)
        return captured_step(read, rates, misses, num_rows, wish.rows, depth), hit_rate
    return host_step(model, rates, misses, num_rows, depth), hit_rate


def changes(model: ModelFacts, rates: MachineRates, now: Prediction, chunk: int) -> list[Change]:
    """Changes that make a model fit, or faster by `WORTH`, the best first."""

    def told(what: str, other: ModelFacts, wish: Wish) -> Iterator[Change]:
        after = predict(other, rates, wish, now.prompt_tokens, chunk)
        fits_now = now.placement.problem is None
        gain = after.rows_tokens_per_second / now.rows_tokens_per_second
        if after.placement.problem is None and (not fits_now or gain >= WORTH):
            yield Change(what, after)

    found: list[Change] = []
    for experts_dtype in SMALLER:
        try:
            smaller = model.encoded(experts_dtype)
        except ExtractError:
            continue
        if smaller.span_bytes < 0.95 * model.span_bytes:
            found += told(f"experts in {experts_dtype}: extract --experts-dtype {experts_dtype}", smaller, now.wish)
    wish = now.wish
    if wish.context > SHORTEST_CONTEXT:
        shorter = max(SHORTEST_CONTEXT, wish.context // 4)
        found += told(f"a shorter context: --context {shorter}", model, _with_context(wish, shorter))
    if wish.rows > 1:
        found += told(f"fewer rows: --batch {wish.rows // 2}", model, replace(wish, rows=wish.rows // 2))
    if now.placement.disk_bytes or (now.placement.problem is not None and not wish.gpu):
        enough = _host_for_all(model, now)
        found += told(
            f"host memory of {format_size(enough)}", model, replace(wish, host_memory=enough, host_budget=None)
        )
    if wish.gpu and now.placement.slots < model.num_available:
        twice = 2 * wish.device_memory
        found += told(f"device memory of {format_size(twice)}", model, replace(wish, device_memory=twice))
    if wish.slots_memory is not None and now.placement.slots < model.num_available:
        found += told("all free memory for slots: no --slots-memory", model, replace(wish, slots_memory=None))
    return sorted(found, key=lambda one: -one.after.rows_tokens_per_second)


def _with_context(wish: Wish, context: int) -> Wish:
    return replace(wish, context=context, least_context=min(context, wish.least_context))


def _host_for_all(model: ModelFacts, now: Prediction) -> int:
    """Host memory that holds every expert, rounded up to whole GiB, with what must stay free beside them."""
    placed = now.placement
    beside = 2 << 30 if now.wish.gpu else placed.trunk_bytes + 4 * placed.kv_bytes + placed.reserve_bytes
    return ((int((model.experts_bytes + beside) / 0.8) >> 30) + 1) << 30
