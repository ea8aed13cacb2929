"""The decode step's kernels, in Triton's interpreter, against transformers in float64."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from expert_store.paging.pages import DevicePages, PagesShape
from server.model.device.pack import decode_shape, pack_trunk
from server.model.device.state import RowState
from server.model.device.step import DecodeStep, StepOptions, Tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bf16 matrices as if they were integers, so the CPU checks the roundings in fp16.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
# Few programs a kernel: the interpreter runs them one after the other.
TUNING = Tuning(
    qkv_rows=64, output_rows=32, head_rows=32, gate_rows=4, up_rows=8, down_rows=32, down_columns=32, gemm_rows=32,
    gemm_columns=64, expert_rows=32, expert_columns=64, attention_splits=2,
    attention_block=16 if DEVICE == "cuda" else 2, fetchers=2, copy_elements=256,
)  # fmt: skip
LAYERS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 2, 12, 3, 64, 32


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        norm_topk_prob=True, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    built = Qwen3MoeForCausalLM(config).eval()
    for name, parameter in built.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.2 * torch.randn_like(parameter)
    return built


def spans_of(model: Qwen3MoeForCausalLM, dtype: torch.dtype) -> torch.Tensor:
    """[L, E, span] as the host tier holds them."""
    layers = [
        torch.cat([layer.mlp.experts.gate_up_proj.flatten(1), layer.mlp.experts.down_proj.flatten(1)], dim=1)
        for layer in model.model.layers
    ]
    return torch.stack(layers).detach().to(dtype).contiguous()


def build(model, dtype, *, batch, slots=EXPERTS, policy="lru", **options):
    copy = Qwen3MoeForCausalLM(model.config).eval()
    copy.load_state_dict(model.state_dict())
    copy = copy.to(dtype).to(DEVICE)
    shape = decode_shape(copy, intermediate=INTERMEDIATE, max_rows=6, max_tokens=64)
    spans = spans_of(model, dtype)
    if DEVICE == "cuda":
        spans = spans.pin_memory()
    pages_shape = PagesShape(LAYERS, EXPERTS, TOP_K, slots, spans.shape[-1], batch, dtype)
    pages = DevicePages(pages_shape, spans, device=DEVICE, policy=policy)
    pages.seed(torch.arange(slots).expand(LAYERS, slots))
    state = RowState(shape, DEVICE)
    return DecodeStep(shape, pack_trunk(copy, shape), pages, state, batch, StepOptions(tuning=TUNING, **options))


@torch.no_grad()
def reference(
    model, tokens: torch.Tensor, num_steps: int, hidden: set[tuple[int, int]] = frozenset(), dtype=torch.float32
) -> torch.Tensor:
    """Logits [steps, B, V] in float64 of teacher-forced tokens [steps, B], weights rounded to `dtype`; `hidden`
    (layer, expert) are made unavailable.
    """
    exact = Qwen3MoeForCausalLM(model.config).eval().to(dtype)
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    exact.set_experts_implementation("eager")
    for layer, block in enumerate(exact.model.layers):
        gone = [expert for where, expert in hidden if where == layer]
        if gone:
            block.mlp.gate.register_forward_hook(_prune(gone, TOP_K))
    return exact(tokens.T).logits.transpose(0, 1)[:num_steps]


def _prune(gone, top_k):
    def hook(module, inputs, output):
        logits = output[0].clone()
        logits[:, gone] = -torch.inf
        weights, ids = logits.softmax(-1).topk(top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), ids

    return hook


def run(step: DecodeStep, tokens: torch.Tensor, rows: list[int]) -> torch.Tensor:
    out = []
    step.rows.copy_(torch.tensor(rows, dtype=torch.int32))
    for now in tokens:
        step.tokens.copy_(now)
        step.logits.fill_(torch.nan)
        step.launch()
        out.append(step.logits.clone())
    return torch.stack(out).cpu().double()


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("batch", "slots"), [(1, TOP_K), (1, EXPERTS), (2, 6), pytest.param(5, TOP_K, marks=pytest.mark.slow)]
)
def test_step_agrees_with_float64_at_every_slot_count(model, batch, slots):
    tokens = torch.randint(0, 96, (4, batch), generator=torch.Generator().manual_seed(batch))
    step = build(model, torch.float32, batch=batch, slots=slots)
    got = run(step, tokens, [(2 * b + 1) % 6 for b in range(batch)] if batch < 4 else [4, 0, 3, 1, 5])
    assert distance(got, reference(model, tokens, 4)) < 1e-5
    step.pages.check_integrity(contents=True)


def test_results_do_not_depend_on_what_was_resident(model):
    tokens = torch.randint(0, 96, (3, 1), generator=torch.Generator().manual_seed(7))
    results = [run(build(model, HALF, batch=1, slots=slots), tokens, [0]) for slots in (TOP_K, EXPERTS)]
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_half_precision_step_agrees_with_float64_within_its_rounding(model, batch):
    tokens = torch.randint(0, 96, (4, batch), generator=torch.Generator().manual_seed(3))
    got = run(build(model, HALF, batch=batch, slots=6), tokens, list(range(batch)))
    assert distance(got, reference(model, tokens, 4, dtype=HALF)) < 3e-2


@pytest.mark.slow
def test_masked_rows_equal_a_pruned_model_and_others_are_untouched(model):
    tokens = torch.randint(0, 96, (4, 2), generator=torch.Generator().manual_seed(11))
    hidden = {(0, 1), (0, 5), (0, 7), (1, 0), (1, 2), (1, 11)}
    step = build(model, torch.float32, batch=2, slots=5, masked=True)
    for layer, expert in hidden:
        step.state.masks[3, layer, expert] = 0
    got = run(step, tokens, [3, 2])
    assert distance(got[:, 0], reference(model, tokens[:, :1], 4, hidden)[:, 0]) < 1e-5
    assert distance(got[:, 1], reference(model, tokens[:, 1:], 4)[:, 0]) < 1e-5
    served = {(layer, int(e)) for layer in range(LAYERS) for e in step.log_ids[layer, 0]}
    assert not served & hidden


def test_fewer_available_than_top_k_leaves_sentinels_and_no_phantom_fetch(model):
    step = build(model, torch.float32, batch=1, slots=TOP_K, masked=True)
    step.state.masks[0] = 0
    step.state.masks[0, :, 10] = 1
    run(step, torch.tensor([[5], [6]]), [0])
    assert step.log_ids[:, 0].tolist() == [[10, EXPERTS, EXPERTS]] * LAYERS
    assert step.log_weights[:, 0].tolist() == [[1.0, 0.0, 0.0]] * LAYERS
    assert step.pages.stats[:, 1].tolist() == [1, 1]


def test_entries_without_a_row_change_nothing(model):
    tokens = torch.randint(0, 96, (4, 1), generator=torch.Generator().manual_seed(5))
    alone = build(model, torch.float32, batch=2, slots=6)
    got = run(alone, tokens.expand(4, 2), [-1, 4])
    assert distance(got[:, 1:], reference(model, tokens, 4)) < 1e-5
    assert alone.state.lengths.tolist() == [0, 0, 0, 0, 4, 0]
    assert alone.pages.stats[0, :2].sum() == 4 * TOP_K


@pytest.mark.slow
def test_greedy_tokens_follow_on_the_device(model):
    step = build(model, torch.float32, batch=2, slots=6, greedy=True)
    step.rows.copy_(torch.tensor([0, 1], dtype=torch.int32))
    step.tokens.copy_(torch.tensor([3, 50]))
    history = [step.tokens.clone()]
    for _ in range(4):
        step.launch()
        history.append(step.tokens.clone())
    tokens = torch.stack(history).long().cpu()
    wanted = reference(model, tokens[:-1], 4).argmax(-1)
    assert torch.equal(tokens[1:], wanted)
