"""Vision-language and omni checkpoints are served as the text models that they contain.

The towers are tiny; what is under test is that the text part's experts are found in the composite checkpoint and that
text alone gives the logits that transformers' composite model gives.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

from expert_store.store import Store
from extractor.errors import UnsupportedFamilyError
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from router.mask import ExpertMask
from tests.families.checkpoints import NUM_EXPERTS, moe_blocks
from tests.families.composites import TEXT_PARTS, as_omni, composite_model
from tests.families.pruning import pruned_model
from tests.families.serving import PROMPTS, assembled, assert_same, checkpoint_of, served_logits, stock_logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", [name for name in TEXT_PARTS if name in CONFIG_MAPPING])
def test_text_part_is_served_as_the_composite_model_computes_it(
    model_type: str, tmp_path: Path, repository: Path
) -> None:
    model = composite_model(model_type)
    directory = tmp_path / "checkpoint"
    checkpoint = checkpoint_of(model, directory, repository)
    if model_type == "qwen3_omni_moe_thinker":
        as_omni(directory)
        checkpoint = type(checkpoint).open(directory)
    try:
        prepare(checkpoint, tmp_path / "store", SelectionRequest()).run()
    except UnsupportedFamilyError as error:
        if transformers.__version__.startswith("5.17."):
            pytest.skip(str(error))
        raise
    store = Store.open(tmp_path / "store")
    trunk = {path.name for path in store.trunk_path.iterdir()}
    assert "config.json" in trunk
    assert not any(
        name.startswith(("talker", "code2wav")) for name in load_file(store.trunk_path / "model.safetensors")
    )
    num_layers = store.manifest.model.num_layers
    selective = assembled(store, NUM_EXPERTS // 2)
    for ours, prompt in zip(served_logits(selective, [None] * len(PROMPTS)), PROMPTS, strict=True):
        assert_same(ours, stock_logits(model, prompt))
    kept = [1, 3, 5, 6]
    if not hasattr(moe_blocks(model)[0][1], "num_group"):
        mask = ExpertMask.same_in_every_layer(kept, num_layers, NUM_EXPERTS)
        pruned = pruned_model(model, [kept] * num_layers)
        assert pruned is not None
        assert_same(served_logits(selective, [mask] * len(PROMPTS))[0], stock_logits(pruned, PROMPTS[0]))
    selective.close()
