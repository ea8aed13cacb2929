"""The device-driven runner over a store of packed experts, against stock transformers with the values of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from expert_store.rows import span_values
from expert_store.store import Store

pytest.importorskip("triton")

from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from server.model.device.capture import NotCapturableError
from server.model.device.capture.modules import moe_blocks
from server.model.device.running.assembly import load_device_runner
from server.model.device.running.runner import DeviceRunner
from server.model.device.step import graphs as device_graphs
from server.model.runner import RowStep, RunnerOptions
from tests.extractor.packed import pack_checkpoint
from tests.server.model.device.small import DEVICE, TUNING


def write_store(path: Path, tokenizer: Path, among: str) -> Path:
    """A store of a random Qwen3-MoE whose projections named like `among` are int4 with zero points in groups of 32."""
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        moe_intermediate_size=32, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True,
        max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(path / "plain")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(path / "plain")
    packed = pack_checkpoint(path / "plain", path / "packed", "int4 g32 asymmetric", among)
    prepare(Checkpoint.open(packed), path / "store", SelectionRequest()).run()
    return path / "store"


@pytest.fixture(scope="module")
def packed_store(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 6 experts, top-2."""
    return write_store(tmp_path_factory.mktemp("packed"), tiny_checkpoint, ".experts.")


@pytest.fixture
def runner_of(packed_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., DeviceRunner]]:
    made: list[DeviceRunner] = []
    if DEVICE.type == "cpu":
        monkeypatch.setattr(device_graphs, "Tuning", lambda: TUNING)

    def make(num_slots: int, proof: bool = False) -> DeviceRunner:
        options = RunnerOptions(device=DEVICE, dtype=torch.float32, num_slots=num_slots, max_rows=2, max_tokens=96)
        made.append(load_device_runner(Store.open(packed_store), options, proof=proof))
        return made[-1]

    yield make
    for runner in made:
        runner.close()


def stock_of(store: Store) -> torch.nn.Module:
    """Stock transformers, float32, on the plain checkpoint beside the packed one, with the values of its rows."""
    plain = store.path.parent / "plain"
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, experts_implementation="eager").eval()
    for layer, (_, block, _) in enumerate(moe_blocks(model)):
        for expert in range(store.manifest.model.num_experts):
            spec = store.layer_spec(layer)
            span = torch.empty(spec.span_bytes, dtype=torch.uint8)
            store.read_expert(layer, expert, span)
            for name, values in span_values(spec, span).items():
                getattr(block.experts, name).data[expert] = values
    return model


@torch.no_grad()
@pytest.mark.parametrize(("num_slots", "proof"), [(2, False), pytest.param(6, True, marks=pytest.mark.exhaustive)])
def test_prompts_and_tokens_over_packed_experts_equal_stock_transformers(packed_store, runner_of, num_slots, proof):
    stock = stock_of(Store.open(packed_store))
    tokens = [7, 20, 21, 5, 64]
    assert all(layer.is_encoded for layer in Store.open(packed_store).manifest.layers)
    wanted = stock(torch.tensor([tokens])).logits[0]
    runner = runner_of(num_slots, proof)
    row = runner.allocate()
    got = [runner.prefill(row, tokens[:3]).logits[0].cpu()]
    got += [runner.decode([RowStep(row, token)]).logits[0].cpu().clone() for token in tokens[3:]]
    assert torch.allclose(torch.stack(got), wanted[2:], rtol=1e-4, atol=1e-4)
    runner.pages.check_integrity(contents=True)


def test_spans_keep_the_bytes_of_the_store(packed_store, runner_of):
    runner = runner_of(2)
    runner.tier.wait()
    runner.tier.look()
    store = Store.open(packed_store)
    spec = store.layer_spec(1)
    assert runner.pages.slots[0].nbytes == spec.span_bytes
    span = torch.empty(spec.span_bytes, dtype=torch.uint8)
    store.read_expert(1, 3, span)
    assert torch.equal(runner.pages.host_span(1, 3).cpu().view(torch.uint8), span)


def test_a_plain_matrix_beside_a_packed_one_is_not_captured(tiny_checkpoint, tmp_path):
    store = write_store(tmp_path, tiny_checkpoint, "down_proj")
    options = RunnerOptions(device=DEVICE, dtype=torch.float32, max_rows=1, max_tokens=32)
    with pytest.raises(NotCapturableError, match="one of gate_up and down is packed"):
        load_device_runner(Store.open(store), options, proof=False)
