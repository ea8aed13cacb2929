"""Writing a pruned checkpoint: what is refused, what a killed export leaves, dtypes, files and the card."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from expert_store.errors import ShardCorruptError
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.errors import SelectionError, TargetError
from extractor.exporting import export
from extractor.exporting.export import prepare_export
from extractor.planning.plan import Plan, PlannedExpert
from extractor.planning.planner import PlanRequest, make_plan
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from tests.extractor.checkpoints import NUM_EXPERTS
from tests.extractor.selection_statistics import make_statistics


def store_of(checkpoint: Path, where: Path, experts: str = "0-3") -> Store:
    prepare(Checkpoint.open(checkpoint), where, SelectionRequest(experts)).run()
    return Store.open(where)


@pytest.fixture
def store(qwen_checkpoint: Path, tmp_path: Path) -> Iterator[Store]:
    """Experts 0 to 3 of 6, in MoE layers 0 and 2."""
    with store_of(qwen_checkpoint, tmp_path / "store") as opened:
        yield opened


def plan_of(*deep_experts: tuple[int, int]) -> Plan:
    return Plan(2, NUM_EXPERTS, {"kind": "free"}, tuple(PlannedExpert(experts) for experts in deep_experts))


def test_weights_come_in_several_files_with_an_index_and_the_tokenizer_along(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MAX_FILE_BYTES", 20_000)
    seen: list[int] = []
    work = prepare_export(store, tmp_path / "out", plan_of((3, 0), (1, 2), (0, 1)), None)
    work.run(seen.append)
    assert sum(seen) == work.total_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (3, 2)
    whole = {name: value for path in store.path.glob("trunk/*.safetensors") for name, value in load_file(path).items()}
    assert torch.equal(model.model.layers[0].mlp.gate.weight, whole["model.layers.0.mlp.gate.weight"][[0, 1, 3]])
    assert torch.equal(model.model.layers[2].mlp.gate.weight, whole["model.layers.2.mlp.gate.weight"][[0, 1, 2]])
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_only_a_new_or_an_empty_directory_is_written_to(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    prepare_export(store, out, None, None).run()
    with pytest.raises(TargetError, match="is not empty"):
        prepare_export(store, out, None, None)
    with pytest.raises(TargetError, match="is a file"):
        prepare_export(store, out / "config.json", None, None)


def test_a_failed_export_leaves_nothing_and_a_killed_one_is_written_over(store: Store, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"

    def fail(num_bytes: int) -> None:
        assert not out.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_export(store, out, None, None).run(fail)
    assert not out.exists()
    assert not partial.exists()
    partial.mkdir()
    (partial / "model.safetensors.partial").write_bytes(b"of a killed export")
    prepare_export(store, out, None, None).run()
    assert not partial.exists()
    assert not list(out.glob("*.partial"))


def test_a_folder_of_somebody_else_and_a_running_export_are_left_alone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "photos").mkdir(parents=True)
    with pytest.raises(TargetError, match="holds folders, so no export left it"):
        prepare_export(store, tmp_path / "out", None, None).run()
    assert (tmp_path / "out.partial" / "photos").exists()

    def again(num_bytes: int) -> None:
        prepare_export(store, tmp_path / "other", None, None).run()

    with pytest.raises(TargetError, match="another export writes"):
        prepare_export(store, tmp_path / "other", None, None).run(again)


def test_a_damaged_trunk_is_not_exported(store: Store, tmp_path: Path) -> None:
    path = store.trunk_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardCorruptError, match=r"trunk/model\.safetensors"):
        prepare_export(store, tmp_path / "out", None, None).run()
    assert not (tmp_path / "out").exists()


def test_a_plan_must_name_experts_that_the_store_has(store: Store, tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match=r"1 experts that .* lacks, such as expert 5 of MoE layer 1"):
        prepare_export(store, tmp_path / "out", plan_of((0, 0), (1, 5)), None)
    with pytest.raises(SelectionError, match="the plan is for 3 layers"):
        prepare_export(store, tmp_path / "out", make_plan(make_statistics(), PlanRequest(count=2)), None)


def test_layers_with_different_numbers_are_refused_with_the_counts(store: Store, tmp_path: Path) -> None:
    store.exclude(1, 2)
    with pytest.raises(SelectionError, match=re.escape("have [4, 3] experts")):
        prepare_export(store, tmp_path / "out", None, None)


def test_experts_in_few_bits_are_dequantised_and_a_dtype_may_be_asked_for(
    packed_checkpoint: Path, tmp_path: Path
) -> None:
    """The same experts as from a store that dequantised them at extraction."""
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    prepare(Checkpoint.open(packed_checkpoint), tmp_path / "plain", SelectionRequest("0,3"), "16bit").run()
    found = {}
    with store_of(packed_checkpoint, tmp_path / "store", "0,3") as packed, Store.open(tmp_path / "plain") as plain:
        assert packed.manifest.layers[0].is_encoded
        for store, dtype in ((packed, None), (plain, None), (packed, "float32")):
            out = tmp_path / f"out {len(found)}"
            prepare_export(store, out, None, dtype).run()
            found[store.path.name, dtype] = load_file(out / "model.safetensors")
            assert json.loads((out / "config.json").read_text())["dtype"] == dtype or dtype is None
    assert torch.equal(found["store", None][name], found["plain", None][name])
    wide = found["store", "float32"]
    assert {value.dtype for value in wide.values()} == {torch.float32}
    assert torch.equal(wide[name].bfloat16(), found["store", None][name])
    assert torch.equal(wide["model.norm.weight"], found["store", None]["model.norm.weight"].float())
