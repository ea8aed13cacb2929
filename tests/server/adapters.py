"""Adapters that change every module of a model at random, attached to a copy of a store."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from expert_store.adapter import Adapter, attach
from expert_store.manifest import read_manifest
from expert_store.store import Store
from router.mask import ExpertMask
from server.adapting.parameters import make_parameters
from server.model.host.assembly import load_model
from server.model.runner import RunnerOptions

PRICE = {"curves": {"prose": [[0.0, 0.0], [0.5, 0.1]]}, "overall": [[0.0, 0.0], [0.5, 0.1]], "fit": None}


def random_adapter(store: Path, mask: ExpertMask, seed: int) -> Adapter:
    """An adapter of a store of all experts for one mask."""
    model = load_model(Store.open(store), RunnerOptions(device=torch.device("cpu"), dtype=torch.float32, num_slots=1))
    generator = torch.Generator().manual_seed(seed)
    changes = {
        name: {part: torch.randn(one.shape, generator=generator) * 0.05 for part, one in parts.items()}
        for name, parts in make_parameters(model, 2, seed).items()
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


def with_adapters(store: Path, copy: Path, mask: ExpertMask) -> Path:
    """A copy of a store with the adapter `planned`, for `mask`, and `pools`, for a tenth to all of the experts."""
    shutil.copytree(store, copy)
    attach(copy, "planned", random_adapter(store, mask, 1))
    attach(copy, "pools", replace(random_adapter(store, mask, 2), mask=None, shares=(0.1, 1.0)))
    return copy
