"""Checkpoints that several tests read and none writes to."""

from pathlib import Path

import pytest

from tests.extractor.checkpoints import FAMILIES, save_checkpoint
from tests.extractor.packed import save_packed_checkpoint


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session", params=[False, True], ids=["one file", "sharded"])
def family_checkpoint(request: pytest.FixtureRequest, family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of each family, in one file and in several."""
    return save_checkpoint(tmp_path_factory.mktemp(family) / "checkpoint", family, shards=request.param)


@pytest.fixture(scope="session")
def qwen_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random qwen3_moe checkpoint in several files: MoE layers 0 and 2, 6 experts, top-2."""
    return save_checkpoint(tmp_path_factory.mktemp("qwen") / "checkpoint", "qwen3_moe", shards=True)


@pytest.fixture(scope="session")
def packed_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random qwen3_moe checkpoint with its experts in int4 with zero points, groups of 32; see `packed.py`."""
    return save_packed_checkpoint(tmp_path_factory.mktemp("packed") / "checkpoint", "int4 g32 asymmetric")
