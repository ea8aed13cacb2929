"""A captured step over a tiny random model, and transformers' own forward of it in float64 to hold it to."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from expert_store.adapter import Adapter
from expert_store.encoding import RowEncoding
from expert_store.paging.pages import DevicePages, PagesShape
from expert_store.rows import RowFields, decode_rows, pack_rows, unpack_rows
from router.gating import RouterCall, find_gating_rule
from server.model.device.capture.adapters import adapted_trunk, check_adapters
from server.model.device.capture.modules import moe_blocks
from server.model.device.capture.pack import decode_shape, pack_trunk
from server.model.device.step.state import RowState
from server.model.device.step.step import DecodeStep
from server.model.device.step.tuning import StepOptions, Tuning
from tests.expert_store.test_rows import fields_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bf16 matrices as if they were integers, so the CPU checks the roundings in fp16.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
# Few programs a kernel: the interpreter runs them one after the other.
TUNING = Tuning(
    qkv_rows=64, output_rows=32, head_rows=32, gate_rows=4, up_rows=8, down_rows=32, down_columns=32,
    packed_up_rows=64, packed_down_rows=64, delta_values=8,
    tile_up_rows=32, tile_up_words=16, tile_up_splits=2, tile_down_rows=64, tile_down_words=16, tile_up_programs=2,
    tile_down_programs=2,
    attention_splits=2, attention_tile=16 if DEVICE == "cuda" else 2, latent_tile=16 if DEVICE == "cuda" else 2,
    latent_splits=4,
    fetchers=2, packed_fetchers=2, copy_elements=256,
)  # fmt: skip
MAX_ROWS, MAX_TOKENS = 8, 64
BLOCK_TOKENS = TUNING.attention_tile


def qwen3_moe(*, num_experts: int, top_k: int, hidden: int, intermediate: int) -> Qwen3MoeForCausalLM:
    """A random model of two layers in float32, with norms that are not all one."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, moe_intermediate_size=intermediate, num_experts=num_experts, num_experts_per_tok=top_k,
        norm_topk_prob=True, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    built = Qwen3MoeForCausalLM(config).eval()
    for name, parameter in built.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.2 * torch.randn_like(parameter)
    return built


def spans_of(model: Any, dtype: torch.dtype) -> Tensor:
    """[L, E, span] as the host tier holds them."""
    layers = []
    for _, block, _ in moe_blocks(model):
        parts = [part.mT if block.experts.is_transposed and part.ndim == 3 else part for part in experts_of(block)]
        layers.append(torch.cat([part.flatten(1) for part in parts], dim=1))
    return torch.stack(layers).detach().to(dtype).contiguous()


def experts_of(block: Any) -> list[Tensor]:
    """The experts' parameters of a MoE block, in the order of a span."""
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    return [getattr(block.experts, name) for name in names if hasattr(block.experts, name)]


def pack_experts(model: Any, encodings: tuple[RowEncoding, RowEncoding], seed: int = 0) -> Tensor:
    """Random packed spans [L, E, words] as the host tier holds them; the model's experts get the values in them."""
    spans = []
    for layer, (_, block, _) in enumerate(moe_blocks(model)):
        params = (block.experts.gate_up_proj, block.experts.down_proj)
        for expert in range(len(params[0])):
            parts = []
            for at, (encoding, param) in enumerate(zip(encodings, params, strict=True)):
                rows, columns = param.shape[1:]
                packed = pack_rows(encoding, fields_of(encoding, rows, columns, 1000 * layer + 10 * expert + at + seed))
                values = decode_rows(encoding, columns, packed)
                mean = values.std() * columns**0.5 / 2  # keeps activations in range; the scales take it on
                fields = unpack_rows(encoding, columns, packed)
                packed = pack_rows(encoding, _shrunk(encoding, fields, float(mean)))
                param.data[expert] = decode_rows(encoding, columns, packed)
                parts.append(packed.flatten())
            spans.append(torch.cat(parts).view(torch.int32))
    return torch.stack(spans).view(len(moe_blocks(model)), -1, spans[0].numel())


def _shrunk(encoding: RowEncoding, fields: RowFields, by: float) -> RowFields:
    """The same numbers with smaller scales."""
    if encoding.scales == "F8_E8M0":
        return replace(fields, scales=fields.scales - round(math.log2(by)))
    return replace(fields, scales=(fields.scales.float() / by).to(fields.scales.dtype))


