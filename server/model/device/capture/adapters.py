"""Packs a store's adapters for the captured step: each module that they change gets its part among the packed tensors.

Products that the step computes as one (q, k and v; gate and up) get one change, whose rank is the sum of theirs.
Invariant: every change of an adapter is carried, or `check_adapters` refuses the model. `expert_store.adapter` has the
parts of an adapter and their meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expert_store.adapter import Adapter, Changes
from server.model.device.capture import need
from server.model.device.capture.modules import Attention, DeltaNet, Layer, layers_of, text_body
from server.model.device.capture.pack import gate_last
from server.model.device.capture.parts import packed_norm
from server.model.device.step.parts import AttentionKind
from server.model.device.step.router_kind import router_product
from server.model.device.step.tuning import pow2
from server.model.device.step.weights import (
    AdaptedTrunk,
    DecodeShape,
    LayerChanges,
    LayerKind,
    LayerWeights,
    LowRank,
    MlpWeights,
    TrunkWeights,
)

LEAST_RANK, MOST_RANK, MOST_WIDTH = 16, 256, 1024
"""Of a change of a product, and of the expert that an adapter adds to a layer."""
_EXPERT = ("gate", "up", "down")
REMEDY = "the host-driven path carries it, or --no-adapters serves without"


def check_adapters(model: Any, adapters: Mapping[str, Adapter]) -> None:
    """Check that the step carries every change of the adapters of a model that `decode_shape` accepted.

    Raises NotCapturableError, which names adapter and module.
    """
    if not adapters:
        return
    names = {module: name for name, module in model.named_modules()}
    layers = layers_of(model)
    has_deltas = any(isinstance(layer.attention, DeltaNet) for layer in layers)
    need(not has_deltas, f"the captured step carries no adapters beside delta nets: {REMEDY}")
    norm = text_body(model).norm
    need(
        packed_norm(norm, "the model").ndim == 1,
        f"adapters change {type(norm).__name__}, and the captured step carries those of RMS norms only: {REMEDY}",
    )
    norms = {names[norm] for layer in layers for norm in _norms(layer)} | {names[norm]}
    routers = {names[layer.router] for layer in layers if layer.router is not None}
    joined = [[names[module] for module in modules] for layer in layers for modules in _products(layer)]
    switches = {names[layer.mlp.switch] for layer in layers if layer.mlp is not None and layer.mlp.switch is not None}
    experts = {names[layer.experts] for layer in layers if layer.experts is not None}
    carried = {"scale": norms, "gain": routers, "delta": routers | switches, **dict.fromkeys(_EXPERT, experts)}
    linear = {name for modules in joined for name in modules}
    for adapter, one in adapters.items():
        for module, parts in one.changes.items():
            unknown = [part for part in parts if module not in linear | carried.get(part, set())]
            what = f"adapter {adapter} changes {module} ({', '.join(unknown)})"
            need(not unknown, f"{what}, which the captured step does not carry: {REMEDY}")
            width = len(parts["gate"]) if "gate" in parts else 0
            need(
                width <= MOST_WIDTH,
                f"adapter {adapter} adds {width} columns to {module}, and the captured step "
                f"carries {MOST_WIDTH}: train one of fewer; {REMEDY}",
            )
        for modules in joined:
            rank = sum(_rank(one.changes[name]) for name in modules if name in one.changes)
            need(
                rank <= MOST_RANK,
                f"adapter {adapter} changes {' and '.join(modules)} by rank {rank}, and the captured step carries "
                f"{MOST_RANK}: train one of a lower --rank; {REMEDY}",
            )


@torch.no_grad()
def adapted_trunk(
    model: Any, shape: DecodeShape, weights: TrunkWeights, adapters: Mapping[str, Adapter]
) -> AdaptedTrunk:
    """The trunk `weights` of a model with adapters that `check_adapters` accepted. New memory: the changes, in the
    model's dtype, and the norms."""
    names = {module: name for name, module in model.named_modules()}
    packer = _Packer(names, [one.changes for one in adapters.values()], weights.embedding)
    layers = tuple(
        packer.layer(layer, shape.attention(at), weights.layers[at]) for at, layer in enumerate(layers_of(model))
    )
    norm = packer.scaled(weights.norm, text_body(model).norm)
    return AdaptedTrunk(tuple(adapters), replace(weights, layers=layers, norm=norm))


