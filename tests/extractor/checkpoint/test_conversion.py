"""The seam to transformers' loading: it is where we expect it, and one expert at a time converts as all at once.

When a new transformers moves a name, `test_the_internals_are_where_they_were` says which.
"""

import importlib
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose, WeightConverter

from extractor.checkpoint.checkpoint import Checkpoint
from extractor.checkpoint.conversion import Recipe, trace
from extractor.checkpoint.layout import ExpertsLayout, _expert_part, convert_expert
from extractor.checkpoint.tensor_file import CopiedPiece
from extractor.errors import CheckpointError
from tests.extractor.checkpoints import NUM_EXPERTS

INTERNALS = {
    "transformers.conversion_mapping": {"get_model_conversion_mapping": ["model"]},
    "transformers.core_model_loading": {
        "rename_source_key": [
            "source_key",
            "weight_renamings",
            "weight_converters",
            "base_model_prefix",
            "meta_state_dict",
        ],
        "dot_natural_key": [],
        "WeightRenaming": ["source_patterns", "target_patterns"],
        "WeightConverter": ["source_patterns", "target_patterns", "operations"],
        "MergeModulelist": ["dim"],
        "Concatenate": ["dim"],
    },
}


@pytest.mark.parametrize("module", INTERNALS)
def test_the_internals_are_where_they_were(module: str) -> None:
    found = importlib.import_module(module)
    for name, parameters in INTERNALS[module].items():
        assert hasattr(found, name), f"{module}.{name} is gone: conversion.py relies on it"
        signature = list(inspect.signature(getattr(found, name)).parameters)
        missing = [parameter for parameter in parameters if parameter not in signature]
        assert not missing, f"{module}.{name} no longer takes {missing}: conversion.py relies on it"


def test_experts_modules_carry_the_marks_of_the_registry(family_checkpoint: Path) -> None:
    found = trace(family_checkpoint, Checkpoint.open(family_checkpoint).tensors)
    assert found.experts, "transformers' experts modules are no longer marked: conversion.py relies on it"
    for recipes in found.experts.values():
        assert [recipe.parameter.rpartition(".")[2] for recipe in recipes] == ["gate_up_proj", "down_proj"]
        assert all(recipe.shape[0] == NUM_EXPERTS and recipe.is_concatenation for recipe in recipes)


def test_every_key_goes_to_the_experts_or_to_the_trunk(family_checkpoint: Path) -> None:
    keys = Checkpoint.open(family_checkpoint).tensors
    found = trace(family_checkpoint, keys)
    parts = (recipe.keys.values() for recipes in found.experts.values() for recipe in recipes)
    routed = [key for groups in parts for group in groups for key in group]
    assert sorted([*routed, *found.trunk]) == sorted(keys)


def test_a_missing_expert_tensor_is_told(family_checkpoint: Path) -> None:
    keys = Checkpoint.open(family_checkpoint).tensors
    down = [key for key in keys if ".experts." in key and (".down_proj" in key or ".w2" in key) and ".layers.0." in key]
    with pytest.raises(CheckpointError, match=r"no tensor of the checkpoint becomes .*down_proj"):
        trace(family_checkpoint, {key: entry for key, entry in keys.items() if key not in down})


def test_converting_one_expert_equals_copying_its_bytes(family_checkpoint: Path) -> None:
    layout = ExpertsLayout.of(Checkpoint.open(family_checkpoint))
    for layer, expert in ((0, 0), (1, NUM_EXPERTS - 1)):
        copied = b""
        for piece in layout.span(layer, expert):
            assert isinstance(piece, CopiedPiece)
            copied += piece.source.path.read_bytes()[piece.offset : piece.offset + piece.num_bytes]
        converted = b""
        for recipe in layout.recipes[layer]:
            sources = [
                (pattern, *_expert_part(layout.checkpoint, recipe, pattern, expert))
                for pattern in recipe.source_patterns
            ]
            converted += bytes(convert_expert(recipe, sources))
        assert converted == copied


