"""The trunk's loading: what it tells while it goes on, and what it leaves as it was."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from expert_store import integrity
from expert_store.errors import ShardCorruptError
from expert_store.store import Store
from server.model.host.assembly import load_model
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


@pytest.mark.parametrize("small_bytes", [0, 64 * 2**20])
def test_weights_of_which_one_bit_was_flipped_are_not_served(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_bytes: int
) -> None:
    monkeypatch.setattr(integrity, "SMALL_BYTES", small_bytes)
    path = shutil.copytree(tiny_store, tmp_path / "store")
    (weights,) = (path / "trunk").glob("*.safetensors")
    with weights.open("r+b") as file:
        file.seek(-5, 2)
        last = file.read(1)
        file.seek(-5, 2)
        file.write(bytes([last[0] ^ 1]))
    phases: list[str] = []
    with (
        Store.open(path) as store,
        pytest.raises(ShardCorruptError, match=rf"trunk/{weights.name}: sha256 is .* the manifest says"),
    ):
        load_model(
            store,
            device=torch.device("cpu"),
            dtype=torch.float32,
            progress=lambda phase, share: phases.append(phase),
        )
    assert bool(phases) == (small_bytes == 0)
