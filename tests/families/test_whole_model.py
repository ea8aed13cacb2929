"""Every family from checkpoint to logits: extraction ≡ checkpoint, selective ≡ stock, masked ≡ physically pruned.

Checkpoints are written by transformers itself (`save_pretrained` gives the published layout), extracted, assembled and
run through the runner that the server uses. References are transformers' own forwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from expert_store.store import Store
from extractor.errors import UnsupportedFamilyError
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from router.mask import ExpertMask
from server.model.host.sequence_runner import has_plain_memory
from tests.families.checkpoints import NUM_EXPERTS, moe_blocks, random_model, tiny_config
from tests.families.pruning import pruned_model
from tests.families.serving import (
    PROMPTS,
    assembled,
    assert_same,
    checkpoint_of,
    served_families,
    served_logits,
    stock_logits,
)

KEPT = [0, 1, 3, 4, 6, 7]


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


@pytest.mark.parametrize("family", served_families())
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


@pytest.mark.parametrize("family", served_families(memories=()))
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
