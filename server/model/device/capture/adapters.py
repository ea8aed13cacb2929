"""Packs a store's adapters for the captured step: each module that they change gets its part among the packed tensors.

Products that the step computes as one (q, k and v; gate and up; those of a delta net's input) get one change, whose
rank is the sum of theirs. The product that expands latents (MLA) has none: it reads cached tokens, which may have had
another adapter, so `deepfew adapt` does not train it. Invariants: every change of an adapter is carried, or
`check_adapters` refuses the model; matrices lie in memory once, and prompts read views of them. `expert_store.adapter`
has the parts of an adapter and their meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expert_store.adapter import Adapter, Changes
from server.model.device.capture import need
from server.model.device.capture.delta import delta_rows
from server.model.device.capture.modules import (
    DeltaNet,
    LatentAttention,
    Layer,
    Mamba,
    ShortConvolution,
    StateNet,
    last_norm,
    layers_of,
)
from server.model.device.capture.pack import gate_last
from server.model.device.capture.parts import packed_norm
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
_STATES: dict[type, str] = {Mamba: "Mamba-2", ShortConvolution: "convolutions"}
REMEDY = "the host-driven path carries it, or --no-adapters serves without"


def check_adapters(model: Any, adapters: Mapping[str, Adapter]) -> None:
    """Check that the step carries every change of the adapters of a model that `decode_shape` accepted.

    Raises NotCapturableError, which names adapter and module.
    """
    if not adapters:
        return
    names = {module: name for name, module in model.named_modules()}
    layers = layers_of(model)
    beside = sorted({_STATES[type(layer.attention)] for layer in layers if type(layer.attention) in _STATES})
    need(not beside, f"the captured step carries no adapters beside {', '.join(beside)}: {REMEDY}")
    last = last_norm(model)
    need(
        packed_norm(last, "the model").ndim == 1,
        f"adapters change {type(last).__name__}, and the captured step carries those of RMS norms only: {REMEDY}",
    )
    norms = {names[norm] for layer in layers for norm in _norms(layer)} | {names[last]}
    routers = {names[layer.router] for layer in layers if layer.router is not None}
    within = {names[product] for layer in layers if (product := _router_linear(layer.router)) is not None}
    joined = [[names[module] for module in modules] for layer in layers for modules in _products(layer).values()]
    switches = {names[layer.mlp.switch] for layer in layers if layer.mlp is not None and layer.mlp.switch is not None}
    experts = {names[layer.experts] for layer in layers if layer.experts is not None}
    carried = {"scale": norms, "gain": routers, "delta": routers | switches, **dict.fromkeys(_EXPERT, experts)}
    linear = {name for modules in joined for name in modules} | within
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
    norm = packer.scaled(weights.norm, last_norm(model))
    return AdaptedTrunk(tuple(adapters), replace(weights, layers=layers, norm=norm), tuple(packer.by_module))


class _Packer:
    """Packs the changes of some adapters, in their order.

    Args:
        names: of the model's modules.
        like: [.., H], a tensor of the model's dtype and device.

    Attributes:
        by_module: see `AdaptedTrunk`.
    """

    def __init__(self, names: Mapping[nn.Module, str], changes: Sequence[Changes], like: Tensor) -> None:
        self._names, self._changes, self._like = names, changes, like
        self.by_module = [dict(one) for one in changes]

    def layer(self, layer: Layer, attention: LayerKind, weights: LayerWeights) -> LayerWeights:
        """The weights of a layer with its changes."""
        query, key = _norms_of_attention(layer) or (None, None)
        products = _products(layer)
        if isinstance(layer.attention, DeltaNet):
            changes = self._delta_net(layer.attention, products)
        else:
            assert not isinstance(layer.attention, StateNet), "refused by `check_adapters`"
            joined = partial(gate_last, kind=attention, is_apart=layer.attention.gate is not None)
            changes = {"qkv": self._low_rank(products.pop("qkv"), joined)}
        changes |= {name: self._low_rank(modules) for name, modules in products.items()}
        delta, gains = (None, None) if layer.router is None else self._router(layer.router)
        return replace(
            weights,
            input_norm=self._norm(weights.input_norm, layer.input_norm),
            q_norm=weights.q_norm if query is None else self.scaled(weights.q_norm, query),
            k_norm=weights.k_norm if key is None else self.scaled(weights.k_norm, key),
            post_norm=self._norm(weights.post_norm, layer.post_norm),
            attention_norm=self._norm(weights.attention_norm, layer.attention_norm),
            branch_norm=self._norm(weights.branch_norm, layer.branch_norm),
            routed_norm=self._norm(weights.routed_norm, layer.routed_norm),
            mlp=None if weights.mlp is None else self._mlp(layer, weights.mlp),
            changes=LayerChanges(**changes, expert=self._expert(layer.experts), delta=delta, gains=gains),
        )

    def _norm(self, weight: Tensor | None, norm: nn.Module | None) -> Tensor | None:
        return None if weight is None or norm is None else self.scaled(weight, norm)

    def scaled(self, weight: Tensor, norm: nn.Module) -> Tensor:
        """[1 + adapters, N]: a norm's packed weight, and the same for each adapter."""
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
        owner = _router_linear(router) or router
        deltas, gains = [], [torch.ones(len(weight))]
        for parts, changed in zip(self._parts(router), self._parts(owner), strict=True):
            low = changed["lora_B"] @ changed["lora_A"] if "lora_A" in changed else torch.zeros(tuple(weight.shape))
            deltas.append(changed.get("delta", low))
            gains.append(1 + parts.get("gain", torch.zeros(len(weight))))
        delta = self._placed(torch.stack(deltas))
        for changes, own in zip(self.by_module, delta, strict=True):
            given = changes.get(self._names[owner], {})
            if "delta" in given or "lora_A" in given:
                gain = {part: given[part] for part in given if part == "gain"}
                changes[self._names[owner]] = {"delta": own, **gain}
        return delta, torch.stack(gains).to(self._like.device)

    def _delta_net(self, net: DeltaNet, products: dict[str, tuple[nn.Linear, ...]]) -> dict[str, LowRank | None]:
        """The changes of the products that stand for a delta net's own (`StateLayer`); takes those out
        of `products`."""
        where, expands = self._names[net.module], products.pop("latents", ())
        return {
            "qkv": self._low_rank(products.pop("qkv"), partial(delta_rows, net), f"{where}.input"),
            "latents": self._low_rank(expands, module=f"{where}.expand", is_apart=True) if expands else None,
            "output": self._low_rank(products.pop("output"), module=f"{where}.output"),
        }

    def _low_rank(
        self,
        modules: Sequence[nn.Linear],
        joined: Callable[[list[Tensor]], Tensor] = torch.cat,
        module: str | None = None,
        *,
        is_apart: bool = False,
    ) -> LowRank | None:
        """The change of products that are one; None if no adapter changes them.

        Args:
            joined: makes the rows of the one product of those of each.
            module: the name of the one module that stands for all of them in the served model; None: there is none.
            is_apart: their inputs follow on one another in that of the one product; else they have the same.
        """
        factors = [[_factors(parts, one) for parts in self._parts(one)] for one in modules]
        if is_apart:
            inputs = [one.in_features for one in modules]
            around = [(sum(inputs[:at]), sum(inputs[at + 1 :])) for at in range(len(inputs))]
            factors = [
                [(functional.pad(a, own), b) for a, b in pairs] for own, pairs in zip(around, factors, strict=True)
            ]
        own = list(zip(*factors, strict=True))  # of each adapter, those of each product
        ranks = [sum(len(a) for a, _ in pairs) for pairs in own]
        if not any(ranks):
            return None
        rank = pow2(max(LEAST_RANK, *ranks))
        firsts = [
            functional.pad(torch.cat([a for a, _ in pairs]), (0, 0, 0, rank - num))
            for pairs, num in zip(own, ranks, strict=True)
        ]
        seconds = [joined(_beside_zeros([b for _, b in pairs], rank)) for pairs in own]
        change = LowRank(self._placed(torch.stack(firsts)), self._placed(torch.stack(seconds)))
        each = [[len(a) for a, _ in pairs] for pairs in own]
        if module is None:
            self._share(modules, change, each, joined)
        else:
            self._share_joined(modules, change, each, module)
        return change

    def _share(
        self,
        modules: Sequence[nn.Linear],
        change: LowRank,
        ranks: Sequence[Sequence[int]],
        joined: Callable[[list[Tensor]], Tensor],
    ) -> None:
        """Makes the modules' changes views of those of their one product; of rows that do not follow on one another
        there (queries with output gates between them) copies of lora_B. `ranks`: of each adapter those of each module.
        """
        sizes = [module.out_features for module in modules]
        order = joined(list(torch.split(torch.arange(sum(sizes)), sizes)))
        for before, (module, places) in enumerate(zip(modules, torch.split(order.argsort(), sizes), strict=True)):
            start, stop = int(places[0]), int(places[0]) + len(places)
            is_run = torch.equal(places, torch.arange(start, stop))
            rows = slice(start, stop) if is_run else places.to(change.b.device)
            for changes, each, a, b in zip(self.by_module, ranks, change.a, change.b, strict=True):
                columns = slice(sum(each[:before]), sum(each[: before + 1]))
                if each[before]:
                    changes[self._names[module]] = {"lora_A": a[columns], "lora_B": b[rows, columns]}

    def _share_joined(
        self, modules: Sequence[nn.Linear], change: LowRank, ranks: Sequence[Sequence[int]], name: str
    ) -> None:
        """Makes the changes of the modules that of the module `name`, whose product is theirs in one."""
        for changes, each, a, b in zip(self.by_module, ranks, change.a, change.b, strict=True):
            for module in modules:
                changes.pop(self._names[module], None)
            if any(each):
                changes[name] = {"lora_A": a, "lora_B": b}

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
        change = LowRank(self._placed(torch.stack(rows)), self._placed(torch.stack(columns)))
        for changes, parts, a, b in zip(self.by_module, found, change.a, change.b, strict=True):
            if parts:
                own = len(parts["gate"])
                gate, up = a[:own], a[width : width + own]
                changes[self._names[experts]] = {"gate": gate, "up": up, "down": b[:, :own]}
        return change

    def _parts(self, module: nn.Module) -> Iterator[Mapping[str, Tensor]]:
        """Of each adapter its parts for a module."""
        return (changes.get(self._names[module], {}) for changes in self._changes)

    def _placed(self, changes: Tensor) -> Tensor:
        return changes.to(self._like.device, self._like.dtype).contiguous()


