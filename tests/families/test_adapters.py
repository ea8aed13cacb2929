"""Adapters of every family: training repairs a mask, through frozen experts of the family's own shape."""

from pathlib import Path

import numpy as np
import pytest
import torch

from expert_store.store import Store
from router.mask import ExpertMask
from server.adapting.corpus import read_corpus
from server.adapting.parameters import make_parameters
from server.adapting.target import Target
from server.adapting.training import Training, TrainingOptions
from server.model.host.assembly import load_model
from server.model.runner import RunnerOptions
from tests.families.checkpoints import NUM_EXPERTS, random_model
from tests.families.serving import served_families
from tests.families.test_whole_model import extracted

LEAST = 0.05
"""Below so many nats a mask costs a random model too little for eight steps to tell."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", served_families())
def test_training_lowers_the_divergence_under_a_mask(family: str, tmp_path: Path, repository: Path) -> None:
    extracted(random_model(family), tmp_path, repository).close()
    options = RunnerOptions(device=torch.device("cpu"), dtype=torch.float32, num_slots=3)
    model = load_model(Store.open(tmp_path / "store"), options)
    mask = ExpertMask.same_in_every_layer(range(4), model.num_layers, NUM_EXPERTS)
    texts = {"text": np.random.default_rng(0).integers(3, 90, size=(4, 24)).tolist()}
    parameters = make_parameters(model, 4, 0)
    work = TrainingOptions(tokens=8 * 72, batch_tokens=72, rate=2e-2, measures=8)
    training = Training(model, Target(mask=mask), read_corpus(model, texts, 24, 24), parameters, work, {})
    losses = [loss for _, loss in training.run(None).losses]
    assert all(np.isfinite(losses))
    if losses[0] > LEAST:
        assert losses[-1] < 0.95 * losses[0]
    model.close()
