"""Adapters of every family: training repairs a mask, through frozen experts of the family's own shape."""

from pathlib import Path

import numpy as np
import pytest
import torch

from expert_store.store import Store
from router.mask import ExpertMask
from server.adapting.corpus import read_corpus
from server.adapting.parameters import make_parameters
from server.adapting.run import AdaptRequest, adapt
from server.adapting.store import TrainedStore
from server.adapting.target import Target
from server.adapting.training import TRAINED, Training, TrainingOptions
from server.model.host.assembly import load_model
from server.model.runner import RunnerOptions
from server.model.seam.changed import changed_experts, experts_modules
from server.quality.batches import run_batch
from server.quality.texts import TextOptions
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


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "family", ["gpt_oss", "nemotron_h", "gemma4_text", "deepseek_v3", "jamba", "minimax_m3_vl_text", "qwen3_moe"]
)
def test_trained_experts_answer_from_their_store_as_they_did_in_training(
    family: str, tmp_path: Path, repository: Path
) -> None:
    extracted(random_model(family), tmp_path, repository).close()
    options = RunnerOptions(device=torch.device("cpu"), dtype=torch.float32)
    model = load_model(Store.open(tmp_path / "store"), options)
    mask = ExpertMask.same_in_every_layer([1, 2, 5, 6], model.num_layers, NUM_EXPERTS)
    work = TrainingOptions(tokens=128, batch_tokens=64, rate=2e-2, measures=1)
    request = AdaptRequest([], TextOptions(context=16), Target(mask=mask), work, 4, generated_tokens=64, experts=True)
    transposed = bool(experts_modules(model.model)[0].is_transposed)
    deep_experts = [(expert,) * model.num_layers for expert in (6, 1, 5, 2)]
    store = TrainedStore(model.store, tmp_path / "trained", deep_experts, transposed=transposed)
    adapter, changes = adapt(model, request, tmp_path / "run")
    store.write(adapter, changes, 128)
    tokens = [list(range(3, 19))]
    with changed_experts(model, request.kept, changes):
        wanted = run_batch(model, tokens, mask, TRAINED).logits
    new = load_model(Store.open(tmp_path / "trained"), options)
    got = run_batch(new, tokens, None, "trained").logits
    assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(got, run_batch(model, tokens, mask, TRAINED).logits, atol=1e-3)
    for one in (model, new):
        one.close()
