"""Stores of the bundled checkpoint and models over them, shared by the server's tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from router.mask import ExpertMask
from server.model.host.assembly import load_model
from server.model.runner import RunnerOptions, SelectiveModel


@pytest.fixture(scope="session")
def tiny_store(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with every deep expert of the bundled checkpoint; read-only by agreement."""
    path = tmp_path_factory.mktemp("stores") / "tiny"
    prepare(Checkpoint.open(tiny_checkpoint), path, SelectionRequest()).run()
    return path


def _small_store(config: PretrainedConfig, tokenizer: Path, path: Path) -> Path:
    """A store of a random model of that config with the bundled checkpoint's tokenizer."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(path / "checkpoint")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path / "checkpoint")
    prepare(Checkpoint.open(path / "checkpoint"), path / "store", SelectionRequest()).run()
    return path / "store"


@pytest.fixture(scope="session")
def small_store(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of a random Qwen3-MoE of two layers, small enough for Triton's interpreter."""
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32,
        moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
        max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    return _small_store(config, tiny_checkpoint, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def few_small_store(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of its eight experts of each layer; the checkpoint has all."""
    path = tmp_path_factory.mktemp("few") / "store"
    prepare(Checkpoint.open(small_store.parent / "checkpoint"), path, SelectionRequest(count=3)).run()
    return path


@pytest.fixture(scope="session")
def small_mixtral_store(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of Mixtral: no norms on heads, experts of its own sizes."""
    config = MixtralConfig(
        vocab_size=8192, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
        initializer_range=0.3, sliding_window=None,
    )  # fmt: skip
    return _small_store(config, tiny_checkpoint, tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="session")
def stock(tiny_checkpoint: Path) -> PreTrainedModel:
    """Stock transformers on the bundled checkpoint, float32."""
    return AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, experts_implementation="batched_mm"
    ).eval()


@pytest.fixture
def selective(tiny_store: Path) -> Iterator[Callable[..., SelectiveModel]]:
    """Makes selective models over the tiny store; closes them at the end."""
    models: list[SelectiveModel] = []

    def make(num_slots: int | None = None, mask: ExpertMask | None = None, dtype: torch.dtype = torch.float32):
        model = load_model(
            Store.open(tiny_store),
            RunnerOptions(device=torch.device("cpu"), dtype=dtype, num_slots=num_slots, mask=mask),
        )
        models.append(model)
        return model

    yield make
    for model in models:
        model.close()