def _norms(layer: Layer) -> list[nn.Module]:
    own = _norms_of_attention(layer)
    of_mlp = () if layer.mlp is None else (layer.mlp.norm, layer.mlp.after)
    others = (layer.input_norm, layer.post_norm, layer.attention_norm, layer.branch_norm, layer.routed_norm)
    return [norm for norm in (*others, *of_mlp, *(own or ())) if norm is not None]


def _router_linear(router: Any) -> nn.Linear | None:
    """The linear layer within a router that computes its logits of what experts read, as Hunyuan's; None if the router
    has another form, or a norm of its own as Gemma's."""
    linears = [] if router is None else [child for child in router.children() if isinstance(child, nn.Linear)]
    has_norm = router is not None and hasattr(router, "scalar_root_size")
    return linears[0] if len(linears) == 1 and not has_norm else None


def _norms_of_attention(layer: Layer) -> tuple[nn.Module, nn.Module] | None:
    """The norms of queries and keys, or of their latents."""
    return None if isinstance(layer.attention, StateNet) else layer.attention.norms


def _products(layer: Layer) -> dict[str, tuple[nn.Linear, ...]]:
    """The products of a layer that the step computes as one each, by their names in `LayerChanges`."""
    attention = layer.attention
    *qkv, output = attention.projections
    qkv += [] if isinstance(attention, StateNet) else [attention.gate]
    found = {"qkv": tuple(one for one in qkv if one is not None), "output": (output,)}
    latents = attention.expands if isinstance(attention, DeltaNet) else ()
    if isinstance(attention, LatentAttention) and attention.queries is not None:
        latents = (attention.queries,)
    found |= {"latents": latents} if latents else {}
    return found if layer.mlp is None else found | {"up": layer.mlp.ups, "down": (layer.mlp.down,)}


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


def _beside_zeros(parts: Sequence[Tensor], rank: int) -> list[Tensor]:
    """The matrices [N, R], each widened to [N, rank] by zeros in the columns of the others and past them."""
    widths = [part.shape[1] for part in parts]
    return [functional.pad(part, (sum(widths[:at]), rank - sum(widths[: at + 1]))) for at, part in enumerate(parts)]
