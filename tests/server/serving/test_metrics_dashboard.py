"""Every query of the dashboard and every alert is about metrics that the server exports, and promtool can read it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.serving.exposition import LABEL
from tests.server.api.running import running

REPOSITORY = Path(__file__).parents[3]
DOCKER = REPOSITORY / "docker"
ALERTS: dict[str, Any] = yaml.safe_load((DOCKER / "alerts.yml").read_text())
DASHBOARD: dict[str, Any] = json.loads((DOCKER / "grafana" / "dashboards" / "deepfew.json").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())


def queries() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of every panel and alert."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "5m")
    for rule in ALERTS["groups"][0]["rules"]:
        yield rule["alert"], rule["expr"]


@pytest.fixture(scope="module")
def samples() -> dict[str, set[str]]:
    """Every sample that the server exports, with the labels of any of them."""
    with running() as server, server.client() as client:
        client.post("/generate", json={"inputs": "a"})
        text = client.get("/metrics").text
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r"(\w+)=", labels))
    return found


def test_every_query_names_exported_metrics_and_labels(samples: dict[str, set[str]]) -> None:
    for where, query in queries():
        names = set(re.findall(r"\bdeepfew_\w+", query))
        assert names <= set(samples), where
        labels = set().union(*(samples[name] for name in names), {"instance", "job", LABEL})
        for group in re.findall(r"by \(([\w, ]+)\)", query):
            assert set(group.replace(" ", "").split(",")) <= labels, where
        for label, wanted in re.findall(r'(\w+)="(\w+)"', query):
            assert label in labels, (where, wanted)


def test_dashboard_shows_what_an_operator_asks_for() -> None:
    text = " ".join(query for _, query in queries())
    for name in (
        *("request_seconds", "time_to_first_token_seconds", "inter_token_seconds", "generated_tokens_total"),
        *("requests_waiting", "expert_hits_total", "expert_fetch_bytes_total", "layer_deficit_ratio"),
        *("experts_resident", "kv_used_tokens", "store_errors_total", "experts_corrupt"),
        *("request_expected_loss_nats_sum", "top1_missing_tokens_total", "masked_request_deficit_ratio_sum"),
        *("store_bytes", "growth_failures_total"),
    ):
        assert f"deepfew_{name}" in text
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_compose_provisions_the_dashboard_and_the_alerts() -> None:
    grafana, prometheus = COMPOSE["services"]["grafana"], COMPOSE["services"]["prometheus"]
    for volume in (*grafana["volumes"], *prometheus["volumes"]):
        source = volume.partition(":")[0]
        assert (REPOSITORY / source).exists() if source.startswith("./") else source in COMPOSE["volumes"], volume
    provider = yaml.safe_load((DOCKER / "grafana/provisioning/dashboards/deepfew.yml").read_text())
    folder = provider["providers"][0]["options"]["path"]
    assert f"./docker/grafana/dashboards:{folder}:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{folder}/deepfew.json"
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}
    assert all(port.startswith("127.0.0.1:") for port in grafana["ports"])
    assert yaml.safe_load((DOCKER / "prometheus.yml").read_text())["rule_files"] == ["alerts.yml"]


def promtool(*arguments: str, cwd: Path) -> None:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    done = subprocess.run([found, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_reads_every_query_and_alert(tmp_path: Path) -> None:
    promtool("check", "rules", "alerts.yml", cwd=DOCKER)
    rules = [{"record": f"query:{number}", "expr": query} for number, (_, query) in enumerate(queries())]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", "queries.yml", cwd=tmp_path)


@pytest.mark.parametrize(
    ("alert", "series"),
    [
        ("DeepfewDown", {'up{job="deepfew"}': "0x60"}),
        ("DeepfewUnhealthy", {"deepfew_healthy": "0x60"}),
        ("DeepfewNotReady", {"deepfew_ready": "0x60"}),
        ("DeepfewStalled", {"deepfew_requests_running": "1x60", "deepfew_engine_idle_seconds": "0+60x60"}),
        ("DeepfewStoreErrors", {'deepfew_store_errors_total{kind="corrupt"}': "0x25 1+1x34"}),
        (
            "DeepfewRefusing",
            {
                'deepfew_requests_total{outcome="refused",instance="a"}': "0+2x60",
                'deepfew_requests_total{outcome="length",instance="a"}': "0+8x60",
            },
        ),
        (
            "DeepfewSlowFirstToken",
            {
                'deepfew_time_to_first_token_seconds_bucket{le="30.0",instance="a"}': "0+9x60",
                'deepfew_time_to_first_token_seconds_bucket{le="60.0",instance="a"}': "0+10x60",
                'deepfew_time_to_first_token_seconds_bucket{le="+Inf",instance="a"}': "0+10x60",
            },
        ),
        (
            "DeepfewExpensiveMask",
            {
                'deepfew_request_expected_loss_nats_sum{instance="a"}': "0+9x60",
                'deepfew_request_expected_loss_nats_count{instance="a"}': "0+10x60",
            },
        ),
        ("DeepfewGrowthFails", {"deepfew_growth_failures_total": "0x25 1x34"}),
    ],
)
@pytest.mark.parametrize("is_wrong", [True, False])
def test_alert_fires_when_something_is_wrong_and_only_then(
    alert: str, series: dict[str, str], is_wrong: bool, tmp_path: Path
) -> None:
    if not is_wrong:
        healthy = {"up": "1x60", "deepfew_healthy": "1x60", "deepfew_ready": "1x60"}
        series = {name: next((v for key, v in healthy.items() if name.startswith(key)), "0x60") for name in series}
    names = [f"{rule['alert']}" for rule in ALERTS["groups"][0]["rules"]]
    assert alert in names
    test = {
        "rule_files": [str(DOCKER / "alerts.yml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)',
                        "eval_time": "50m",
                        "exp_samples": [{"labels": "{}", "value": int(is_wrong)}],
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    promtool("test", "rules", "test.yml", cwd=tmp_path)


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    tested = {mark.args[1][at][0] for mark in _marks() for at in range(len(mark.args[1]))}
    for rule in ALERTS["groups"][0]["rules"]:
        assert rule["alert"] in tested
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]


def _marks() -> list[pytest.Mark]:
    marks: list[pytest.Mark] = test_alert_fires_when_something_is_wrong_and_only_then.pytestmark  # type: ignore[attr-defined]
    return [mark for mark in marks if mark.args[0] == ("alert", "series")]
