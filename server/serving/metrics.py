"""Prometheus metrics: latencies from the HTTP layer; values of engine, slots and ledger at scrape time.

Invariant: labels are bounded (a layer, an outcome, a profile of this server; never an expert, never a request), units
are base units, and there are no `_created` series. Names are `deepfew_*`. `metrics_vllm.py` has vLLM's names apart,
because `promtool check metrics` refuses their colons.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from expert_store.errors import ExpertUnavailableError, ShardCorruptError, StoreError
from server.engine.request import EngineStatus, FinishedEvent
from server.growth.status import GrowthStatus
from server.serving.service import ExpertsSnapshot, LoadedModel, Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("length", "eos_token", "stop_sequence", "cancelled", "failed", "refused")
STORE_ERRORS = {ShardCorruptError: "corrupt", ExpertUnavailableError: "unavailable", StoreError: "other"}
SHORT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
SHARE_BUCKETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
LOSS_BUCKETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LONG_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The counters of this server, and the registry that `/metrics` shows.

    Args:
        service: read at every scrape.
        version: of deepfew.
    """

    def __init__(self, service: Service, version: str) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._requests = Counter(
            "deepfew_requests", "Generation requests by how they ended.", ["outcome"], registry=self.registry
        )
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        self._responses = Counter(
            "deepfew_http_responses", "HTTP responses by class of status.", ["status"], registry=self.registry
        )
        for status in ("2xx", "3xx", "4xx", "5xx"):
            self._responses.labels(status)
        self._store_errors = Counter(
            "deepfew_store_errors",
            "Requests that failed because an expert could not be read; the log names the file.",
            ["kind"],
            registry=self.registry,
        )
        for kind in STORE_ERRORS.values():
            self._store_errors.labels(kind)
        self.ttft = self._histogram("deepfew_time_to_first_token_seconds", "From submission to the first token.")
        self.itl = self._histogram("deepfew_inter_token_seconds", "Between two tokens of one request.", SHORT_BUCKETS)
        self.queue = self._histogram("deepfew_request_queue_seconds", "From submission to the start of prefill.")
        self.e2e = self._histogram("deepfew_request_seconds", "From submission to the end of the request.")
        self.deficit = self._histogram(
            "deepfew_request_deficit_ratio",
            "Share of router mass that the mask kept from a request's tokens.",
            SHARE_BUCKETS,
        )
        self.expected_loss = self._histogram(
            "deepfew_request_expected_loss_nats",
            "Expected change of a request's loss, nats a token; nothing where nothing was calibrated.",
            LOSS_BUCKETS,
        )
        self._masked_deficit = Summary(
            "deepfew_masked_request_deficit_ratio",
            "Deficits of requests by how they are masked; the name is of one of the server's profiles.",
            ["mask", "profile"],
            registry=self.registry,
        )
        for mask in ("none", "pool"):
            self._masked_deficit.labels(mask, "")
        self.registry.register(_Snapshots(service, version))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = LONG_BUCKETS) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def first_token(self, seconds: float) -> None:
        """The first token came `seconds` after submission."""
        self.ttft.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        """A token came `seconds` after the one before."""
        self.itl.observe(seconds)

    def request_finished(
        self,
        event: FinishedEvent,
        seconds: float,
        *,
        masking: tuple[str, str] = ("none", ""),
        expected_nats: float | None = None,
    ) -> None:
        """A request finished.

        Args:
            seconds: after submission.
            masking: kind of mask, and the profile's name or an empty text; a bounded set.
            expected_nats: expected change of the loss, nats a token, if it is known.
        """
        self._requests.labels(event.reason).inc()
        self.queue.observe(event.timing.queue_seconds)
        self.e2e.observe(seconds)
        self.deficit.observe(event.deficit.overall)
        self._masked_deficit.labels(*masking).observe(event.deficit.overall)
        if expected_nats is not None:
            self.expected_loss.observe(expected_nats)

    def request_ended(self, outcome: str) -> None:
        """A request was cancelled, failed or was refused."""
        self._requests.labels(outcome).inc()

    def request_failed(self, error: BaseException) -> None:
        """A request failed in the engine."""
        self.request_ended("failed")
        if isinstance(error.__cause__, StoreError):
            self._store_errors.labels(STORE_ERRORS.get(type(error.__cause__), "other")).inc()

    def response(self, status: int) -> None:
        """A response began."""
        self._responses.labels(f"{status // 100}xx").inc()

    def outcomes(self) -> dict[str, float]:
        """Ended requests by outcome."""
        samples = (sample for metric in self._requests.collect() for sample in metric.samples)
        return {sample.labels["outcome"]: sample.value for sample in samples}

    def render(self) -> bytes:
        """The text of `/metrics`."""
        return generate_latest(self.registry)


