"""A trunk with linear layers in FP8 is reckoned by the bytes that a server on a GPU holds, and that its steps read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from expert_store.manifest import read_manifest
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from server.errors import UsageError
from server.fit.facts import ModelFacts, facts_of
from server.fit.placement import Wish, place
from server.fit.prediction import predict
from server.machine.rates import known_machines
from server.model.seam.trunk import eight_bits, load_trunk
from tests.families.test_quantised import fp8_in_blocks, quantised_checkpoint

pytest.importorskip("triton")

from server.model.device.capture.pack import pack_trunk, packed_trunk_bytes
from server.model.device.running.assembly import captured_shape

WISH = Wish(True, 80 << 30, 64 << 30, 64, 64, 4)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE whose projections are in FP8, in blocks of 16 × 16; its head is in bfloat16."""
    directory = tmp_path_factory.mktemp("fp8") / "checkpoint"
    return quantised_checkpoint("qwen3_moe", fp8_in_blocks, directory, moe_intermediate_size=32)


@pytest.fixture(scope="module", params=["shipped", "fp8"])
def store(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("store")
    prepare(Checkpoint.open(checkpoint), directory, SelectionRequest(), trunk_dtype=request.param).run()
    return directory


def facts(source: Path, trunk_dtype: Any = None) -> ModelFacts:
    with facts_of(str(source), None, "auto", trunk_dtype=trunk_dtype) as model:
        return model


def test_bytes_are_those_of_the_trunk_that_a_server_packs(store: Path) -> None:
    model = facts(store)
    trunk = load_trunk(store / "trunk", device=torch.device("cpu"), dtype=torch.bfloat16)
    shape = captured_shape(trunk, read_manifest(store).layers, torch.bfloat16, WISH.rows, WISH.context)
    weights = pack_trunk(trunk, shape, eight_bits(trunk, store / "trunk"))
    found = place(model, WISH)
    assert found.path == "captured"
    assert (found.trunk_bytes, found.step_bytes) == (packed_trunk_bytes(trunk, weights), weights.read_bytes)


def test_a_step_reads_the_bytes_that_the_store_has(store: Path) -> None:
    """Beside the linear layers in FP8, a step reads what it reads of the same trunk in 16 bits."""
    model, held, codes, values = facts(store), 0, 0, 0
    for file in (store / "trunk").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                tensor = opened.get_tensor(name)
                held += tensor.nbytes * (tensor.dtype == torch.float8_e4m3fn)
    for linear, (one, scales) in model.eight_bits.items():
        codes += one.nbytes
        values += linear.weight.nbytes - one.nbytes - scales.nbytes
    assert codes == held > 0
    assert place(model, WISH).step_bytes == place(replace(model, eight_bits={}), WISH).step_bytes - values


def test_a_checkpoint_has_the_figures_of_the_store_that_is_made_of_it(checkpoint: Path, store: Path) -> None:
    made: Any = read_manifest(store).trunk_dtype
    assert place(facts(checkpoint, made), WISH) == place(facts(store), WISH)
    plain = place(facts(checkpoint, "16bit"), WISH)
    assert plain.step_bytes > place(facts(checkpoint), WISH).step_bytes
    with pytest.raises(UsageError, match=f"trunk has the dtype {made}, wanted 16bit"):
        facts(store, "16bit")


def test_steps_are_shorter_and_prompts_and_the_host_driven_path_are_not(checkpoint: Path) -> None:
    h100 = known_machines()["h100"]
    fewer, plain = facts(checkpoint), facts(checkpoint, "16bit")
    found, other = (predict(model, h100, WISH, 16, 16) for model in (fewer, plain))
    assert found.step.trunk < other.step.trunk
    assert found.ttft_seconds - found.step.total == pytest.approx(other.ttft_seconds - other.step.total)
    cpu = replace(WISH, gpu=False, device_memory=0)
    assert place(fewer, cpu) == place(plain, cpu)
