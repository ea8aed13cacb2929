"""Adapters that change every module of a model at random, attached to a copy of a store, and rows that have them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from expert_store.adapter import Adapter, attach
from expert_store.manifest import read_manifest
from expert_store.store import Store
from router.mask import ExpertMask
from server.adapting.parameters import make_parameters
from server.model.host.assembly import load_model
from server.model.runner import RowStep, Runner, RunnerOptions

PRICE = {"curves": {"prose": [[0.0, 0.0], [0.5, 0.1]]}, "overall": [[0.0, 0.0], [0.5, 0.1]], "fit": None}

HALF = ExpertMask.same_in_every_layer([0, 2, 3, 7], 2, 8)
ROWS: list[tuple[ExpertMask | None, str | None]] = [
    (None, None),
    (HALF, "planned"),
    (HALF, None),
    (HALF, "pools"),
    (HALF, "planned"),
]


def random_adapter(store: Path, mask: ExpertMask, seed: int, shared_width: int = 0) -> Adapter:
    """An adapter of a store of all experts for one mask, which may add an expert to each layer."""
    model = load_model(Store.open(store), RunnerOptions(device=torch.device("cpu"), dtype=torch.float32, num_slots=1))
    generator = torch.Generator().manual_seed(seed)
    changes = {
        name: {part: torch.randn(one.shape, generator=generator) * 0.05 for part, one in parts.items()}
        for name, parts in make_parameters(model, 2, seed, shared_width).items()
    }
    spec = model.store.manifest.model
    model.close()
    training = {"ratios_before": {"0.25": 9.0}, "ratios": [[1, {"0.25": 1.05}]]}
    return Adapter(
        read_manifest(store).source.fingerprint,
        spec.num_layers,
        spec.num_experts,
        changes,
        mask=np.array(mask.allowed),
        price=PRICE,
        training=training,
    )


def with_adapters(store: Path, copy: Path, mask: ExpertMask, shared_width: int = 0) -> Path:
    """A copy of a store with the adapter `planned`, for `mask`, and `pools`, for a tenth to all of the experts, which
    may add an expert to each layer."""
    shutil.copytree(store, copy)
    attach(copy, "planned", random_adapter(store, mask, 1))
    attach(copy, "pools", replace(random_adapter(store, mask, 2, shared_width), mask=None, shares=(0.1, 1.0)))
    return copy


def decoded(runner: Runner, rows: list[int], num_steps: int = 5) -> list[list[Tensor]]:
    """The logits of the prompts and of some greedy steps of some of `ROWS`, run together."""
    handles, logits = [], []
    for at in rows:
        mask, adapter = ROWS[at]
        handles.append(runner.allocate())
        prompt = list(range(100 + 7 * at, 106 + 8 * at))
        logits.append([runner.prefill(handles[-1], prompt, mask=mask, adapter=adapter).logits[0]])
    for _ in range(num_steps):
        steps = [
            RowStep(handle, int(told[-1].argmax()), mask=ROWS[at][0], adapter=ROWS[at][1])
            for handle, told, at in zip(handles, logits, rows, strict=True)
        ]
        for told, row in zip(logits, runner.decode(steps).logits, strict=True):
            told.append(row.clone())
    for handle in handles:
        runner.free(handle)
    return logits