class _Snapshots(Collector):
    def __init__(self, service: Service, version: str) -> None:
        self._service = service
        self._version = version

    def collect(self) -> Iterator[Metric]:
        yield from self._of_the_process()
        model = self._service.loaded
        if model is None:
            return
        yield from _of_the_engine(model.engine.status())
        experts = model.experts()
        yield from _of_the_experts(experts)
        if model.price is not None:
            nats = model.price.expected_loss(experts.overall_deficit).nats
            yield _gauge("deepfew_expected_loss_nats", "Expected change of the loss at the present deficit.", nats)
        if model.growth is not None:
            yield from _of_the_growth(model.growth.status())

    def _of_the_process(self) -> Iterator[Metric]:
        health = self._service.health()
        yield labelled(GaugeMetricFamily, "deepfew_build_info", "Version.", ("version",), [((self._version,), 1)])
        if self._service.loaded is not None:
            yield _model_info(self._service.loaded)
        yield _gauge("deepfew_start_time_seconds", "Unix time of the start.", self._service.started_at)
        yield _gauge("deepfew_ready", "1 while requests are taken.", health.is_ready)
        yield _gauge("deepfew_healthy", "0 when something is broken.", health.is_healthy)
        yield _gauge("deepfew_load_progress_ratio", "Share of loading done, over all its phases.", health.progress)


def _of_the_engine(status: EngineStatus) -> Iterator[Metric]:
    totals = status.totals
    yield _gauge("deepfew_requests_running", "Requests being computed.", status.num_running)
    yield _gauge("deepfew_requests_waiting", "Requests in the queue.", status.num_waiting)
    yield _gauge("deepfew_waiting_tokens", "Prompt tokens in the queue.", status.num_waiting_tokens)
    yield _gauge("deepfew_engine_idle_seconds", "Since the engine last made progress.", status.seconds_since_progress)
    yield _gauge("deepfew_kv_used_tokens", "Tokens in the KV memory.", status.kv_tokens)
    yield _gauge("deepfew_kv_capacity_tokens", "Tokens that the KV memory can hold.", status.kv_capacity_tokens)
    blocks = [(("used",), status.kv.num_used), (("cached",), status.kv.num_cached), (("free",), status.kv.num_free)]
    text = "Blocks of KV memory: held by requests, kept for prompts to come, free."
    yield labelled(GaugeMetricFamily, "deepfew_kv_blocks", text, ("state",), blocks)
    memory = status.memory
    sizes = [(("slots",), memory.slot_bytes), (("kv",), memory.kv_bytes)]
    text = "Memory of slots and of keys and values, which may move between them."
    yield labelled(GaugeMetricFamily, "deepfew_memory_bytes", text, ("kind",), sizes)
    moves = [(("slots",), memory.moves_to_slots), (("kv",), memory.moves_to_kv)]
    text = "Times that slots, or KV memory, got memory of the other."
    yield labelled(CounterMetricFamily, "deepfew_memory_moves", text, ("kind",), moves)
    yield _counter("deepfew_preemptions", "Times a request gave its KV memory to older ones.", totals.num_preemptions)
    yield _counter("deepfew_prompt_tokens", "Prompt tokens of the requests taken.", totals.prompt_tokens)
    yield _counter("deepfew_cached_prompt_tokens", "Of them those found in KV memory.", totals.cached_tokens)
    yield _counter("deepfew_generated_tokens", "Tokens generated.", totals.generated_tokens)
    yield _counter("deepfew_engine_steps", "Steps of the engine.", totals.num_steps)
    yield _counter("deepfew_read_faults", "Steps that could not read an expert.", totals.num_read_faults)


