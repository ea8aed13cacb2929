"""Adapters merged into pruned checkpoints: logits as those of masked rows that have the adapter, and refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from expert_store.adapter import Adapter
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.cli.export import export as export_command
from extractor.errors import SelectionError, UnsupportedFamilyError
from extractor.exporting.export import prepare_export
from extractor.planning.plan import Plan, PlannedExpert, write_plan
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from router.mask import ExpertMask
from server.model.host.assembly import load_model
from server.model.runner import RunnerOptions
from server.quality.batches import run_batch
from tests.extractor.checkpoints import NUM_EXPERTS
from tests.server.adapters import random_adapter

KEPT = [0, 2, 3]
MASK = ExpertMask.same_in_every_layer(KEPT, 2, NUM_EXPERTS)
PLAN = Plan(2, NUM_EXPERTS, {"kind": "index"}, tuple(PlannedExpert((expert, expert)) for expert in KEPT))


@pytest.fixture
def whole(qwen_checkpoint: Path, tmp_path: Path) -> Path:
    """A store of all six experts, in MoE layers 0 and 2."""
    prepare(Checkpoint.open(qwen_checkpoint), tmp_path / "store", SelectionRequest()).run()
    return tmp_path / "store"


@pytest.fixture
def adapter(whole: Path) -> Adapter:
    return random_adapter(whole, MASK, 1)


def test_the_checkpoint_answers_as_masked_rows_with_the_adapter(whole: Path, adapter: Adapter, tmp_path: Path) -> None:
    tokens = [list(range(3, 19))]
    model = load_model(Store.open(whole), RunnerOptions(device=torch.device("cpu"), dtype=torch.float32))
    model.routing.install_adapters(model.model, adapter.changes)
    model.routing.adapters.add("some", adapter.changes, model.device, model.dtype)
    wanted, plain = run_batch(model, tokens, MASK, "some").logits, run_batch(model, tokens, MASK).logits
    with Store.open(whole) as store:
        prepare_export(store, tmp_path / "out", PLAN, "float32", adapter).run()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        got = exported(input_ids=torch.tensor(tokens)).logits
    assert torch.allclose(got, wanted, atol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "An adapter is merged" in card
    assert "0.25 of the experts × 1.050 (without × 9.000)" in card
    model.close()


def test_the_command_takes_an_adapter_by_its_name_or_file(
    whole: Path, adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plan(tmp_path / "plan.json", PLAN)
    adapter.write(tmp_path / "a.safetensors")
    export_command(whole, tmp_path / "out", tmp_path / "plan.json", adapter=str(tmp_path / "a.safetensors"))
    assert "3 of 6 experts" in capsys.readouterr().out
    assert "An adapter is merged" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_for_other_experts_or_of_another_checkpoint_is_refused(
    whole: Path, adapter: Adapter, tmp_path: Path
) -> None:
    with Store.open(whole) as store:
        with pytest.raises(SelectionError, match="not made for these experts"):
            prepare_export(store, tmp_path / "out", replace_last(PLAN), None, adapter)
        with pytest.raises(SelectionError, match="of another checkpoint"):
            prepare_export(store, tmp_path / "out", PLAN, None, replace(adapter, fingerprint="0" * 64))
        odd = replace(adapter, changes={**adapter.changes, "model.nowhere": {"delta": torch.zeros(2, 2)}})
        with pytest.raises(UnsupportedFamilyError, match=r"no tensor for model\.nowhere\.delta"):
            prepare_export(store, tmp_path / "out", PLAN, None, odd)
        added = {"gate": torch.zeros(3, 32), "up": torch.zeros(3, 32), "down": torch.zeros(32, 3)}
        wide = replace(adapter, changes={**adapter.changes, "model.layers.0.mlp.experts": added})
        with pytest.raises(UnsupportedFamilyError, match=r"adds an expert to model\.layers\.0.*--shared-width 0"):
            prepare_export(store, tmp_path / "out", PLAN, None, wide)


def replace_last(plan: Plan) -> Plan:
    return replace(plan, deep_experts=(*plan.deep_experts[:-1], PlannedExpert((5, 5))))
