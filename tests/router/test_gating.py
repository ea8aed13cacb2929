"""Masked routing equals a physically pruned router, for every family that transformers has.

Each family's router is called as its own model calls it; the reference is transformers' forward on a router from which
the other experts were deleted. Grouped choices over unequal groups, which no config can express, are held against a
plain loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from router.errors import UnsupportedGatingError
from router.gating import RULES, Picks, RouterCall, find_gating_rule
from tests.families.checkpoints import FAMILIES, NUM_EXPERTS, is_installed, moe_blocks, random_model
from tests.families.pruning import pruned_router

INSTALLED = [model_type for model_type in FAMILIES if is_installed(model_type)]
# Available experts: symmetric over the two groups of four, then lopsided, fewer than top-k, and one.
PLENTY, LOPSIDED, FEW, ONE = [0, 1, 3, 4, 6, 7], [0, 2, 3, 5, 6], [2, 7], [5]


@dataclass(frozen=True)
class Call:
    """One call of a router by its model: T tokens, the router's output and what led to it."""

    router: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: tuple[Tensor, ...]

    @property
    def picks(self) -> Picks:
        return Picks.of(self.output)

    def masked(self, model_type: str, mask: Tensor, temperature: Tensor | None = None) -> Picks:
        rule = find_gating_rule(model_type, self.router)
        return Picks.of(rule.masked(RouterCall.of(self.router, self.args, self.kwargs, self.output), mask, temperature))

    def pruned(self, keep: Sequence[int]) -> Picks:
        """What transformers' forward gives on the pruned router, with expert ids of the unpruned one."""

        def sliced(value: Any) -> Any:
            return value[list(keep)] if isinstance(value, Tensor) and value.shape == (NUM_EXPERTS,) else value

        kwargs = {name: sliced(value) for name, value in self.kwargs.items()}
        picks = Picks.of(pruned_router(self.router, keep)(*map(sliced, self.args), **kwargs))
        ids = torch.tensor([*keep, NUM_EXPERTS])
        return Picks(picks.logits, picks.weights, ids[picks.index], picks.rest, picks.index_first)


@cache
def calls(model_type: str) -> list[Call]:
    """Every router call of a forward over two sequences of twelve tokens."""
    model = random_model(model_type)
    recorded: list[Call] = []
    for _, router, _ in moe_blocks(model):
        router.register_forward_hook(
            lambda module, args, kwargs, output: recorded.append(Call(module, args, kwargs, output)), with_kwargs=True
        )
    with torch.no_grad():
        model(input_ids=torch.randint(3, 90, (2, 12)))
    if not recorded:
        pytest.skip(f"transformers {transformers.__version__} has the experts of {model_type} outside its registry")
    for call in recorded:
        call.router._forward_hooks.clear()
        if not isinstance(call.output, tuple):
            pytest.skip(f"transformers {transformers.__version__} makes the choice of {model_type} outside its router")
    return recorded


def mask_of(call: Call, keep: Sequence[int]) -> Tensor:
    mask = torch.zeros(call.picks.index.shape[0], NUM_EXPERTS, dtype=torch.bool)
    mask[:, list(keep)] = True
    return mask


def dense(picks: Picks) -> Tensor:
    """Weights [T, E + 1] by expert, the sentinel last."""
    weights = torch.zeros(picks.index.shape[0], NUM_EXPERTS + 1, dtype=torch.float32)
    return weights.scatter_add(1, picks.index.clamp(max=NUM_EXPERTS), picks.weights.float())


def chosen(picks: Picks) -> list[list[int]]:
    return [sorted(set(row) - {NUM_EXPERTS}) for row in picks.index.tolist()]


def num_groups(router: nn.Module) -> int:
    limited = getattr(router, "topk_method", "group_limited_greedy") == "group_limited_greedy"
    return int(getattr(router, "num_group", None) or 1) if limited else 1


