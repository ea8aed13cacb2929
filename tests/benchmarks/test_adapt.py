"""The benchmark of adapters: a run is one file of jobs, continues where it was cut, and keeps no memory of its jobs."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from benchmarks import adapt
from benchmarks.adapt import Job, Run, Work

KINDS = ("geography", "math_qa")
TRAINED = {"tokens": 64, "batch_tokens": 64, "points": 1, "rank": 2, "shared_width": 4}


@pytest.fixture(scope="module")
def small_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE of two layers with the bundled checkpoint's tokenizer."""
    path = tmp_path_factory.mktemp("small") / "checkpoint"
    config = Qwen3MoeConfig(
        vocab_size=8192, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
        max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(path)
    return path


@pytest.fixture
def arguments(small_checkpoint: Path, tmp_path: Path) -> list[str]:
    """Of a run that leaves nothing outside `tmp_path`."""
    questions = tmp_path / "geography.jsonl"
    questions.write_text('{"prompt": "The capital of France is", "answer": " Paris"}\n')
    texts = []
    for kind in KINDS:
        path = tmp_path / f"{kind}.txt"
        path.write_text((adapt.DATA / "selection" / path.name).read_text()[:4000])
        texts.append(str(path))
    return [
        *("--checkpoint", str(small_checkpoint), "--texts", *texts, "--questions", str(questions)),
        *("--work", str(tmp_path / "work"), "--results", str(tmp_path / "adapt.json")),
        *("--jobs", str(tmp_path / "jobs")),
    ]


def run(tmp_path: Path, arguments: list[str], jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results after running the jobs."""
    about = {"name": "one", "generated_tokens": 128, "held_out_tokens": 64, "context": 32, "jobs": jobs}
    (tmp_path / "jobs").write_text(json.dumps(about))
    adapt.main(arguments)
    (found,) = json.loads((tmp_path / "adapt.json").read_text())["runs"]
    assert (found["name"], found["checkpoint"], found["num_held_out_tokens"]) == ("one", "checkpoint", 128)
    rows: list[dict[str, Any]] = found["results"]
    return rows


def test_every_part_is_measured_and_a_complete_job_is_not_run_again(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"checkpoint": "checkpoint"}
    jobs = [
        {"name": "none", "part": "pools", "tokens": 0, "choice": ["gate-mass", "reap"], "asks": True, **one},
        {"name": "int8", "part": "together", "share": 0.5, "tokens": 0, "encoding": "int8", **one},
        {"name": "pools", "part": "pools", **TRAINED, **one},
        {"name": "plan", "part": "plan", "kind": ["geography", "chat"], "share": 0.25, "experts": True, "asks": True}
        | one
        | TRAINED,
        {"name": "elsewhere", "part": "pools", "checkpoint": "other"},
    ]
    rows = {row["name"]: row for row in run(tmp_path, arguments, jobs)}
    assert "jobs of chat, other are left out" in capsys.readouterr().out
    assert set(rows) == {"none-gate-mass", "none-reap", "int8", "pools", "plan-geography"}
    assert all(row["complete"] and "error" not in row for row in rows.values())
    for name in ("none-gate-mass", "none-reap"):
        assert [(case["share"], case["bytes"]) for case in rows[name]["cases"]] == [(s, s) for s in adapt.SHARES]
        assert rows[name]["questions"].keys() == {"1.0", "0.5", "0.25", "0.125"}
    assert rows["none-gate-mass"]["cases"] != rows["none-reap"]["cases"]
    (encoded,) = rows["int8"]["cases"]
    assert encoded["bytes"] == pytest.approx(0.5 * 8.125 / 16, abs=1e-4)
    assert [case["part"] for case in rows["pools"]["cases"]] == ["none"] * 3 + ["pools"] * 3
    assert rows["plan-geography"]["questions"] == {"0.25": {"geography": 0.0}}
    assert rows["plan-geography"]["num_parameters"] > rows["pools"]["num_parameters"]
    before, after = rows["plan-geography"]["cases"]
    assert before["mean_ratio"] != after["mean_ratio"] == rows["plan-geography"]["curve"][-1]["ratios"]["0.25"]

    jobs[2]["seed"] = 1
    again = {row["name"]: row for row in run(tmp_path, arguments, jobs)}
    assert "1 of 7 jobs to do; 4 are in" in capsys.readouterr().out
    assert again.pop("pools")["curve"] != rows.pop("pools")["curve"]
    assert again == rows


def test_a_job_that_failed_is_told_and_run_again(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"name": "none", "part": "pools", "tokens": 0, "checkpoint": "checkpoint"}

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Work, "_measure", fail)
        (row,) = run(tmp_path, arguments, [job])
    assert not row["complete"]
    assert "RuntimeError: out of memory" in capsys.readouterr().out
    (row,) = run(tmp_path, arguments, [job])
    assert row["complete"]
    assert "error" not in row


def test_a_job_leaves_no_tensor_of_its_training(arguments: list[str], tmp_path: Path) -> None:
    values = adapt._arguments(arguments)
    jobs = [Job(f"pools-{seed}", "checkpoint", "pools", seed=seed, **TRAINED) for seed in range(2)]  # type: ignore[arg-type]
    jobs += [Job("plan", "checkpoint", "together", share=0.25, experts=True, **TRAINED)] * 2  # type: ignore[arg-type]
    work = Work(Run("one", tuple(jobs), 128, 64, 32), values, {})
    gc.disable()  # a job frees by itself
    try:
        counts = []
        for job in jobs:
            assert work.do(job)["complete"]
            counts.append(sum(isinstance(one, torch.Tensor) for one in gc.get_objects()))
    finally:
        gc.enable()
    work.close()
    assert counts[0] == counts[1]
    assert counts[2] == counts[3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"part": "plan", "kind": "geography"}, "a plan has a kind and a share"),
        ({"part": "pool"}, "got part pool"),
        ({"part": "pools", "encoding": "int4"}, "set tokens 0"),
        ({"part": "pools", "experts": True}, "set part plan or together"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Job("odd", "checkpoint", **fields)
    assert "job odd" in str(caught.value)


def test_the_published_runs_can_be_read() -> None:
    runs = [Run.read(path) for path in sorted((adapt.DATA / "adapt").glob("*.json"))]
    assert len({run.name for run in runs}) == len(runs) >= 3
    for one in runs:
        names = [(job.checkpoint, job.name) for job in one.jobs]
        assert len(set(names)) == len(names)