class _Packer:
    """Packs the changes of some adapters, in their order.

    Args:
        names: of the model's modules.
        like: [.., H], a tensor of the model's dtype and device.
    """

    def __init__(self, names: Mapping[nn.Module, str], changes: Sequence[Changes], like: Tensor) -> None:
        self._names, self._changes, self._like = names, changes, like

    def layer(self, layer: Layer, attention: LayerKind, weights: LayerWeights) -> LayerWeights:
        """The weights of a layer with its changes."""
        assert isinstance(layer.attention, Attention), "check_adapters refuses changes of latent attention"
        assert isinstance(attention, AttentionKind)
        query, key = layer.attention.norms or (None, None)
        projections, *others = _products(layer)
        is_apart = layer.attention.gate is not None
        qkv = self._low_rank(projections, lambda parts: gate_last(parts, attention, is_apart))
        output, *mlp = (self._low_rank(modules) for modules in others)
        up, down = mlp or (None, None)
        delta, gains = (None, None) if layer.router is None else self._router(layer.router)
        return replace(
            weights,
            input_norm=self._norm(weights.input_norm, layer.input_norm),
            q_norm=self.scaled(weights.q_norm, query),
            k_norm=self.scaled(weights.k_norm, key),
            post_norm=self._norm(weights.post_norm, layer.post_norm),
            attention_norm=self._norm(weights.attention_norm, layer.attention_norm),
            branch_norm=self._norm(weights.branch_norm, layer.branch_norm),
            routed_norm=self._norm(weights.routed_norm, layer.routed_norm),
            mlp=None if weights.mlp is None else self._mlp(layer, weights.mlp),
            changes=LayerChanges(qkv, output, up, down, self._expert(layer.experts), delta, gains),
        )

    def _norm(self, weight: Tensor | None, norm: nn.Module | None) -> Tensor | None:
        return None if weight is None else self.scaled(weight, norm)

    def scaled(self, weight: Tensor, norm: nn.Module | None) -> Tensor:
        """[1 + adapters, N]: a norm's packed weight, and the same for each adapter; `norm` is None if that has no
        module, or none that an adapter changes."""
        rows = [weight]
        for parts in self._parts(norm):
            scale = parts.get("scale")
            rows.append(weight if scale is None else (weight.float() * (1 + scale.to(weight.device))).to(weight.dtype))
        return torch.stack(rows)

    def _mlp(self, layer: Layer, weights: MlpWeights) -> MlpWeights:
        assert layer.mlp is not None
        norm, after = self._norm(weights.norm, layer.mlp.norm), self._norm(weights.after, layer.mlp.after)
        weights = replace(weights, norm=norm, after=after)
        if layer.mlp.switch is None or weights.switch is None:
            return weights
        rows = [weights.switch.float()]
        for parts in self._parts(layer.mlp.switch):
            rows.append(rows[0] + parts["delta"].view(-1).to(rows[0].device) if parts else rows[0])
        return replace(weights, switch=torch.stack(rows).to(weights.switch.dtype))

    def _router(self, router: Any) -> tuple[Tensor, Tensor]:
        weight, _ = router_product(router)
        deltas, gains = [], [torch.ones(len(weight))]
        for parts in self._parts(router):
            deltas.append(parts.get("delta", torch.zeros(tuple(weight.shape))))
            gains.append(1 + parts.get("gain", torch.zeros(len(weight))))
        return self._placed(torch.stack(deltas)), torch.stack(gains).to(self._like.device)

    def _low_rank(
        self, modules: Sequence[nn.Linear], joined: Callable[[list[Tensor]], Tensor] = torch.cat
    ) -> LowRank | None:
        """The change of products that are one; None if no adapter changes them.

        Args:
            joined: makes the rows of the one product of those of each.
        """
        factors = [[_factors(parts, module) for parts in self._parts(module)] for module in modules]
        own = list(zip(*factors, strict=True))  # of each adapter, those of each product
        ranks = [sum(len(a) for a, _ in pairs) for pairs in own]
        if not any(ranks):
            return None
        rank = pow2(max(LEAST_RANK, *ranks))
        firsts = [
            functional.pad(torch.cat([a for a, _ in pairs]), (0, 0, 0, rank - num))
            for pairs, num in zip(own, ranks, strict=True)
        ]
        seconds = [
            functional.pad(joined(_beside_zeros([b for _, b in pairs])), (0, rank - num))
            for pairs, num in zip(own, ranks, strict=True)
        ]
        return LowRank(self._placed(torch.stack(firsts)), self._placed(torch.stack(seconds)))

    def _expert(self, experts: Any) -> LowRank | None:
        """The expert that adapters add to a layer; None if none does."""
        found = [] if experts is None else list(self._parts(experts))
        width = pow2(max(LEAST_RANK, *(len(parts["gate"]) for parts in found if parts))) if any(found) else 0
        if not width:
            return None
        nothing = torch.zeros(0, self._like.shape[1])
        wide = [{part: parts.get(part, nothing) for part in ("gate", "up")} for parts in found]
        rows = [
            torch.cat([functional.pad(one, (0, 0, 0, width - len(one))) for one in parts.values()]) for parts in wide
        ]
        downs = [parts.get("down", nothing.t()) for parts in found]
        columns = [functional.pad(one, (0, width - one.shape[1])) for one in downs]
        return LowRank(self._placed(torch.stack(rows)), self._placed(torch.stack(columns)))

    def _parts(self, module: nn.Module | None) -> Iterator[Mapping[str, Tensor]]:
        """Of each adapter its parts for a module."""
        name = "" if module is None else self._names[module]
        return (changes.get(name, {}) for changes in self._changes)

    def _placed(self, changes: Tensor) -> Tensor:
        return changes.to(self._like.device, self._like.dtype).contiguous()


