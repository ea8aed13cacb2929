"""The metrics: names, units, labels and values, held against promtool where it is installed."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.server.api.running import running
from tests.server.api.scripted import EXPERTS, LAYERS

Families = dict[str, Metric]


@pytest.fixture(scope="module")
def pages() -> tuple[str, str]:
    """`/metrics` and `/metrics/vllm` after two requests."""
    with running() as server, server.client() as client:
        client.post("/generate", json={"inputs": "a"})
        client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 2}, "stream": True})
        client.post("/generate", json={"inputs": ""})
        return client.get("/metrics").text, client.get("/metrics/vllm").text


@pytest.fixture(scope="module")
def families(pages: tuple[str, str]) -> Families:
    return {family.name: family for family in text_string_to_metric_families(pages[0])}


def value(families: Families, name: str, **labels: str) -> float:
    """The one sample of that name with these labels."""
    samples = [sample for family in families.values() for sample in family.samples]
    found = [sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def test_names_are_ours_with_base_units_and_without_created_series(families: Families) -> None:
    for family in families.values():
        assert family.name.startswith("deepfew_")
        assert family.documentation.endswith(".")
        assert not family.name.endswith(("_total", "_milliseconds", "_ms", "_percent", "_mb", "_created"))
        for sample in family.samples:
            assert not sample.name.endswith("_created")
            if family.type == "counter":
                assert sample.name.endswith("_total")


def test_labels_are_bounded(families: Families) -> None:
    allowed = {"le", "layer", "outcome", "status", "version", "model", "family", "dtype", "device", "kind"}
    allowed |= {"mask", "profile", "state"}
    num_samples = 0
    for family in families.values():
        for sample in family.samples:
            num_samples += 1
            assert set(sample.labels) <= allowed
    per_layer = {
        sample.labels["layer"] for family in families.values() for sample in family.samples if "layer" in sample.labels
    }
    assert len(per_layer) == LAYERS
    assert num_samples < 300


def test_requests_and_tokens_are_counted(families: Families) -> None:
    assert value(families, "deepfew_requests_total", outcome="eos_token") == 1
    assert value(families, "deepfew_requests_total", outcome="length") == 1
    assert value(families, "deepfew_http_responses_total", status="2xx") == 2
    assert value(families, "deepfew_http_responses_total", status="4xx") == 1
    assert value(families, "deepfew_time_to_first_token_seconds_count") == 2
    assert value(families, "deepfew_inter_token_seconds_count") == 7 + 1
    assert value(families, "deepfew_request_deficit_ratio_sum") == 0.25
    assert value(families, "deepfew_generated_tokens_total") == 7
    assert value(families, "deepfew_cached_prompt_tokens_total") == 2
    assert [value(families, "deepfew_kv_blocks", state=state) for state in ("used", "cached", "free")] == [3, 2, 5]
    assert [value(families, "deepfew_memory_bytes", kind=kind) for kind in ("slots", "kv")] == [3000, 1000]
    assert [value(families, "deepfew_memory_moves_total", kind=kind) for kind in ("slots", "kv")] == [2, 1]


def test_experts_are_read_from_the_snapshot(families: Families) -> None:
    assert value(families, "deepfew_expert_hits_total", layer="1") == 20
    assert value(families, "deepfew_expert_misses_total", layer="0") == 1
    assert value(families, "deepfew_expert_evictions_total", layer="1") == 1
    assert value(families, "deepfew_expert_fetch_bytes_total", layer="1") == 2048
    assert value(families, "deepfew_expert_fetch_seconds_total", layer="0") == 0.5
    assert value(families, "deepfew_experts_resident", layer="0") == 2
    assert value(families, "deepfew_experts_available", layer="0") == EXPERTS - 1
    assert value(families, "deepfew_layer_deficit_ratio", layer="1") == 0.25
    assert value(families, "deepfew_deficit_ratio") == 0.125
    assert value(families, "deepfew_build_info", version="1.2.3") == 1


def test_promtool_finds_nothing_to_complain_about(pages: tuple[str, str]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    found = subprocess.run([promtool, "check", "metrics"], input=pages[0], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_vllm_names_show_the_same_counts(pages: tuple[str, str]) -> None:
    families = {family.name: family for family in text_string_to_metric_families(pages[1])}
    wanted = {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries",
        "vllm:prefix_cache_hits",
        "vllm:num_preemptions",
        "vllm:prompt_tokens",
        "vllm:generation_tokens",
        "vllm:request_success",
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds",
    }
    assert set(families) == wanted
    assert all(sample.labels["model_name"] == "scripted" for family in families.values() for sample in family.samples)
    assert value(families, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(families, "vllm:request_success_total", finished_reason="length") == 1
    assert value(families, "vllm:time_to_first_token_seconds_count") == 2
    assert value(families, "vllm:kv_cache_usage_perc") == 0.3
    assert value(families, "vllm:prefix_cache_hits_total") == 2
    assert value(families, "vllm:num_preemptions_total") == 1