def has_reference(call: Call, keep: Sequence[int]) -> bool:
    """Whether the pruned router is one that transformers can run: equal groups, which hold enough experts."""
    groups = num_groups(call.router)
    if hasattr(call.router, "router_jitter_noise") and len(keep) < 2:  # SparseMixer always makes two picks
        return False
    if not hasattr(call.router, "num_group"):
        return True
    sizes = {sum(expert // (NUM_EXPERTS // groups) == group for expert in keep) for group in range(groups)}
    wanted = min(call.picks.index.shape[1], len(keep))
    return len(sizes) == 1 and min(sizes) >= 2 and min(sizes) * int(call.router.topk_group) >= wanted


def grouped_by_loop(call: Call, keep: Sequence[int]) -> list[dict[int, float]]:
    """Grouped choice over the experts `keep`, token by token: {expert: weight}."""
    router: Any = call.router
    groups, k = num_groups(router), min(call.picks.index.shape[1], len(keep))
    bias = getattr(router, "e_score_correction_bias", None)
    outside = 0.0 if type(router).__name__ == "AXK2TopkRouter" else float("-inf")
    result = []
    for logits in call.picks.logits.double():
        kept = logits[list(keep)]
        values = torch.sigmoid(kept) if bias is not None else torch.softmax(kept, dim=0)
        score = dict(zip(keep, values.tolist(), strict=True))
        choice = {expert: score[expert] + (float(bias[expert]) if bias is not None else 0.0) for expert in keep}
        members: dict[int, list[int]] = {}
        for expert in keep:
            members.setdefault(expert // (NUM_EXPERTS // groups), []).append(expert)
        best = 1 if type(router).__name__ == "DeepseekV2TopkRouter" else 2
        ranked = sorted(members, key=lambda g: -sum(sorted((choice[e] for e in members[g]), reverse=True)[:best]))
        allowed: list[int] = []
        for rank, group in enumerate(ranked):
            if rank < router.topk_group or len(allowed) < k:
                allowed += members[group]
        limited = {expert: choice[expert] if expert in allowed else outside for expert in keep}
        picks = sorted(keep, key=lambda expert: -limited[expert])[:k]
        weights = {expert: score[expert] for expert in picks}
        if getattr(router, "norm_topk_prob", best == 2):
            total = sum(weights.values()) + 1e-20
            weights = {expert: weight / total for expert, weight in weights.items()}
        result.append({e: weight * getattr(router, "routed_scaling_factor", 1.0) for e, weight in weights.items()})
    return result


def assert_equals_pruned(model_type: str, call: Call, keep: Sequence[int]) -> None:
    masked = call.masked(model_type, mask_of(call, keep))
    assert masked.index.dtype == call.picks.index.dtype
    assert masked.weights.dtype == call.picks.weights.dtype
    assert masked.index.shape == masked.weights.shape == call.picks.index.shape
    if has_reference(call, keep):
        reference = call.pruned(keep)
        torch.testing.assert_close(dense(masked), dense(reference), atol=2e-6, rtol=2e-5)
        if model_type != "zaya":  # stock zaya reports a skipped expert as expert 0 of weight 0
            assert chosen(masked) == chosen(reference)
        for ours, theirs in zip(masked.rest, reference.rest, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)
    elif hasattr(call.router, "num_group"):
        rows = grouped_by_loop(call, keep)
        assert chosen(masked) == [sorted(row) for row in rows]
        expected = torch.tensor([[row.get(expert, 0.0) for expert in range(NUM_EXPERTS + 1)] for row in rows])
        torch.testing.assert_close(dense(masked), expected, atol=2e-6, rtol=2e-5)
    else:
        assert len(keep) == 1, "SparseMixer over one expert: it is picked, with weight 1"
        assert chosen(masked) == [list(keep)] * len(masked.index)
        torch.testing.assert_close(dense(masked)[:, keep[0]], torch.ones(len(masked.index)))


@pytest.mark.parametrize("keep", [PLENTY, LOPSIDED, FEW, ONE], ids=["plenty", "lopsided", "few", "one"])
@pytest.mark.parametrize("model_type", INSTALLED)
def test_masked_router_equals_a_physically_pruned_one(model_type: str, keep: list[int]) -> None:
    for call in calls(model_type):
        assert_equals_pruned(model_type, call, keep)


@pytest.mark.parametrize("model_type", INSTALLED)
def test_each_token_is_routed_by_its_own_mask(model_type: str) -> None:
    sets = [PLENTY, FEW, list(range(NUM_EXPERTS)), ONE, LOPSIDED]
    for call in calls(model_type):
        alone = [call.masked(model_type, mask_of(call, keep)) for keep in sets]
        mask = torch.cat([mask_of(call, sets[token % len(sets)])[:1] for token in range(len(call.picks.index))])
        together = call.masked(model_type, mask)
        for token in range(len(mask)):
            assert torch.equal(together.index[token], alone[token % len(sets)].index[token])
            assert torch.equal(together.weights[token], alone[token % len(sets)].weights[token])
        stock = mask.all(dim=1)
        assert torch.equal(together.index[stock], call.picks.index[stock])
        assert torch.equal(together.weights[stock], call.picks.weights[stock])


@pytest.mark.parametrize("model_type", INSTALLED)
def test_no_unavailable_expert_is_picked_and_absent_picks_are_sentinels(model_type: str) -> None:
    for call in calls(model_type):
        for keep in (LOPSIDED, FEW, ONE, []):
            mask = mask_of(call, keep)
            picks = call.masked(model_type, mask)
            real = picks.index < NUM_EXPERTS
            assert set(picks.index[real].tolist()) <= set(keep)
            assert bool(torch.isfinite(picks.weights).all())
            assert bool((picks.weights[~real] == 0).all())
            assert bool((picks.index[~real] == NUM_EXPERTS).all())
            wanted = min(picks.index.shape[1], len(keep))
            if model_type != "zaya":  # zaya may skip
                assert bool((real.sum(dim=1) == wanted).all())
                assert all(len(row) == wanted for row in chosen(picks)), "an expert was picked twice"


@pytest.mark.parametrize("model_type", INSTALLED)
def test_rule_agrees_with_the_stock_router_when_the_masked_expert_is_never_wanted(model_type: str) -> None:
    """A choice that the mask does not touch keeps the stock picks: the rule is the router's own, not one like it."""
    for call in calls(model_type):
        for expert in range(NUM_EXPERTS):
            mask = mask_of(call, [other for other in range(NUM_EXPERTS) if other != expert])
            untouched = (call.picks.index != expert).all(dim=1)
            if num_groups(call.router) > 1 or hasattr(call.router, "moe_statics"):
                continue  # a group's score, or a probability against its bias, may still change
            picks = call.masked(model_type, mask)
            stock = [row for row, same in zip(chosen(call.picks), untouched.tolist(), strict=True) if same]
            ours = [row for row, same in zip(chosen(picks), untouched.tolist(), strict=True) if same]
            if model_type != "zaya":
                assert ours == stock


@pytest.mark.parametrize("model_type", INSTALLED)
def test_masking_never_waits_for_the_device(model_type: str) -> None:
    """On the meta device nothing has a value, so a rule that reads one fails."""
    for call in calls(model_type)[:1]:
        values = [*call.router.parameters(), *call.router.buffers()]
        assert values
        to_meta = lambda value: value.to("meta") if isinstance(value, Tensor) else value  # noqa: E731
        router = pruned_router(call.router, range(NUM_EXPERTS)).to("meta")
        output = tuple(map(to_meta, call.output))
        kwargs = {name: to_meta(value) for name, value in call.kwargs.items()}
        mask = mask_of(call, LOPSIDED).to("meta")
        on_meta = RouterCall.of(router, tuple(map(to_meta, call.args)), kwargs, output)
        masked = find_gating_rule(model_type, router).masked(on_meta, mask)
        assert all(tensor.device.type == "meta" for tensor in masked)


@pytest.mark.parametrize("model_type", INSTALLED)
def test_half_precision_router_keeps_dtypes_and_available_experts(model_type: str) -> None:
    for call in calls(model_type)[:1]:
        to_half = lambda value: (  # noqa: E731
            value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
        )
        router = pruned_router(call.router, range(NUM_EXPERTS)).to(torch.bfloat16)
        args, kwargs = tuple(map(to_half, call.args)), {name: to_half(value) for name, value in call.kwargs.items()}
        if type(router).__name__ == "Inkling2TopKRouter":
            router = router.float()  # its forward asks for float32 weights
        output = router(*args, **kwargs)
        stock = Picks.of(output)
        halved = RouterCall.of(router, args, kwargs, output)
        picks = Picks.of(find_gating_rule(model_type, router).masked(halved, mask_of(call, FEW)))
        assert (picks.weights.dtype, picks.index.dtype) == (stock.weights.dtype, stock.index.dtype)
        assert set(picks.index.flatten().tolist()) <= {*FEW, NUM_EXPERTS}
        assert bool(torch.isfinite(picks.weights).all())


def cooled(router: nn.Module, temperature: float) -> nn.Module:
    """A copy of a router whose logits are divided by a power of two, exactly: its gate's weights and bias are."""
    copy = pruned_router(router, range(NUM_EXPERTS))
    gates = [name for name, value in copy.named_parameters() if value.ndim == 2 and value.shape[0] == NUM_EXPERTS]
    assert gates, f"{type(router).__name__} has no gate: {[name for name, _ in copy.named_parameters()]}"
    for gate in gates:
        for name, value in copy.named_parameters():
            if name in (gate, gate.replace("weight", "bias")):
                value.data /= temperature
    return copy


@pytest.mark.parametrize("temperature", [2.0, 0.25])
@pytest.mark.parametrize("model_type", INSTALLED)
def test_temperature_equals_a_router_whose_gate_is_divided(model_type: str, temperature: float) -> None:
    for call in calls(model_type):
        if not find_gating_rule(model_type, call.router).takes_temperature:
            pytest.skip("refused by name")
        num_tokens = len(call.picks.index)
        tempered = call.masked(model_type, mask_of(call, range(NUM_EXPERTS)), torch.full((num_tokens,), temperature))
        reference = Picks.of(cooled(call.router, temperature)(*call.args, **call.kwargs))
        torch.testing.assert_close(dense(tempered), dense(reference), atol=2e-6, rtol=2e-5)
        assert chosen(tempered) == chosen(reference)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "olmoe", "minimax_m2", "laguna", "flint"])
def test_temperature_agrees_with_float64(model_type: str) -> None:
    """Softmax and sigmoid families without groups, masked as well, at a temperature that rounds."""
    temperature = 1.7
    for call in calls(model_type):
        router: Any = call.router
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is None and len(call.args) + len(call.kwargs) > 1:
            bias = next(v for v in (*call.args, *call.kwargs.values()) if v.shape == (NUM_EXPERTS,))
        sigmoid = model_type in ("minimax_m2", "laguna", "flint")
        renormalised = getattr(router, "norm_topk_prob", True)
        for keep in (list(range(NUM_EXPERTS)), PLENTY):
            picks = call.masked(model_type, mask_of(call, keep), torch.full((len(call.picks.index),), temperature))
            expected = torch.zeros(len(picks.index), NUM_EXPERTS + 1, dtype=torch.float64)
            for row, logits in zip(expected, call.picks.logits.double(), strict=True):
                kept = logits[keep] / temperature
                scores = torch.sigmoid(kept) if sigmoid else torch.softmax(kept, dim=0)
                choice = scores if bias is None else scores + bias.double()[keep]
                best = choice.topk(picks.index.shape[1]).indices
                weights = scores[best] / scores[best].sum() if renormalised else scores[best]
                row[torch.tensor(keep)[best]] = weights
            torch.testing.assert_close(dense(picks).double(), expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("model_type", INSTALLED)
def test_each_token_has_its_own_temperature_and_1_changes_nothing(model_type: str) -> None:
    for call in calls(model_type):
        if not find_gating_rule(model_type, call.router).takes_temperature:
            continue
        everything = mask_of(call, range(NUM_EXPERTS))
        values = torch.tensor([1.0, 3.0, 0.6]).repeat(len(everything))[: len(everything)]
        together = call.masked(model_type, everything, values)
        for value in (1.0, 3.0, 0.6):
            at = values == value
            alone = call.masked(model_type, everything, torch.full((len(everything),), value))
            assert torch.equal(together.index[at], alone.index[at])
            assert torch.equal(together.weights[at], alone.weights[at])
        stock = values == 1.0
        assert torch.equal(together.index[stock], call.picks.index[stock])
        assert torch.equal(together.weights[stock], call.picks.weights[stock])
        masked, plain = (
            call.masked(model_type, mask_of(call, FEW), torch.ones(len(everything))),
            call.masked(model_type, mask_of(call, FEW)),
        )
        assert torch.equal(masked.index, plain.index)
        assert torch.equal(masked.weights, plain.weights)


def test_routers_that_are_no_plain_scored_top_k_take_no_temperature() -> None:
    refused = [name for name, rule in RULES.items() if not rule.takes_temperature]
    assert sorted(refused) == ["inkling", "phimoe", "zaya"]


class NextMonthsRouter(Qwen3MoeTopKRouter):
    """A family that transformers does not have yet, whose router is Qwen3's."""


NextMonthsRouter.__module__ = "transformers.models.next_month.modeling_next_month"


class UnseenRouter(nn.Module):
    """A router like no other."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden_states @ hidden_states.T
        return logits, logits.cos(), logits.argsort()


def test_new_family_with_a_known_routers_code_needs_no_record() -> None:
    known = find_gating_rule("qwen3_moe", calls("qwen3_moe")[0].router)
    router = NextMonthsRouter.__new__(NextMonthsRouter)
    assert find_gating_rule("next_month", router) == known


def test_unknown_router_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedGatingError, match=r"UnseenRouter.*'unseen'.*qwen3_moe"):
        find_gating_rule("unseen", UnseenRouter())


def test_router_by_token_id_takes_no_mask() -> None:
    hash_router = type("DeepseekV4HashRouter", (nn.Module,), {})()
    assert not find_gating_rule("deepseek_v4", hash_router).takes_mask
    assert all(rule.takes_mask for rule in RULES.values())