def _norms(layer: Layer) -> list[nn.Module]:
    own = layer.attention.norms if isinstance(layer.attention, Attention) else None
    of_mlp = () if layer.mlp is None else (layer.mlp.norm, layer.mlp.after)
    others = (layer.input_norm, layer.post_norm, layer.attention_norm, layer.branch_norm, layer.routed_norm)
    return [norm for norm in (*others, *of_mlp, *(own or ())) if norm is not None]


def _products(layer: Layer) -> list[tuple[nn.Linear, ...]]:
    """The products of a layer that the step computes as one each: q, k, v and output gate; output; gate and up; down.
    Those of latent attention are none, since their changes are not carried."""
    mlp = [] if layer.mlp is None else [layer.mlp.ups, (layer.mlp.down,)]
    if not isinstance(layer.attention, Attention):
        return mlp
    *qkv, output = layer.attention.projections
    return [tuple(one for one in (*qkv, layer.attention.gate) if one is not None), (output,), *mlp]


def _rank(parts: Mapping[str, Tensor]) -> int:
    delta = parts.get("delta")
    return len(parts["lora_A"]) if delta is None else min(delta.shape)


def _factors(parts: Mapping[str, Tensor], module: nn.Linear) -> tuple[Tensor, Tensor]:
    """lora_A [R, in] and lora_B [out, R] of a change; one of them is the identity if it is a whole matrix."""
    outputs, inputs = module.out_features, module.in_features
    if not parts:
        return torch.zeros(0, inputs), torch.zeros(outputs, 0)
    if "delta" not in parts:
        return parts["lora_A"], parts["lora_B"]
    delta = parts["delta"]
    return (delta, torch.eye(outputs)) if outputs <= inputs else (torch.eye(inputs), delta)


def _beside_zeros(parts: Sequence[Tensor]) -> list[Tensor]:
    """The matrices [N, R], each widened to [N, ΣR] by zeros in the columns of the others."""
    widths = [part.shape[1] for part in parts]
    return [functional.pad(part, (sum(widths[:at]), sum(widths[at + 1 :]))) for at, part in enumerate(parts)]
