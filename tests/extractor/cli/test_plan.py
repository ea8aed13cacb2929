import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from extractor.planning.plan import read_plan
from extractor.planning.plots import kept_mass_curve
from extractor.statistics.file import write_statistics
from extractor.statistics.price import PriceFit
from extractor.statistics.statistics import EncodingPoint
from router.ledger import UsageLedger
from tests.command_line import run
from tests.extractor.selection_statistics import DOMAINS, NUM_EXPERTS, NUM_LAYERS, make_statistics


def test_plan_writes_a_plan_a_picture_and_says_what_it_expects(tmp_path: Path) -> None:
    stats, out, picture = tmp_path / "stats.safetensors", tmp_path / "plan.json", tmp_path / "plan.png"
    write_statistics(stats, make_statistics())
    result = run("plan", "--stats", stats, "--keep", "50%", "--out", out, "--plot", picture)
    assert result.status == 0, result.err
    assert len(read_plan(out).deep_experts) == 4
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "4 of 8 deep experts of 3 layers" in result.out
    assert "code: " in result.out
    assert "of router mass served, expected loss +" in result.out


def test_a_budget_is_spent_on_the_encoding_that_costs_least(tmp_path: Path) -> None:
    stats, out = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    statistics = make_statistics()
    statistics.encodings = [EncodingPoint(name, "int4", 900, 0.003, 256) for name in DOMAINS]
    write_statistics(stats, statistics)
    result = run("plan", "--stats", stats, "--budget", "9kB", "--out", out)
    assert result.status == 0, result.err
    assert "8 of 8 deep experts of 3 layers in int4, a store of 8.0 KiB" in result.out
    assert "int4: 8 of 8 deep experts, 8.0 KiB, perplexity × 1.003" in result.out
    assert "shipped: 2 of 8 deep experts, 6.8 KiB, perplexity × " in result.out
    assert read_plan(out).experts_dtype == "int4"
    answer = json.loads(run("plan", "--stats", stats, "--budget", "9kB", "--out", out, "--json").out)
    assert [one["experts_dtype"] for one in answer["alternatives"]] == ["int4", "shipped"]
    write_statistics(stats, make_statistics())
    assert "NOTE: experts as calibrated" in run("plan", "--stats", stats, "--budget", "9kB", "--out", out).err


def test_a_plan_that_will_be_bad_is_said_to_be(tmp_path: Path) -> None:
    stats, out = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    write_statistics(stats, make_statistics())
    result = run("plan", "--stats", stats, "--count", "1", "--out", out)
    assert result.status == 0
    assert "WARNING: masked to this plan, 2 of 2 domains are expected to lose more than perplexity" in result.err
    assert "code the most" in result.err
    good = run("plan", "--stats", stats, "--count", "8", "--out", out)
    assert "WARNING" not in good.err


def test_statistics_are_added_up_and_usage_and_quotas_taken(tmp_path: Path) -> None:
    for name, domains in (("a", ("code",)), ("b", ("chat",))):
        write_statistics(tmp_path / name, make_statistics(domains=domains))
    ledger = UsageLedger(NUM_LAYERS, NUM_EXPERTS, "sha")
    ledger.demand_mass[:, 7] = 1e6
    (tmp_path / "usage.json").write_text(json.dumps(ledger.to_json()))
    out = tmp_path / "plan.json"
    arguments = ["--stats", tmp_path / "a", "--stats", tmp_path / "b", "--usage", tmp_path / "usage.json"]
    result = run("plan", *arguments, "--budget", "13kB", "--quota", "code=0.5", "--out", out, "--json")
    assert result.status == 0, result.err
    answer = json.loads(result.out)
    assert answer["num_deep_experts"] == 4
    assert [item["domain"] for item in answer["expected"]] == ["code", "chat"]
    assert all(7 in [deep.experts[layer] for deep in read_plan(out).deep_experts] for layer in range(NUM_LAYERS))


def test_mistakes_are_one_message_and_status_2(tmp_path: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    write_statistics(stats, make_statistics())
    for arguments, message in (
        (["--count", "2", "--quota", "code"], "--quota 'code': wanted a domain and a share"),
        (["--count", "2", "--criterion", "magic"], "criterion 'magic' does not exist"),
        ([], "give exactly one of --count, --keep and --budget"),
        (["--count", "2", "--domains", "poems"], "domain 'poems' is not in the statistics"),
        (["--count", "0"], "--count is 0, wanted 1 to 8"),
        (["--budget", "1kB"], "--budget of 1000 bytes does not hold the trunk and one deep expert, which take"),
        (["--count", "2", "--plot", tmp_path / "plan.xyz"], "wanted a name that ends in .png, .svg or .pdf"),
        (["--count", "2", "--out", tmp_path], f"--out {tmp_path} is a directory"),
        (["--count", "2", "--out", stats / "plan.json"], f"{stats} is a file"),
        (["--count", "2", "--stats", tmp_path / "absent"], "absent: No such file or directory; check the path"),
        (["--count", "2", "--stats", tmp_path], f"{tmp_path}: Is a directory; check the path"),
    ):
        result = run("plan", "--stats", stats, "--out", tmp_path / "plan.json", *arguments)
        assert result.status == 2
        assert result.err.startswith("error: ")
        assert message in result.err
    assert not (tmp_path / "plan.json").exists()


def test_a_fit_that_explains_nothing_is_told_by_its_error_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = tmp_path / "stats.safetensors"
    write_statistics(stats, make_statistics())
    price = SimpleNamespace(fit=PriceFit(-12.4, 0.003, 6))
    monkeypatch.setattr("extractor.cli.plan.Price", SimpleNamespace(from_json=lambda document: price))
    result = run("plan", "--stats", stats, "--count", "2", "--out", tmp_path / "plan.json")
    assert "expected losses are off by 0.003 nats on unseen text" in result.out
    assert "R²" not in result.out


def test_the_curve_of_kept_mass_rises_from_nothing_to_all() -> None:
    statistics = make_statistics()
    shares = statistics.demand_shares("code")
    curve = kept_mass_curve(shares, shares)
    assert curve[0] == 0.0
    assert np.isclose(curve[-1], 1.0)
    assert np.all(np.diff(curve, 2) <= 1e-12)
