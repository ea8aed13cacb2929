"""The trunk's loading: what it tells while it goes on, and what it leaves as it was."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from expert_store import integrity
from expert_store.errors import ShardCorruptError
from expert_store.manifest import TrunkFile
from expert_store.store import Store
from server.model.host.assembly import load_model
from server.model.runner import RunnerOptions
from server.model.seam.trunk import load_trunk


def test_loading_is_told_tensor_by_tensor_and_the_bar_is_given_back(tiny_store: Path) -> None:
    shown = transformers_logging.is_progress_bar_enabled()
    shares: list[float] = []
    model = load_trunk(tiny_store / "trunk", device=torch.device("cpu"), dtype=torch.float32, progress=shares.append)
    assert shares == sorted(set(shares))
    assert len(shares) > model.config.num_hidden_layers
    assert 0 < shares[0] < 0.1
    assert shares[-1] == 1
    assert transformers_logging.is_progress_bar_enabled() == shown
    assert transformers_logging.set_tqdm_hook(None) is None


@pytest.mark.parametrize("when", ["before the loading", "while it goes on", "at its end"])
def test_weights_of_which_one_bit_was_flipped_are_not_served(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Whenever the check finds them: large files are hashed beside the loading, and either may be the faster."""
    path = shutil.copytree(tiny_store, tmp_path / "store")
    (weights,) = (path / "trunk").glob("*.safetensors")
    with weights.open("r+b") as file:
        file.seek(-5, 2)
        last = file.read(1)
        file.seek(-5, 2)
        file.write(bytes([last[0] ^ 1]))
    may_compare, found = threading.Event(), threading.Event()
    compare, wait = integrity.TrunkCheck._compare, integrity.TrunkCheck.wait
    if when != "before the loading":
        monkeypatch.setattr(integrity, "SMALL_BYTES", 0)

        def compare_later(check: integrity.TrunkCheck, file: TrunkFile) -> None:
            assert may_compare.wait(60)
            compare(check, file)
            if file.name.endswith(weights.name):
                found.set()

        def wait_at_the_end(check: integrity.TrunkCheck) -> None:
            may_compare.set()
            wait(check)

        monkeypatch.setattr(integrity.TrunkCheck, "_compare", compare_later)
        monkeypatch.setattr(integrity.TrunkCheck, "wait", wait_at_the_end)
    phases: list[str] = []

    def progress(phase: str, share: float) -> None:
        phases.append(phase)
        if when == "while it goes on":
            may_compare.set()
            assert found.wait(60)

    with (
        Store.open(path) as store,
        pytest.raises(ShardCorruptError, match=rf"trunk/{weights.name}: sha256 is .* the manifest says"),
    ):
        load_model(store, RunnerOptions(device=torch.device("cpu"), dtype=torch.float32), progress=progress)
    if when == "at its end":
        assert len(phases) > 1
    else:
        assert len(phases) == (0 if when == "before the loading" else 1), "the loading went on with bad weights"
