"""The choice of deep experts to extract from a checkpoint, best first.

Invariant of a `Selection`: every deep expert has one expert of every MoE layer, never of some layers only, and no
(layer, expert) is in it twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from expert_store.manifest import Alignment, LayerSpec, ModelSpec
from expert_store.shard import ShardLayout
from extractor.errors import SelectionError
from extractor.planning.plan import Plan
from router.errors import MaskError
from router.mask import parse_experts


@dataclass(frozen=True)
class SelectionRequest:
    """The user's choice; at most one of the first four is set. `experts` is text as "0-7,12", `keep` a share of 1."""

    experts: str | None = None
    count: int | None = None
    keep: float | None = None
    budget_bytes: int | None = None
    plan: Plan | None = None


@dataclass(frozen=True)
class Selection:
    """`deep_experts[i][layer]` is the expert that deep expert i has in that MoE layer."""

    deep_experts: tuple[tuple[int, ...], ...]
    alignment: Alignment


def select(
    request: SelectionRequest,
    model: ModelSpec,
    layers: Sequence[LayerSpec],
    trunk_bytes: int,
    fingerprint: str | None = None,
) -> Selection:
    """Turn a request into deep experts of `model`.

    Without a plan, deep expert i is expert i of every layer; with a plan, its first (best) deep experts are taken.
    `fingerprint` must equal the plan's, if it has one. Raises SelectionError.
    """
    for option, value in (("--count", request.count), ("--keep", request.keep), ("--budget", request.budget_bytes)):
        if request.experts is not None and value is not None:
            raise SelectionError(f"--experts and {option} contradict each other; give one of them")
    if request.plan is not None and request.experts is not None:
        raise SelectionError("--plan and --experts contradict each other; give one of them")
    deep_experts, alignment = _candidates(request, model, fingerprint)
    shards = (ShardLayout(tuple(layers), index, experts).file_bytes for index, experts in enumerate(deep_experts))
    sizes = list(accumulate(shards, initial=trunk_bytes)) if request.budget_bytes is not None else []
    count = count_within(
        request.count,
        request.keep,
        request.budget_bytes,
        num_experts=model.num_experts,
        most=len(deep_experts),
        store_bytes=sizes.__getitem__,
    )
    return Selection(deep_experts[:count], alignment)


def _candidates(
    request: SelectionRequest, model: ModelSpec, fingerprint: str | None
) -> tuple[tuple[tuple[int, ...], ...], Alignment]:
    if request.plan is None:
        ids: Sequence[int] = range(model.num_experts)
        if request.experts is not None:
            ids = _ids(request.experts, model)
        return tuple((expert,) * model.num_layers for expert in ids), Alignment("index", {})
    plan = request.plan
    if (plan.num_layers, plan.num_experts) != (model.num_layers, model.num_experts):
        raise SelectionError(
            f"the plan is for {plan.num_layers} layers of {plan.num_experts} experts, the checkpoint has "
            f"{model.num_layers} of {model.num_experts}; make a plan for this checkpoint"
        )
    if None not in (fingerprint, plan.extra.get("fingerprint")) and plan.extra["fingerprint"] != fingerprint:
        raise SelectionError(
            f"the plan was made for the checkpoint {plan.extra['fingerprint']}, this one is {fingerprint}; "
            "make a plan for this checkpoint"
        )
    statistics = {key: value for key, value in plan.alignment.items() if key != "kind"}
    return tuple(deep.experts for deep in plan.deep_experts), Alignment(plan.alignment["kind"], statistics)


def _ids(text: str, model: ModelSpec) -> tuple[int, ...]:
    try:
        ids = parse_experts(text)
    except MaskError as error:
        raise SelectionError(f"--{error}") from None
    if ids[-1] >= model.num_experts:
        raise SelectionError(
            f"--experts {text}: expert {ids[-1]} does not exist; this model has experts 0 to {model.num_experts - 1}"
        )
    return ids


def count_within(
    count: int | None,
    keep: float | None,
    budget_bytes: int | None,
    *,
    num_experts: int,
    most: int,
    store_bytes: Callable[[int], int],
) -> int:
    """The number of deep experts within the given limit; `most` without a limit.

    Args:
        count, keep, budget_bytes: a number, a share of the experts from 0 to 1, bytes of the whole store.
        num_experts: E, of which `keep` is a share.
        most: number of deep experts to choose from.
        store_bytes: returns the size of a store with a given number of deep experts.

    Raises:
        SelectionError: several limits are given, or the number is less than 1 or more than `most`.
    """
    limits = {"--count": count, "--keep": keep, "--budget": budget_bytes}
    given = [option for option, value in limits.items() if value is not None]
    if len(given) > 1:
        raise SelectionError(f"{' and '.join(given)} contradict each other; give one of them")
    if count is not None:
        if not 1 <= count <= most:
            raise SelectionError(f"--count is {count}, wanted 1 to {most}")
        return count
    if keep is not None:
        if not 0 < keep <= 1:
            raise SelectionError(f"--keep is {keep}, wanted a share of the experts such as 25% or 0.25")
        count = int(keep * num_experts + 1e-9)
        if not 1 <= count <= most:
            raise SelectionError(
                f"--keep {keep:.4g} of {num_experts} experts is {count} deep experts, wanted 1 to {most}; keep at "
                f"least {100 / num_experts:.3g}%"
            )
        return count
    if budget_bytes is not None:
        count = bisect_right(range(most + 1), budget_bytes, key=store_bytes) - 1
        if count < 1:
            raise SelectionError(
                f"--budget of {budget_bytes} bytes does not hold the trunk and one deep expert, which take "
                f"{store_bytes(1)} bytes; give at least that, or make experts smaller (extract --experts-dtype int4)"
            )
        return count
    return most
