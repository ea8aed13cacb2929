"""The card of a pruned checkpoint says what was kept, from where, and what that is expected to cost."""

from dataclasses import replace
from pathlib import Path

from expert_store.manifest import Manifest, read_manifest
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.exporting.card import model_card
from extractor.planning.plan import Plan, PlannedExpert
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare

EXPECTED = [
    {"domain": "code", "served_share": 0.9, "loss_change": 0.1, "is_measured": True},
    {"domain": "chat", "served_share": 0.5, "loss_change": 1.0, "is_measured": False},
]


def manifest_of(checkpoint: Path, where: Path) -> Manifest:
    prepare(Checkpoint.open(checkpoint), where, SelectionRequest("0-3")).run()
    return read_manifest(where)


def test_the_card_says_experts_plan_source_and_expected_loss(qwen_checkpoint: Path, tmp_path: Path) -> None:
    manifest = manifest_of(qwen_checkpoint, tmp_path / "store")
    alignment = {"kind": "coverage", "num_planned": 3, "expected": EXPECTED}
    experts = tuple(PlannedExpert(ids) for ids in ((0, 1), (1, 2), (3, 3)))
    plan = Plan(2, 6, alignment, experts, {"criterion": "reap-sum"})
    card = model_card(manifest, plan, [[0, 1, 3], [1, 2, 3]], 2)
    for text in (
        "# checkpoint with 3 of 6 experts",
        manifest.source.fingerprint[:16],
        "a plan by reap-sum; alignment coverage",
        "| code | 90.0% | × 1.105 |",
        "| chat | 50.0% | × 2.718 or more |",
        "| 0 | 0-1,3 |",
        "| 2 | 1-3 |",
        "Licence: that of checkpoint.",
    ):
        assert text in card
    assert "instead of" not in card
    fewer = model_card(manifest, plan, [[1], [2]], 1)
    assert "takes 1 of them instead of 2" in fewer
    assert "Expected" not in fewer, "the plan's figures are of another number of experts"


def test_the_licence_is_the_source_card_s(qwen_checkpoint: Path, tmp_path: Path) -> None:
    manifest = manifest_of(qwen_checkpoint, tmp_path / "store")
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nA model.\n")
    card = model_card(replace(manifest, source=replace(manifest.source, location=str(tmp_path))), None, [[0], [0]], 1)
    assert "\nlicense: apache-2.0\n" in card
    assert "Licence: that of checkpoint, apache-2.0." in card
