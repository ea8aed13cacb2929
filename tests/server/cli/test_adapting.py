"""`deepfew adapt`, `attach` and `detach` as a user types them, and `evaluate` with what they made."""

import json
import shutil
from pathlib import Path

from expert_store.manifest import read_manifest
from extractor.planning.plan import Plan, PlannedExpert, write_plan
from extractor.writing.verify import compared_bytes
from tests.command_line import run


def test_from_texts_to_an_adapter_that_evaluate_and_a_store_know(
    small_store: Path, stories: Path, tmp_path: Path
) -> None:
    store, plan, out = tmp_path / "store", tmp_path / "plan.json", tmp_path / "half.safetensors"
    shutil.copytree(small_store, store)
    write_plan(plan, Plan(2, 8, {"kind": "index"}, tuple(PlannedExpert((expert, expert)) for expert in range(4))))
    small = ["--texts", stories, "--context", "48", "--max-tokens", "480"]
    ended = run(
        "adapt", store, *small, "--plan", plan, "--out", out, "--tokens", "192", "--batch-tokens", "96", "--json"
    )
    assert ended.status == 0, ended.err
    assert "numbers to train on" in ended.err
    assert "without the adapter" in ended.err
    assert json.loads(ended.out)["ratios"][-1][0] == 2
    assert not list(tmp_path.glob("*.resume"))
    assert run("attach", store, out).out == f"{store} has the adapter half\n"
    assert "half" in run("inspect", store).out
    assert "'' names no adapter" in run("attach", store, out, "--name", "").err
    exported = run("export", store, tmp_path / "exported", "--plan", plan, "--adapter", "whole")
    assert exported.status == 2
    assert "whole is no adapter of the store, which has half" in " ".join(exported.err.split())

    def evaluated(*options: object) -> tuple[str | None, float]:
        report = json.loads(run("evaluate", store, *small, "--plan", plan, "--json", *options).out)
        (text,) = report["texts"].values()
        return report["adapter"], text["loss"]

    name, loss = evaluated()
    assert name == "half"
    assert evaluated("--adapter", "none") == (None, evaluated("--adapter", "none")[1])
    assert evaluated("--adapter", "none")[1] != loss
    refused = run("evaluate", store, *small, "--adapter", "half")
    assert refused.status == 2
    assert "no mask is measured" in refused.err
    assert run("detach", store, "half").status == 0
    assert not read_manifest(store).adapters


def test_work_that_cannot_be_done_is_refused_before_it_begins(
    small_store: Path, few_small_store: Path, stories: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "a.safetensors", tmp_path / "other.json"
    experts = tuple(PlannedExpert((expert, expert)) for expert in range(4))
    write_plan(other, Plan(2, 8, {"kind": "index"}, experts, {"fingerprint": "another"}))
    for arguments, reason in (
        ((small_store, "--out", out), "nothing to train on"),
        ((few_small_store, "--out", out, "--texts", stories), "the whole model is the teacher"),
        ((small_store, "--out", out, "--texts", stories, "--pools", "half"), "--pools"),
        ((small_store, "--out", out, "--texts", stories, "--pools", "100%:50%"), "the smaller one first"),
        ((small_store, "--out", out, "--texts", stories, "--pools", "50%", "--plan", out), "contradict"),
        ((small_store, "--out", out, "--texts", stories, "--plan", other), "made for the checkpoint another"),
        ((small_store, "--out", out, "--texts", stories, "--shared-width", 10**9), "less than or equal to 65536"),
    ):
        ended = run("adapt", *arguments, "--context", "48")
        assert ended.status == 2
        assert reason in " ".join(ended.err.split())
    assert not out.exists()


def test_trained_experts_become_a_store_that_is_verified_inspected_evaluated_and_exported(
    small_store: Path, stories: Path, tmp_path: Path
) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "trained"
    write_plan(plan, Plan(2, 8, {"kind": "index"}, tuple(PlannedExpert((expert, 7 - expert)) for expert in range(4))))
    small = ["--texts", stories, "--context", "48", "--max-tokens", "480"]
    training = ["--tokens", "192", "--batch-tokens", "96", "--rate", "1e-2", "--shared-width", "0"]
    command = ["adapt", small_store, *small, *training, "--plan", plan, "--experts", "--out", out]
    ended = run(*command)
    assert ended.status == 0, ended.err
    assert "becomes a new store of the 4 deep experts" in " ".join(ended.err.split())
    verified = json.loads(run("verify", out, "--json").out)
    assert verified["verified_bytes"] == compared_bytes(read_manifest(out))
    assert "with the adapter trained; they were those of checkpoint" in run("inspect", out).out
    report = json.loads(run("evaluate", out, *small, "--reference", small_store, "--json").out)
    assert report["adapter"] == "trained"
    exported = run("export", out, tmp_path / "exported")
    assert exported.status == 0
    assert "NOTE: the adapter trained is merged" in exported.err
    again = run(*command)
    assert again.status == 2
    assert "is a store, and trained experts make a new store" in " ".join(again.err.split())
    unplanned = run("adapt", small_store, *small, "--experts", "--out", tmp_path / "other")
    assert unplanned.status == 2
    assert "give --plan" in unplanned.err
