"""What every test shares: a process that stays offline and on one thread, and the bundled checkpoint.

The environment is set before anything imports torch or transformers, since both read it at import.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by whoever does that
for _name in [name for name in os.environ if name.startswith("DEEPFEW_")]:
    del os.environ[_name]  # a developer's own settings must not decide what the tests see

import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parent.parent

settings.register_profile(
    "deepfew", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("deepfew")


def pytest_collection_finish() -> None:
    """What was imported stays: a collection of garbage need not walk it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Types that are still frozen when the process ends are told as leaks by their bindings (nanobind)."""
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def own_garbage() -> Iterator[None]:
    """What a module's tests leave open is told (warnings are errors) at its own end, not in a neighbour's tests."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A command that runs in the test's process configures logging; the next test finds it as it was."""
    loggers = [logging.getLogger(name) for name in (None, "server", "extractor", "router", "expert_store", "uvicorn")]
    before = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The bundled checkpoint: Qwen3-MoE layout, 8 layers of 64 experts, top-8, bf16."""
    return REPOSITORY / "models" / "tiny-moe"


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """A file of some stories, as the bundled checkpoint was trained on."""
    path = tmp_path / "stories.txt"
    path.write_text((REPOSITORY / "benchmarks" / "data" / "selection" / "stories_synth.txt").read_text()[:2400])
    return path