CHAINS: dict[str, tuple[list[Any], bool, int, tuple[int, ...]]] = {
    # operations, whether each expert has tensors of its own, number of sources, one expert's shape in memory
    "transposed rows": ([Transpose(1, 2)], False, 1, (5, 4)),
    "transposed where needed": ([Transpose(1, 2, check_dims=True)], False, 1, (5, 4)),
    "not transposed where not needed": ([Transpose(1, 2, check_dims=True)], False, 1, (4, 5)),
    "interleaved rows": ([Interleave(dim=1)], False, 1, (4, 5)),
    "merged": ([MergeModulelist(dim=0)], True, 1, (4, 5)),
    "merged and concatenated": ([MergeModulelist(dim=0), Concatenate(dim=1)], True, 2, (8, 5)),
    "merged, concatenated along the last axis": ([MergeModulelist(dim=0), Concatenate(dim=2)], True, 2, (4, 10)),
    "merged, concatenated, transposed": (
        [MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)],
        True,
        2,
        (5, 8),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_one_expert_converts_as_all_at_once(name: str) -> None:
    operations, separate, num_sources, shape = CHAINS[name]
    patterns = [f"source{i}" for i in range(num_sources)]
    stacked = {pattern: torch.randn(3, 4, 5) for pattern in patterns}
    parameter = "target.experts"

    class Model:
        def get_parameter(self, name: str) -> torch.Tensor:
            return torch.empty(3, *shape)

    converter = WeightConverter(patterns, parameter, operations)
    for pattern, tensor in stacked.items():
        converter.collected_tensors[pattern] = list(tensor) if separate else [tensor]
    (wanted,) = converter.convert(parameter, model=Model()).values()
    recipe = Recipe(
        parameter=parameter,
        shape=(3, *shape),
        keys=dict.fromkeys(patterns, ("k",)),
        operations=tuple(operations),
        source_patterns=tuple(patterns),
        target_patterns=(parameter,),
        config=None,
        is_transposed=False,
    )
    for expert in range(3):
        found = recipe.convert({pattern: tensor[expert] for pattern, tensor in stacked.items()})
        assert torch.equal(found, wanted[expert])
    assert recipe.is_concatenation == (name in ("merged", "merged and concatenated"))


def test_a_conversion_to_another_shape_is_told() -> None:
    recipe = Recipe("p", (3, 4, 5), {"s": ("k",)}, (Transpose(1, 2),), ("s",), ("p",), None, False)
    with pytest.raises(CheckpointError, match=r"do not fit its config\.json"):
        recipe.convert({"s": torch.randn(4, 5)})


def test_a_config_that_transformers_refuses_is_one_error(qwen_checkpoint: Path, tmp_path: Path) -> None:
    config = (qwen_checkpoint / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"hidden_size": 32', '"hidden_size": "wide"'))
    with pytest.raises(CheckpointError, match="transformers cannot build the model"):
        trace(tmp_path, {})


def _with_config(checkpoint: Path, directory: Path, **changes: Any) -> Path:
    """A copy of `checkpoint` whose config.json has `changes`."""
    shutil.copytree(checkpoint, directory)
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 10**8}, {"num_hidden_layers": 1e8}, {"vision_config": {"depth": 10**8}}]
)
def test_a_config_with_layers_without_end_is_refused_at_once(
    qwen_checkpoint: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: .* wanted at most 4096"):
        trace(_with_config(qwen_checkpoint, tmp_path / "deep", **changes), {})


def test_a_config_that_gives_a_token_more_experts_than_there_are_is_refused(
    qwen_checkpoint: Path, tmp_path: Path
) -> None:
    damaged = _with_config(qwen_checkpoint, tmp_path / "damaged", num_experts_per_tok=NUM_EXPERTS + 1)
    with pytest.raises(CheckpointError, match=rf"gives every token {NUM_EXPERTS + 1} experts of {NUM_EXPERTS}"):
        ExpertsLayout.of(Checkpoint.open(damaged))
