"""A checkpoint whose config names code of its own is read as transformers' model of the architecture that it names.

The files have the shape of the published Kimi-K2: DeepSeek-V3 under another model type, keys of older releases of
transformers, and Python files, which must never run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.errors import CheckpointError, UnsupportedFamilyError
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from tests.extractor.checkpoints import write_tokenizer
from tests.families.checkpoints import NUM_EXPERTS, random_model
from tests.families.serving import PROMPTS, assembled, assert_same, served_logits, stock_logits

YARN = {
    "factor": 8.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
OWN = {
    "model_type": "kimi_k2",
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "rope_scaling": {"type": "yarn", **YARN},
    "rope_theta": 5e4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "ep_size": 1,
    "seq_aux": True,
}


def edit(path: Path, **keys: Any) -> None:
    """Sets keys of a JSON file; those that are None are removed."""
    content = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("deepseek_v3", rope_parameters={"rope_type": "yarn", "rope_theta": 5e4, **YARN}, n_group=1)


@pytest.fixture
def checkpoint(model: Any, tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    model.save_pretrained(directory)
    write_tokenizer(directory)
    edit(directory / "config.json", rope_parameters=None, **OWN)
    edit(
        directory / "tokenizer_config.json",
        tokenizer_class="TikTokenTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    )
    for name in ("configuration_deepseek", "modeling_deepseek", "tokenization_kimi"):
        (directory / f"{name}.py").write_text("raise SystemExit('code of a checkpoint ran')")
    return directory


def test_it_is_extracted_and_served_as_the_model_of_its_architecture(
    model: Any, checkpoint: Path, tmp_path: Path
) -> None:
    work = prepare(Checkpoint.open(checkpoint), tmp_path / "store", SelectionRequest())
    assert any("model_type kimi_k2" in note and "read as deepseek_v3" in note for note in work.notes)
    work.check_text()
    work.run()
    store = Store.open(tmp_path / "store")
    assert store.manifest.model.family == "deepseek_v3"
    kept = {path.name: path.read_text() for path in store.trunk_path.iterdir() if path.suffix == ".json"}
    assert json.loads(kept["config.json"])["model_type"] == "deepseek_v3"
    assert not any("auto_map" in content for content in kept.values())
    assert not any(path.suffix == ".py" for path in store.trunk_path.iterdir())
    selective = assembled(store, NUM_EXPERTS // 2)
    for ours, prompt in zip(served_logits(selective, [None] * len(PROMPTS)), PROMPTS, strict=True):
        assert_same(ours, stock_logits(model, prompt))
    selective.close()


def test_an_extraction_that_was_finished_has_nothing_left_to_do(checkpoint: Path, tmp_path: Path) -> None:
    prepare(Checkpoint.open(checkpoint), tmp_path / "store", SelectionRequest()).run()
    assert prepare(Checkpoint.open(checkpoint), tmp_path / "store", SelectionRequest()).is_finished


@pytest.mark.parametrize("keys", [{"auto_map": None}, {"architectures": ["OwnForCausalLM"]}])
def test_a_model_type_that_nothing_explains_is_refused(keys: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    """Without code of its own, the type may be one of a later transformers, which may compute something else."""
    edit(checkpoint / "config.json", **keys)
    with pytest.raises(UnsupportedFamilyError, match="does not know the family 'kimi_k2'"):
        prepare(Checkpoint.open(checkpoint), tmp_path / "store", SelectionRequest())


def test_a_tokenizer_that_needs_code_of_its_own_is_refused_with_what_to_do(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "tiktoken.model").write_text("IQ== 0\nIg== 1\n")
    work = prepare(Checkpoint.open(checkpoint), tmp_path / "store", SelectionRequest())
    with pytest.raises(CheckpointError, match=r"tiktoken\.model.* put a tokenizer\.json that was made from both"):
        work.check_text()