def _of_the_experts(experts: ExpertsSnapshot) -> Iterator[Metric]:
    layers = [str(layer) for layer in range(experts.available.shape[0])]
    per_layer_counters = (
        ("deepfew_expert_hits", "Experts needed that were in a slot.", experts.hits),
        ("deepfew_expert_misses", "Experts needed that had to be fetched.", experts.misses),
        ("deepfew_expert_evictions", "Experts that left a slot.", experts.evictions),
        ("deepfew_expert_fetch_bytes", "Bytes moved into slots.", experts.fetch_bytes),
        ("deepfew_expert_fetch_seconds", "Time spent on moving experts into slots.", experts.fetch_seconds),
        ("deepfew_expert_served", "Experts' uses, kept across restarts.", experts.uses.sum(axis=1)),
        ("deepfew_expert_demanded", "Experts wanted, kept across restarts.", experts.demand.sum(axis=1)),
        ("deepfew_expert_served_mass", "Router mass of the experts used.", experts.served_mass.sum(axis=1)),
        ("deepfew_expert_demanded_mass", "Router mass of the experts wanted.", experts.demand_mass.sum(axis=1)),
        ("deepfew_layer_top1_missing_tokens", "Tokens without their most wanted expert there.", experts.top1_missing),
    )
    per_layer_gauges = (
        ("deepfew_experts_resident", "Experts in slots.", experts.resident.sum(axis=1)),
        ("deepfew_experts_available", "Experts that routing may choose.", experts.available.sum(axis=1)),
        ("deepfew_experts_corrupt", "Damaged experts that are masked.", experts.corrupt.sum(axis=1)),
        ("deepfew_layer_deficit_ratio", "Share of router mass wanted but unavailable.", experts.deficit),
    )
    for family, rows in ((CounterMetricFamily, per_layer_counters), (GaugeMetricFamily, per_layer_gauges)):
        for name, text, values in rows:
            samples = [((layer,), value) for layer, value in zip(layers, values.tolist(), strict=True)]
            yield labelled(family, name, text, ("layer",), samples)
    yield _gauge("deepfew_deficit_ratio", "Share of router mass wanted but unavailable.", experts.overall_deficit)
    yield _counter("deepfew_routed_tokens", "Tokens routed, kept across restarts.", experts.num_tokens)
    yield _counter(
        "deepfew_top1_missing_tokens",
        "Tokens without their most wanted expert in any layer, kept across restarts.",
        experts.top1_missing_tokens,
    )
    yield _gauge("deepfew_slots_per_layer", "Expert slots in every layer.", experts.num_slots)
    yield _gauge("deepfew_slots_bytes", "Memory of all slots.", experts.slot_bytes)
    yield _counter("deepfew_host_tier_hits", "Fetches that the host tier served.", experts.host_hits)
    yield _counter("deepfew_host_tier_misses", "Fetches that went to the disk.", experts.host_misses)
    tier = experts.tier
    yield _gauge("deepfew_host_tier_bytes", "Host memory that holds experts.", tier.host_bytes)
    yield _gauge("deepfew_host_tier_experts", "Experts in host memory.", tier.in_host.sum())
    yield _gauge("deepfew_disk_experts", "Available experts that are in no memory.", experts.on_disk.sum())
    yield _counter("deepfew_disk_reads", "Experts read from the disk.", tier.reads)
    yield _counter("deepfew_disk_read_bytes", "Bytes of experts read from the disk.", tier.read_bytes)
    yield _counter(
        "deepfew_disk_wait_seconds", "Time for which tokens and prompts waited for the disk.", tier.wait_seconds
    )


def _of_the_growth(status: GrowthStatus) -> Iterator[Metric]:
    yield _gauge("deepfew_growing", "1 while the store is being changed.", status.state != "idle")
    yield _counter("deepfew_growths", "Growths that the running model took.", status.num_growths)
    yield _counter("deepfew_growth_failures", "Growths that failed.", status.num_failures)
    yield _counter("deepfew_growth_bytes", "Bytes written by growths.", status.grown_bytes)
    yield _counter("deepfew_shrinks", "Times that deep experts were given up.", status.num_shrinks)
    yield _gauge("deepfew_store_deep_experts", "Deep experts in the store.", status.num_deep_experts)
    yield _gauge("deepfew_store_bytes", "Bytes of all shards.", status.held_bytes)
    if status.budget_bytes is not None:
        yield _gauge("deepfew_store_budget_bytes", "Bytes that all shards may grow to.", status.budget_bytes)


def _model_info(model: LoadedModel) -> Metric:
    labels = {"model": model.name, "family": model.family, "dtype": model.dtype, "device": model.device}
    return labelled(GaugeMetricFamily, "deepfew_model_info", "What is served.", [*labels], [([*labels.values()], 1)])


def labelled(
    family: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    text: str,
    labels: Sequence[str],
    samples: Iterable[tuple[Sequence[str], float]],
) -> Metric:
    """A metric with one value for each (values of the labels, value) of `samples`."""
    metric = family(name, text, labels=labels)
    for label_values, value in samples:
        metric.add_metric(label_values, value)
    return metric


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=float(value))
