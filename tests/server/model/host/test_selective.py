"""The selective model against stock transformers, and masked against physically pruned."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from router.mask import ExpertMask
from server.model.host.runner import HostRunner
from server.model.runner import RowStep, Runner, SelectiveModel
from tests.server.model.host.greedy import greedy, stock_greedy

PROMPT = "The capital of France is Paris, and the capital of Italy is"
NUM_EXPERTS = 64


def runner_of(model: SelectiveModel) -> Runner:
    return HostRunner(model, max_rows=4, max_tokens=256)


def pruned_to(model: PreTrainedModel, keep: list[list[int]]) -> nn.Module:
    """A copy of `model` from which all experts but `keep[layer]` are physically removed."""
    pruned = copy.deepcopy(model)
    for layer, ids in zip(pruned.model.layers, keep, strict=True):
        experts, gate = layer.mlp.experts, layer.mlp.gate
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[ids])
        experts.down_proj = nn.Parameter(experts.down_proj[ids])
        gate.weight = nn.Parameter(gate.weight[ids])
        experts.num_experts = gate.num_experts = len(ids)
        gate.top_k = min(gate.top_k, len(ids))
    return pruned


@pytest.mark.parametrize(
    "num_slots", [1, 8, 64, *(pytest.param(count, marks=pytest.mark.exhaustive) for count in (2, 7, 9, 31, 63))]
)
def test_selective_equals_stock_at_every_slot_count(
    selective: Callable[..., SelectiveModel], stock: PreTrainedModel, num_slots: int
) -> None:
    model = selective(num_slots)
    ids = model.tokenizer(PROMPT).input_ids
    tokens, logits = greedy(runner_of(model), ids, 24)
    wanted_tokens, wanted_logits = stock_greedy(stock, ids, 24)
    assert tokens == wanted_tokens
    assert float((logits - wanted_logits).abs().max()) < 1e-4
    model.cache.check_integrity()


def test_logits_are_bit_equal_whatever_the_number_of_slots(selective: Callable[..., SelectiveModel]) -> None:
    results = []
    for num_slots in (1, 5, 64):
        model = selective(num_slots)
        results.append(greedy(runner_of(model), model.tokenizer(PROMPT).input_ids, 8)[1])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_prompt_of_many_more_experts_than_slots_runs_in_waves(
    selective: Callable[..., SelectiveModel], stock: PreTrainedModel
) -> None:
    model = selective(3)
    ids = (model.tokenizer(PROMPT).input_ids * 12)[:150]
    runner = runner_of(model)
    out = runner.prefill(runner.allocate(), ids, all_logits=True)
    with torch.inference_mode():
        wanted = stock(torch.tensor([ids])).logits[0]
    assert float((out.logits - wanted).abs().max()) < 1e-4


def test_bfloat16_agrees_within_its_rounding(selective: Callable[..., SelectiveModel], stock: PreTrainedModel) -> None:
    model = selective(16, dtype=torch.bfloat16)
    ids = model.tokenizer(PROMPT).input_ids
    runner = runner_of(model)
    ours = runner.prefill(runner.allocate(), ids, all_logits=True).logits
    reference = copy.deepcopy(stock).to(torch.bfloat16)
    with torch.inference_mode():
        theirs = reference(torch.tensor([ids])).logits[0].float()
        exact = stock(torch.tensor([ids])).logits[0]
    error, stock_error = (ours - exact).norm() / exact.norm(), (theirs - exact).norm() / exact.norm()
    assert float(error) < 1.5 * float(stock_error) + 1e-3


def test_prefill_in_chunks_equals_prefill_at_once(selective: Callable[..., SelectiveModel]) -> None:
    model = selective(16)
    ids = (model.tokenizer(PROMPT).input_ids * 4)[:50]
    runner = runner_of(model)
    whole = runner.prefill(runner.allocate(), ids).logits[-1]
    row = runner.allocate()
    for start in range(0, len(ids), 7):
        chunked = runner.prefill(row, ids[start : start + 7]).logits[-1]
    assert float((whole - chunked).abs().max()) < 1e-4


def test_rows_of_different_lengths_decode_together_as_they_do_alone(selective: Callable[..., SelectiveModel]) -> None:
    model = selective(16)
    runner = runner_of(model)
    prompts = [model.tokenizer(text).input_ids for text in ("Once upon a time", PROMPT, "12 + 30 =", "Der Hund")]
    alone = [greedy(runner, ids, 12) for ids in prompts]
    rows, tokens = [], []
    for ids in prompts:
        rows.append(runner.allocate())
        tokens.append([int(runner.prefill(rows[-1], ids).logits[-1].argmax())])
    live = [0, 1, 2, 3]
    for step in range(11):
        if step == 4:  # a row leaves in the middle, and the last one moves into its place
            runner.free(rows[1])
            live = [3, 0, 2]
        out = runner.decode([RowStep(rows[at], tokens[at][-1]) for at in live])
        for at, logits in zip(live, out.logits, strict=True):
            tokens[at].append(int(logits.argmax()))
    for at in live:
        assert tokens[at] == alone[at][0]
    assert tokens[1] == alone[1][0][: len(tokens[1])]


@pytest.mark.parametrize("num_kept", [40, 8, 5, 1])
def test_masked_equals_physically_pruned(
    selective: Callable[..., SelectiveModel], stock: PreTrainedModel, num_kept: int
) -> None:
    generator = torch.Generator().manual_seed(num_kept)
    keep = [sorted(torch.randperm(NUM_EXPERTS, generator=generator)[:num_kept].tolist()) for _ in range(8)]
    allowed = torch.zeros(8, NUM_EXPERTS, dtype=torch.bool)
    for layer, ids in enumerate(keep):
        allowed[layer, ids] = True
    mask = ExpertMask.of(allowed.numpy())
    model = selective(4, mask=mask)
    ids = model.tokenizer(PROMPT).input_ids
    tokens, logits = greedy(runner_of(model), ids, 16)
    wanted_tokens, wanted_logits = stock_greedy(pruned_to(stock, keep), ids, 16)
    assert tokens == wanted_tokens
    assert float((logits - wanted_logits).abs().max()) < 1e-4
    resident = {(layer, expert) for layer in range(8) for expert in model.cache.resident(layer)}
    assert all(allowed[layer, expert] for layer, expert in resident), "an expert outside the mask was fetched"


def test_masks_per_row_give_each_row_what_it_gives_alone(selective: Callable[..., SelectiveModel]) -> None:
    model = selective(16)
    runner = runner_of(model)
    masks = [
        None,
        ExpertMask.same_in_every_layer(range(32), 8, NUM_EXPERTS),
        ExpertMask.same_in_every_layer(range(20, 24), 8, NUM_EXPERTS),
    ]
    ids = model.tokenizer(PROMPT).input_ids
    alone = [greedy(runner, ids, 10, mask)[0] for mask in masks]
    rows = [runner.allocate() for _ in masks]
    tokens = [
        [int(runner.prefill(row, ids, mask=mask).logits[-1].argmax())] for row, mask in zip(rows, masks, strict=True)
    ]
    for _ in range(9):
        out = runner.decode(
            [RowStep(row, ids[-1], mask=mask) for row, ids, mask in zip(rows, tokens, masks, strict=True)]
        )
        for mine, logits in zip(tokens, out.logits, strict=True):
            mine.append(int(logits.argmax()))
    assert tokens == alone


def test_deficit_is_the_missing_share_of_the_demanded_mass(selective: Callable[..., SelectiveModel]) -> None:
    full, half = selective(64), selective(64, mask=ExpertMask.same_in_every_layer(range(32), 8, NUM_EXPERTS))
    ids = full.tokenizer(PROMPT).input_ids
    unmasked = runner_of(full)
    assert float(unmasked.prefill(unmasked.allocate(), ids).share.missed.sum()) == 0.0
    masked = runner_of(half)
    output = masked.prefill(masked.allocate(), ids)
    record = output.record
    assert record.demand_index is not None
    assert record.demand_weight is not None
    missing = record.demand_weight[0] * (record.demand_index[0] >= 32)
    assert output.share.missed[0, 0] == pytest.approx(float(missing.sum()), rel=1e-5)
    assert 0.1 < output.share.missed.sum() / output.share.demanded.sum() < 0.9
    assert int(record.served_index.max()) < 32, "an unavailable expert was served"


def test_experts_are_never_materialised_in_the_trunk(selective: Callable[..., SelectiveModel]) -> None:
    model = selective(2)
    names = [name for name, _ in model.model.named_parameters()]
    assert not [name for name in names if ".experts." in name]
    assert model.cache.statistics().slot_bytes == 2 * 8 * 3 * 32 * 256 * 4
