"""Metrics under vLLM's names on `/metrics/vllm`, for dashboards and gateways made for vLLM.

Invariant: nothing is counted here; every value comes from `metrics.py` or the engine. The names are served apart
because `promtool check metrics` refuses their colons.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.serving.metrics import Metrics, labelled
from server.serving.service import Service

FINISH_REASONS = {"length": ("length",), "stop": ("eos_token", "stop_sequence"), "abort": ("cancelled", "failed")}


def render_vllm(metrics: Metrics, service: Service) -> bytes:
    """The text of `/metrics/vllm`; empty while no model is loaded."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_View(metrics, service))
    return generate_latest(registry)


class _View(Collector):
    def __init__(self, metrics: Metrics, service: Service) -> None:
        self._metrics = metrics
        self._service = service

    def collect(self) -> Iterator[Metric]:
        model = self._service.loaded
        if model is None:
            return
        status = model.engine.status()
        labels = {"model_name": model.name}
        names, values = list(labels), list(labels.values())
        used = status.kv.num_used / status.kv.num_blocks if status.kv.num_blocks else 0.0
        for name, text, value in (
            ("vllm:num_requests_running", "Requests being computed.", status.num_running),
            ("vllm:num_requests_waiting", "Requests in the queue.", status.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV memory in use, 1 is all.", used),
        ):
            yield labelled(GaugeMetricFamily, name, text, names, [(values, value)])
        for name, text, total in (
            ("vllm:prompt_tokens", "Prompt tokens of the requests taken.", status.totals.prompt_tokens),
            ("vllm:prefix_cache_queries", "Prompt tokens looked for in KV memory.", status.totals.prompt_tokens),
            ("vllm:prefix_cache_hits", "Prompt tokens found in KV memory.", status.totals.cached_tokens),
            ("vllm:num_preemptions", "Times a request lost its KV memory.", status.totals.num_preemptions),
            ("vllm:generation_tokens", "Tokens generated.", status.totals.generated_tokens),
        ):
            yield labelled(CounterMetricFamily, name, text, names, [(values, total)])
        outcomes = self._metrics.outcomes()
        success = [
            ([*values, reason], sum(outcomes.get(outcome, 0.0) for outcome in ours))
            for reason, ours in FINISH_REASONS.items()
        ]
        yield labelled(
            CounterMetricFamily, "vllm:request_success", "Ended requests.", [*names, "finished_reason"], success
        )
        for name, histogram in (
            ("vllm:time_to_first_token_seconds", self._metrics.ttft),
            ("vllm:inter_token_latency_seconds", self._metrics.itl),
            ("vllm:e2e_request_latency_seconds", self._metrics.e2e),
            ("vllm:request_queue_time_seconds", self._metrics.queue),
        ):
            yield _renamed(histogram, name, names, values)


def _renamed(histogram: Histogram, name: str, labels: list[str], values: list[str]) -> Metric:
    source = next(iter(histogram.collect()))
    buckets, total = [], 0.0
    for sample in source.samples:
        if sample.name.endswith("_bucket"):
            buckets.append((sample.labels["le"], sample.value))
        elif sample.name.endswith("_sum"):
            total = sample.value
    family = HistogramMetricFamily(name, source.documentation, labels=labels)
    family.add_metric(values, buckets=buckets, sum_value=total)
    return family
