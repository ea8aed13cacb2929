"""Every family from checkpoint to logits: extraction ≡ checkpoint, selective ≡ stock, masked ≡ physically pruned.

Checkpoints are written by transformers itself (`save_pretrained` gives the published layout), extracted, assembled and
run through the runner that the server uses. References are transformers' own forwards.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.errors import UnsupportedFamilyError
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from router.mask import ExpertMask
from server.model.host.assembly import SelectiveModel, load_model
from server.model.host.sequence_runner import has_plain_memory, make_runner
from tests.families.checkpoints import FAMILIES, NUM_EXPERTS, is_installed, moe_blocks, random_model, tiny_config
from tests.families.pruning import pruned_model

SERVED = [name for name, family in FAMILIES.items() if family.causal and is_installed(name)]
NUM_DECODED = 4
PROMPTS = [
    torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (9, 14, 11)
]
KEPT = [0, 1, 3, 4, 6, 7]
# Relative to the largest logit; float32, other order of sums.
TOLERANCE = 2e-5


def checkpoint_of(model: Any, directory: Path, repository: Path) -> Checkpoint:
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(repository / "models" / "tiny-moe" / name, directory)
    return Checkpoint.open(directory)


def extracted(model: Any, where: Path, repository: Path, experts: str | None = None) -> Store:
    """A store of the model; skips where this release of transformers has the family in a form that is refused."""
    try:
        prepare(
            checkpoint_of(model, where / "checkpoint", repository), where / "store", SelectionRequest(experts)
        ).run()
    except UnsupportedFamilyError as error:
        if transformers.__version__.startswith("5.17."):
            pytest.skip(str(error))
        raise
    return Store.open(where / "store")


def assembled(store: Store, num_slots: int) -> SelectiveModel:
    return load_model(store, device=torch.device("cpu"), dtype=torch.float32, num_slots=num_slots)


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
    model: SelectiveModel, masks: list[ExpertMask | None], seen: set[tuple[int, int]] | None = None
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
        step = runner.decode(rows, [prompt[len(prompt) - NUM_DECODED + at] for prompt in PROMPTS], masks=masks)
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


@pytest.mark.parametrize("family", SERVED)
def test_store_holds_what_transformers_loads_and_serves_what_it_computes(
    family: str, tmp_path: Path, repository: Path, request: pytest.FixtureRequest
) -> None:
    """Every span, and logits at the least slot count, half and all: prefill, decode, a batch of different lengths."""
    model = random_model(family)
    with extracted(model, tmp_path, repository) as store:
        loaded = type(model).from_pretrained(tmp_path / "checkpoint", dtype=torch.float32).eval()
        blocks = moe_blocks(loaded)
        assert len(blocks) == len(store.manifest.layers)
        for layer, (_, _, experts) in enumerate(blocks):
            for expert in range(NUM_EXPERTS):
                spec = store.manifest.layers[layer]
                span = np.empty(spec.span_bytes, dtype=np.uint8)
                store.read_expert(layer, expert, memoryview(span))
                for tensor in spec.tensors:
                    stored = span[tensor.offset : tensor.offset + tensor.bytes].view(np.float32).reshape(tensor.shape)
                    assert np.array_equal(stored, getattr(experts, tensor.name)[expert].detach().numpy())
    memory = "rows" if has_plain_memory(model) else "a cache a sequence"
    request.node.user_properties.append(("memory", memory))
    reference = [stock_logits(loaded, prompt) for prompt in PROMPTS]
    for num_slots in (1, NUM_EXPERTS // 2, NUM_EXPERTS):
        selective = assembled(Store.open(tmp_path / "store"), num_slots)
        for ours, theirs in zip(served_logits(selective, [None] * len(PROMPTS)), reference, strict=True):
            assert_same(ours, theirs)
        selective.close()


@pytest.mark.parametrize("family", SERVED)
def test_masked_model_equals_a_physically_pruned_one(family: str, tmp_path: Path, repository: Path) -> None:
    """Three requests in one batch over a store that lacks experts: all that it has, fewer than top-k, and one.

    The store raises where an expert that it lacks is asked for, so that a phantom fetch would be seen.
    """
    config = tiny_config(family).to_dict()
    ungrouped = {key: 1 for key in ("n_group", "num_expert_group", "topk_group") if config.get(key) is not None}
    model = random_model(family, **ungrouped)
    store = extracted(model, tmp_path, repository, experts=",".join(map(str, KEPT)))
    loaded = type(model).from_pretrained(tmp_path / "checkpoint", dtype=torch.float32).eval()
    selective = assembled(store, 2)
    num_layers = store.manifest.model.num_layers
    kept = [KEPT, [1, 7], [4]]
    masks = [None, *(ExpertMask.same_in_every_layer(ids, num_layers, NUM_EXPERTS) for ids in kept[1:])]
    seen: set[tuple[int, int]] = set()
    together = served_logits(selective, masks, seen)
    assert {expert for _, expert in seen} <= set(KEPT)
    for ours, prompt, ids in zip(together, PROMPTS, kept, strict=True):
        pruned = pruned_model(loaded, [ids] * num_layers)
        if pruned is not None:
            assert_same(ours, stock_logits(pruned, prompt))
    for alone in range(len(PROMPTS)):
        for ours, theirs in zip(served_logits(selective, [masks[alone]] * 3)[alone], together[alone], strict=True):
            assert_same(ours, theirs)
    selective.close()
