"""The promise about the batch on a GPU: a row's logits are those of the row alone, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expert_store.store import Store

pytest.importorskip("triton")

from server.model.device.running.assembly import load_device_runner
from server.model.device.running.runner import DeviceRunner
from server.model.device.step.step import MANY_ROWS
from server.model.runner import RowStep, RunnerOptions
from tests.server.model.device.small import DEVICE

pytestmark = pytest.mark.gpu
TEXTS = Path(__file__).parents[4] / "benchmarks" / "data" / "selection" / "stories_synth.txt"
NUM_PROMPTS, NUM_TOKENS = 32, 100


@pytest.fixture(
    scope="module",
    params=[(dtype, rows) for dtype in (torch.bfloat16, torch.float32) for rows in (MANY_ROWS, 2 * MANY_ROWS)],
    ids=lambda param: f"{param[0]} of {param[1]} rows",
)
def runner(tiny_store: Path, request: pytest.FixtureRequest) -> Iterator[DeviceRunner]:
    dtype, max_rows = request.param
    options = RunnerOptions(device=DEVICE, dtype=dtype, max_rows=max_rows, max_tokens=512, num_slots=16)
    made = load_device_runner(Store.open(tiny_store), options)
    yield made
    made.close()


def greedy_together(runner: DeviceRunner, prompts: list[list[int]], num_tokens: int) -> list[Tensor]:
    """The logits [num_tokens, V] that each prompt's greedy tokens were chosen from, all prompts in one batch."""
    rows = [runner.allocate() for _ in prompts]
    logits = [[runner.prefill(row, prompt).logits[0].clone()] for row, prompt in zip(rows, prompts, strict=True)]
    for _ in range(num_tokens - 1):
        steps = [RowStep(row, int(told[-1].argmax())) for row, told in zip(rows, logits, strict=True)]
        for told, now in zip(logits, runner.decode(steps).logits, strict=True):
            told.append(now.clone())
    for row in rows:
        runner.free(row)
    return [torch.stack(told) for told in logits]


def test_a_rows_logits_are_those_of_the_row_alone(runner: DeviceRunner) -> None:
    text = TEXTS.read_text()
    prompts = [runner.model.tokenizer(text[900 * at : 900 * at + 20 + 12 * at]).input_ids for at in range(NUM_PROMPTS)]
    alone = [greedy_together(runner, [prompt], NUM_TOKENS)[0] for prompt in prompts]
    for size in (2, 3, 5, 8):
        for start in range(0, NUM_PROMPTS, size):
            for at, logits in enumerate(greedy_together(runner, prompts[start : start + size], NUM_TOKENS), start):
                assert torch.equal(logits, alone[at]), f"prompt {at} beside {size - 1} others"
    runner.pages.check_integrity(contents=True)
