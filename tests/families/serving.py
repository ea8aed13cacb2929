"""Logits of a family's tiny model: from the runner that the server uses, and from transformers' own forward."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from router.gating import RULES
from router.mask import ExpertMask
from server.model.host.assembly import HostModel, load_model
from server.model.host.sequence_runner import make_runner
from server.model.runner import RowStep, RunnerOptions
from tests.families.checkpoints import FAMILIES, NUM_EXPERTS, is_installed

SERVED = [name for name, family in FAMILIES.items() if family.causal and is_installed(name)]
OTHER_MEMORIES = ("bailing_hybrid", "deepseek_v32", "granitemoehybrid", "nemotron_h", "qwen3_next")
"""Families whose layers remember in another way than the first family of their gating rule."""
NUM_DECODED = 4


PROMPTS = [
    torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (9, 14, 11)
]


# Relative to the largest logit; float32, other order of sums.
TOLERANCE = 2e-5


def served_families(everyday: Collection[str] = (), memories: Collection[str] = OTHER_MEMORIES) -> list[Any]:
    """Parameters of a test: all that are served, exhaustive but for those of `everyday`, or, where that is empty, but
    for one of each gating rule and those of other `memories` than keys and values."""
    seen, found = [], []
    for name in SERVED:
        rule = RULES.get(name.removesuffix("_text"))
        is_everyday = name in everyday if everyday else rule not in seen or name in memories
        seen.append(rule)
        found.append(pytest.param(name, marks=() if is_everyday else pytest.mark.exhaustive))
    return found


def checkpoint_of(model: Any, directory: Path, repository: Path) -> Checkpoint:
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(repository / "models" / "tiny-moe" / name, directory)
    return Checkpoint.open(directory)


def assembled(store: Store, num_slots: int) -> HostModel:
    return load_model(store, RunnerOptions(device=torch.device("cpu"), dtype=torch.float32, num_slots=num_slots))


@torch.no_grad()
def stock_logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """Logits [1 + decoded, V]: prefill of all but the last tokens, then those one by one."""
    start = len(tokens) - NUM_DECODED
    output = model(input_ids=torch.tensor([tokens[:start]]), use_cache=True)
    logits = [output.logits[0, -1]]
    for at in range(start, len(tokens)):
        positions = torch.tensor([[at]])
        output = model(
            input_ids=torch.tensor([[tokens[at]]]),
            position_ids=positions,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        logits.append(output.logits[0, -1])
    return torch.stack(logits)


def served_logits(
    model: HostModel, masks: list[ExpertMask | None], seen: set[tuple[int, int]] | None = None
) -> list[Tensor]:
    """The same from the runner, all prompts decoded together; the second is prefilled in two chunks."""
    runner = make_runner(model, max_rows=len(PROMPTS), max_tokens=32)
    rows = [runner.allocate() for _ in PROMPTS]
    steps = []
    for number, (row, prompt, mask) in enumerate(zip(rows, PROMPTS, masks, strict=True)):
        start = len(prompt) - NUM_DECODED
        if number == 1:
            runner.prefill(row, prompt[:3], mask=mask)
        steps.append(runner.prefill(row, prompt[3 if number == 1 else 0 : start], mask=mask))
    logits = [[step.logits[0]] for step in steps]
    for at in range(NUM_DECODED):
        step = runner.decode(
            [
                RowStep(row, prompt[len(prompt) - NUM_DECODED + at], mask=mask)
                for row, prompt, mask in zip(rows, PROMPTS, masks, strict=True)
            ]
        )
        steps.append(step)
        for row_logits, one in zip(logits, step.logits, strict=True):
            row_logits.append(one)
    if seen is not None:
        for step in steps:
            for layer, picks in enumerate(step.record.served_index):
                seen |= {(layer, int(expert)) for expert in np.unique(picks) if expert < NUM_EXPERTS}
    for row in rows:
        runner.free(row)
    model.cache.check_integrity()
    return [torch.stack(row_logits) for row_logits in logits]


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert bool(torch.isfinite(ours).all())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max()))