def build(
    model: Any,
    dtype: torch.dtype,
    *,
    batch: int,
    slots: int | None = None,
    policy: Any = "lru",
    packed: tuple[tuple[RowEncoding, RowEncoding], Tensor] | None = None,
    block_tokens: int = BLOCK_TOKENS,
    max_tokens: int = MAX_TOKENS,
    tuning: Tuning = TUNING,
    adapters: Mapping[str, Adapter] | None = None,
    **options: Any,
) -> DecodeStep:
    """A step of the model in `dtype`, its experts in so many slots a layer (all), the first ones resident.

    Args:
        packed: encodings of the experts and their spans [L, E, words], which stand for the model's.
        adapters: that entries of the step may have.
        block_tokens, max_tokens: of KV memory; a few tokens cross the borders of blocks.
    """
    other = copy.deepcopy(model).to(dtype).to(DEVICE)
    experts = moe_blocks(model)[0][1].experts
    intermediate = experts.down_proj.shape[-2 if experts.is_transposed else -1]
    encodings, spans = (None, spans_of(model, dtype)) if packed is None else packed
    shape = decode_shape(other, intermediate=intermediate, max_rows=MAX_ROWS, max_tokens=max_tokens, packed=encodings)
    shape = replace(shape, block_tokens=block_tokens)
    if DEVICE == "cuda":
        spans = spans.pin_memory()
    slots = shape.num_experts if slots is None else slots
    layers, experts = shape.num_moe_layers, shape.num_experts
    pages_shape = PagesShape(layers, experts, shape.top_k, slots, spans.shape[-1], batch, spans.dtype)
    pages = DevicePages(pages_shape, spans, device=DEVICE, policy=policy)
    pages.seed(torch.arange(slots).expand(layers, slots))
    state = RowState(shape, DEVICE)
    weights = pack_trunk(other, shape)
    if adapters is not None:
        check_adapters(other, adapters)
        weights = adapted_trunk(other, shape, weights, adapters).weights
        options |= {"masked": True, "adapted": True}
    return DecodeStep(shape, weights, pages, state, batch, StepOptions(tuning=tuning, **options))


def run(step: DecodeStep, tokens: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
    """Logits [steps, B, V] in float64 of teacher-forced tokens [steps, B], and the picks [steps, L, B, K]."""
    logits, picks = [], []
    step.rows.copy_(torch.tensor(rows, dtype=torch.int32))
    for now in tokens:
        step.tokens.copy_(now)
        step.logits.fill_(torch.nan)
        step.launch()
        logits.append(step.logits.clone())
        picks.append(step.log_ids.clone())
    return torch.stack(logits).cpu().double(), torch.stack(picks).cpu().long()


def attended(step: DecodeStep, rows: list[int]) -> Tensor:
    """The result of layer 1's attention for a new random token of each row, [B, heads * value_dim]. Mutates the step's
    `rows` and `qkv`; a row's token does not depend on the others."""
    new = torch.randn(MAX_ROWS, step.shape.qkv, generator=torch.Generator().manual_seed(7))
    step.rows.copy_(torch.tensor(rows, dtype=torch.int32))
    step.qkv.copy_(new[rows])
    step.attended.fill_(torch.nan)
    step.attend(1)
    return step.attended.clone()


class Reference:
    """transformers' forward in float64, weights rounded to `dtype`.

    Args:
        hidden: (layer, expert) that are unavailable, by the family's gating rule, to every token.
        temperature: divides the routers' logits.
        picks: [steps, L, B, K] experts that replace the routers' choice, weighed as the router would have.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype = torch.float32,
        *,
        hidden: set[tuple[int, int]] = frozenset(),  # type: ignore[assignment]
        temperature: float = 1.0,
        picks: Tensor | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).to(dtype).double()
        self.model.set_experts_implementation("eager")
        self.shortfall = 0.0
        """How much less than the best choice the given picks scored at most, in softmax routers' logits."""
        for layer, (_, _, router) in enumerate(moe_blocks(self.model)):
            gone = [expert for where, expert in hidden if where == layer]
            if gone or temperature != 1.0:
                router.register_forward_hook(self._masked(gone, temperature), with_kwargs=True)
            if picks is not None:
                router.register_forward_hook(self._given(picks[:, layer]))

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """[steps, B, V] of tokens [steps, B]."""
        result: Tensor = self.model(tokens.T).logits.transpose(0, 1)
        return result

    def _masked(self, gone: list[int], temperature: float) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            call = RouterCall.of(module, args, kwargs, output)
            mask = torch.ones(call.picks.logits.shape, dtype=torch.bool)
            mask[:, gone] = False
            heat = torch.full((len(mask),), temperature) if temperature != 1.0 else None
            return find_gating_rule(self.model.config.get_text_config().model_type, module).masked(call, mask, heat)

        return hook

    def _given(self, picks: Tensor) -> Any:
        """Of a renormalised softmax router."""

        def hook(module: Any, inputs: Any, output: Any) -> Any:
            logits, _, best = output
            ids = picks.transpose(0, 1).flatten(0, 1)  # [B * steps, K]
            wanted, got = logits.gather(-1, best).amin(dim=-1), logits.gather(-1, ids).amin(dim=-1)
            self.shortfall = max(self.shortfall, float((wanted - got).max()))
            weights = logits.gather(-1, ids).softmax(-1)
            return logits, weights, ids

        return hook


def distance(got: Tensor, wanted: Tensor) -> float:
    """Relative, over everything."""
    return float((got - wanted).norm() / wanted.norm())
