"""The host-driven experts' forward: look up, fetch what is missing, compute; in waves when slots are too few.

Registered with transformers under `IMPLEMENTATION`; it replaces the forward of every experts module. Each (token, pick)
pair is computed by itself and summed over the picks at the end, so the result does not depend on the number of slots or
the order of waves. Source: `transformers/integrations/moe.py` (layouts and flags of experts modules).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from expert_store.residency.cache import ExpertCache
from expert_store.residency.slots import SlotPool
from expert_store.rows import decode_rows
from server.model.seam.observation import OutputObserver
from server.model.seam.packed import kernels_for, packed_products
from server.model.seam.row_kernels import Run
from server.model.seam.rows import depends_on_rows, is_decode

IMPLEMENTATION = "deepfew"
LAYER_ATTRIBUTE = "_deepfew_experts"
BATCHED_CPU_BYTES = 1 << 16
"""A decode step may gather the weights of its pairs for two batched products, which takes few launches but copies the
weights. On a CPU this is faster only for experts up to this size, in dtypes whose small products start slowly. All
other steps compute expert by expert, without a copy."""


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward that transformers dispatches to: hidden_states [T, H], index and weights [T, K] → [T, H]."""
    layer: ExpertsLayer = getattr(self, LAYER_ATTRIBUTE)
    if layer.batched is not None:
        return layer.batched(self, hidden_states, top_k_index, top_k_weights)
    if hidden_states.requires_grad or top_k_weights.requires_grad:
        return frozen_experts(layer, self, hidden_states, top_k_index, top_k_weights)
    return layer.forward(self, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


class _FrozenExperts(torch.autograd.Function):
    """The forward of `ExpertsLayer` with gradients of its inputs, but not of the experts' weights.

    Nothing between the inputs and the result is kept: `ExpertsLayer.backward` computes it again, so that the experts
    may have left their slots meanwhile.
    """

    @staticmethod
    def forward(ctx: Any, layer: ExpertsLayer, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        ctx.layer, ctx.module = layer, module
        ctx.save_for_backward(hidden, index, weights)
        return layer.forward(module, hidden, index, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, None, Tensor]:
        hidden, index, weights = ctx.saved_tensors
        of_hidden, of_weights = ctx.layer.backward(ctx.module, hidden, index, weights, grads[0])
        return None, None, of_hidden, None, of_weights


def frozen_experts(layer: ExpertsLayer, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`layer.forward`, which autograd can differentiate by hidden and weights."""
    result: Tensor = _FrozenExperts.apply(layer, module, hidden, index, weights)  # type: ignore[no-untyped-call]
    return result


class ExpertsLayer:
    """One MoE layer's experts, computed from the slots of an `ExpertCache`.

    Args:
        layer: MoE layer.
        cache: its slots hold the weights; each call leases and releases them.
        batch_invariant: in decode steps, compute pair by pair if a product's bits depend on its number of rows.

    Attributes:
        layer: MoE layer.
        observer: records the experts' outputs while it is on.
        batched: computes all experts together instead, while `server.model.seam.batched` says so.
    """

    def __init__(self, layer: int, cache: ExpertCache, batch_invariant: bool = True) -> None:
        self._batch_invariant = batch_invariant
        self.layer = layer
        self._cache = cache
        self.batched: Callable[[Any, Tensor, Tensor, Tensor], Tensor] | None = None
        self.observer: OutputObserver | None = None
        for tensor in cache.pools[layer].spec.tensors:
            if tensor.encoding is not None:
                kernels_for(tensor.encoding, tensor.shape[1], cache.device)  # compiled before the first request

    def forward(self, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            module: the experts module, for its activation and layout flags.
            hidden: [T, H].
            index: [T, K] expert ids; ids ≥ E are picks that do not exist.
            weights: [T, K].

        Returns:
            [T, H] in hidden's dtype.
        """
        num_tokens, num_picks = index.shape
        ids = index.reshape(-1)
        order = torch.argsort(ids, stable=True) if num_tokens > 1 else None
        sorted_ids = ids.tolist() if order is None else ids[order].tolist()
        groups = _groups(sorted_ids, self._cache.num_experts)
        tokens = None if order is None else order.div(num_picks, rounding_mode="floor")
        inputs = hidden.expand(num_picks, -1) if tokens is None else hidden[tokens]  # [T·K, H]
        outputs = hidden.new_empty(inputs.shape) if _covers(groups, len(sorted_ids)) else torch.zeros_like(inputs)
        decodes = is_decode(num_tokens)
        observer = self.observer if self.observer is not None and self.observer.is_on else None
        for wave in _waves(groups, self._cache.num_slots, self._resident):
            self._run_wave(module, inputs, outputs, wave, decodes, observer)
        if order is not None:
            unsorted = torch.empty_like(outputs)
            unsorted[order] = outputs
            outputs = unsorted
        weighted = outputs * weights.reshape(-1, 1)
        result = weighted.view(num_tokens, num_picks, -1).sum(dim=1).to(hidden.dtype)
        if observer is not None:
            observer.note(self.layer, hidden, outputs, result)
        return result

    def backward(
        self, module: Any, hidden: Tensor, index: Tensor, weights: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of `forward` by hidden [T, H] and weights [T, K], from that of its result [T, H].

        The arguments are those of `forward`. Experts are fetched again; nothing is mutated but their slots.
        """
        num_picks = index.shape[1]
        order = torch.argsort(index.reshape(-1), stable=True)
        tokens = order.div(num_picks, rounding_mode="floor")
        inputs, factors, grads = hidden[tokens], weights.reshape(-1, 1)[order], grad[tokens]  # [T·K, ..]
        of_inputs, of_factors = torch.zeros_like(inputs), torch.zeros_like(factors)
        groups = _groups(index.reshape(-1)[order].tolist(), self._cache.num_experts)
        for wave in _waves(groups, self._cache.num_slots, self._resident):
            experts = [expert for expert, _, _ in wave]
            slots = self._cache.acquire(self.layer, experts)
            try:
                for (_, start, end), slot in zip(wave, slots, strict=True):
                    with torch.enable_grad():
                        x = inputs[start:end].detach().requires_grad_()
                        y = _dense(module, self._cache.pools[self.layer], slot, x)
                    of_factors[start:end] = (y.detach() * grads[start:end]).sum(dim=-1, keepdim=True)
                    (of_inputs[start:end],) = torch.autograd.grad(
                        y, x, (grads[start:end] * factors[start:end]).to(y.dtype)
                    )
            finally:
                self._cache.release(self.layer, experts)
        of_hidden = torch.zeros_like(hidden).index_add_(0, tokens, of_inputs)
        of_weights = torch.empty_like(of_factors)
        of_weights[order] = of_factors
        return of_hidden, of_weights.view_as(weights)

    def _resident(self, expert: int) -> bool:
        return bool(self._cache.page_table[self.layer, expert] >= 0)

    def _is_batched(self, inputs: Tensor) -> bool:
        """Choose the method by the kind of step alone, so that results depend neither on waves nor on rows."""
        pool = self._cache.pools[self.layer]
        small = pool.slot_bytes <= BATCHED_CPU_BYTES
        return not pool.encodings and (inputs.is_cuda or (small and inputs.dtype != torch.float32))

    def _run_wave(
        self,
        module: Any,
        inputs: Tensor,
        outputs: Tensor,
        wave: Sequence[_Group],
        decodes: bool,
        observer: OutputObserver | None,
    ) -> None:
        experts = [expert for expert, _, _ in wave]
        slots = self._cache.acquire(self.layer, experts)
        try:
            pool = self._cache.pools[self.layer]
            if decodes and self._is_batched(inputs):
                _run_batched(module, pool, inputs, outputs, wave, slots)
            else:
                apart = decodes and self._batch_invariant
                inner = _run_grouped(module, pool, inputs, outputs, wave, slots, apart)
                if observer is not None:
                    sizes = [end - start for _, start, end in wave]
                    for (expert, _, _), part in zip(wave, torch.split(inner, sizes), strict=True):
                        observer.note_inner(self.layer, expert, part)
        finally:
            self._cache.release(self.layer, experts)


_Group = tuple[int, int, int]
"""(expert, start, end): the sorted pairs [start, end) belong to `expert`."""


def _groups(sorted_ids: list[int], num_experts: int) -> list[_Group]:
    """Runs of equal ids, in order, without sentinel ids. The picks of one token are distinct and need no sorting."""
    groups: list[_Group] = []
    start = 0
    for position in range(1, len(sorted_ids) + 1):
        if position == len(sorted_ids) or sorted_ids[position] != sorted_ids[start]:
            if sorted_ids[start] < num_experts:
                groups.append((sorted_ids[start], start, position))
            start = position
    return groups


def _covers(groups: list[_Group], num_pairs: int) -> bool:
    return sum(end - start for _, start, end in groups) == num_pairs


def _waves(groups: list[_Group], num_slots: int, is_resident: Any) -> list[list[_Group]]:
    """Divide into waves of at most `num_slots` experts, resident ones first, before they can be evicted."""
    if len(groups) <= num_slots:
        return [groups] if groups else []
    ordered = sorted(groups, key=lambda group: not is_resident(group[0]))
    return [ordered[start : start + num_slots] for start in range(0, len(ordered), num_slots)]


def _run_grouped(
    module: Any,
    pool: SlotPool,
    inputs: Tensor,
    outputs: Tensor,
    wave: Sequence[_Group],
    slots: list[int],
    apart: bool,
) -> Tensor:
    """Compute expert by expert without copying weights; writes `outputs` at the wave's pairs.

    Returns the activations between the two products of all pairs of the wave, [pairs, I].
    apart: a pair's bits must not depend on the other pairs.
    """
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    runs, position = [], 0  # from the wave's places among all pairs to places side by side
    for (_, start, end), slot in zip(wave, slots, strict=True):
        runs.append(Run(start, position, end - start, slot))
        position += end - start
    up = _products(
        module, pool, up_name, inputs, runs, inputs.new_empty((position, _width(module, pool, up_name))), apart
    )
    activated: Tensor = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    back = [run._replace(start=run.to, to=run.start) for run in runs]
    _products(module, pool, "down_proj", activated, back, outputs, apart)
    if getattr(module, "has_post_expert_norm", False):
        for _, start, end in wave:
            outputs[start:end] = module.post_expert_norm(outputs[start:end])
    return activated


def _dense(module: Any, pool: SlotPool, slot: int, x: Tensor) -> Tensor:
    """One expert's output for x [N, H], by operations that autograd can differentiate."""
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up = _dense_linear(module, pool, up_name, slot, x)
    activated = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    out = _dense_linear(module, pool, "down_proj", slot, activated)
    return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out


def _dense_linear(module: Any, pool: SlotPool, name: str, slot: int, x: Tensor) -> Tensor:
    weight, encoding = pool.rows[name][slot], pool.encodings.get(name)
    if encoding is not None:
        weight = decode_rows(encoding, x.shape[1], weight).to(x.dtype)
    elif module.is_transposed:
        weight = weight.t()
    return torch.nn.functional.linear(x, weight, pool.rows[name + "_bias"][slot] if module.has_bias else None)


def _width(module: Any, pool: SlotPool, name: str) -> int:
    """Columns of a projection's output."""
    shape = pool.params[name].shape
    return int(shape[2] if module.is_transposed and name not in pool.encodings else shape[1])


def _products(
    module: Any, pool: SlotPool, name: str, x: Tensor, runs: Sequence[Run], out: Tensor, apart: bool
) -> Tensor:
    """out, of whose rows each run's are x's rows times its slot's weight, plus the bias if there is one."""
    rows, encoding = pool.rows[name], pool.encodings.get(name)
    if encoding is not None:
        packed_products(x, rows, encoding, runs, out, apart=apart)
    else:
        weight = rows[0].t() if module.is_transposed else rows[0]
        apart = apart and depends_on_rows(weight)
        for start, to, num_rows, slot in runs:
            size = 1 if apart else num_rows  # else each weight is read once
            for row in range(0, num_rows, size):
                _linear(x, start + row, rows[slot], module.is_transposed, out, to + row, size)
    if module.has_bias:
        for _, to, num_rows, slot in runs:
            out[to : to + num_rows] += pool.rows[name + "_bias"][slot]
    return out


def _linear(x: Tensor, at: int, weight: Tensor, transposed: bool, out: Tensor, to: int, count: int) -> None:
    """`count` rows of out from `to` on = rows of x from `at` on, times one expert's weight; one row takes the faster
    matrix-vector product."""
    if transposed:
        torch.mm(x[at : at + count], weight, out=out[to : to + count])
    elif count == 1:
        torch.mv(weight, x[at], out=out[to])
    else:
        torch.mm(x[at : at + count], weight.t(), out=out[to : to + count])


def _run_batched(
    module: Any,
    pool: SlotPool,
    inputs: Tensor,
    outputs: Tensor,
    wave: Sequence[_Group],
    slots: list[int],
) -> None:
    """Compute all pairs of the wave in two batched products over gathered weights: few launches for small steps."""
    pairs = [pair for _, start, end in wave for pair in range(start, end)]
    pair_slots = [slot for (_, start, end), slot in zip(wave, slots, strict=True) for _ in range(start, end)]
    params = pool.gather(torch.tensor(pair_slots, device=inputs.device))
    everything = pairs == list(range(len(inputs)))
    at = slice(None) if everything else torch.tensor(pairs, device=inputs.device)
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up = _batched_linear(module, params, up_name, inputs[at])
    activated = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    out = _batched_linear(module, params, "down_proj", activated)
    outputs[at] = module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out


def _batched_linear(module: Any, params: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """x [N, in] → [N, out], each row with its own of the gathered weights."""
    weight = params[name]
    product = torch.bmm(weight.transpose(1, 2) if module.is_transposed else weight, x.unsqueeze(-1)).squeeze(-1)
    return product + params[name + "_bias"] if module.has_bias else product
