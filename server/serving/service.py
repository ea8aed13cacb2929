"""The served model: it loads in the background; its engine, its experts and its health.

Invariant: `model()` returns only while requests are taken. Else it raises with the reason that `/health/ready` shows.
This module knows neither FastAPI nor Prometheus; the HTTP routes, the metrics and the command line use it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from server.engine.request import EngineStatus, EngineStoppedError, GenerationRequest, OnEvent
from server.growth.status import GrowthLike
from server.masks.masking import RequestMasks
from server.model.load_progress import LoadProgress, Phase

if TYPE_CHECKING:
    from expert_store.adapter import Adapter
    from expert_store.residency.host_tier import TierStatistics
    from extractor.statistics.price import Price
    from server.constraints.compiler import ConstraintCompiler

log = logging.getLogger(__name__)
LOG_SECONDS = 1.0
"""Seconds between two log lines about the same phase of loading."""


class NotReadyError(EngineStoppedError):
    """The server takes no requests now; `retry_after_seconds` is an estimate of the time until it does."""

    retry_after_seconds = 2.0


class EngineLike(Protocol):
    """The part of `server.engine.engine.Engine` that the service uses."""

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def start(self) -> None: ...
    def stop(self, drain_seconds: float) -> None: ...
    def status(self) -> EngineStatus: ...
    def held_prefixes(self) -> frozenset[int]: ...


@dataclass(frozen=True)
class ShardInfo:
    """One deep expert of the store."""

    file: str
    num_bytes: int
    experts: tuple[int, ...]


@dataclass(frozen=True)
class ExpertsSnapshot:
    """Counters and places of every expert at one moment; arrays are `[L, E]` or `[L]` and belong to the reader.

    `demand` counts the choices of the unmasked router, `uses` the experts computed; masses are sums of router weight.
    `resident`, `hits`, `misses` and what follows come from the slots and begin at 0 with the process. Counts, masses
    and the deficit come from the ledger, which is kept across restarts.
    """

    available: NDArray[np.bool_]  # [L, E]
    corrupt: NDArray[np.bool_]  # [L, E], in the store but damaged, and therefore masked
    uses: NDArray[np.int64]  # [L, E]
    demand: NDArray[np.int64]  # [L, E]
    served_mass: NDArray[np.float64]  # [L, E]
    demand_mass: NDArray[np.float64]  # [L, E]
    deficit: NDArray[np.float64]  # [L]
    overall_deficit: float
    num_tokens: int
    top1_missing: NDArray[np.int64]  # [L], tokens whose most demanded expert was missing there
    top1_missing_tokens: int  # in any layer
    resident: NDArray[np.bool_]  # [L, E]
    hits: NDArray[np.int64]  # [L]
    misses: NDArray[np.int64]  # [L]
    evictions: NDArray[np.int64]  # [L]
    fetch_bytes: NDArray[np.int64]  # [L]
    fetch_seconds: NDArray[np.float64]  # [L]
    expert_bytes: NDArray[np.int64]  # [L]
    num_slots: int
    slot_bytes: int
    host_hits: int
    host_misses: int
    tier: TierStatistics  # host memory and disk
    shards: tuple[ShardInfo, ...]

    @property
    def on_disk(self) -> NDArray[np.bool_]:
        """Available experts that are in no memory, [L, E]."""
        return self.available & ~self.resident & ~self.tier.in_host


@dataclass(frozen=True)
class LoadedModel:
    """A model whose engine runs.

    Attributes:
        name: name of the model in answers, `/info` and metrics.
        other_names: more names that `/v1/models` lists.
        encodings: in words, of the experts' tensors that the store has in fewer bits, by their names.
        expert_bits, trunk_bits: of one weight of the experts and of the trunk in the store.
        adapters: those that masked requests may have, by name; adapter_prices: of those whose price was measured.
        generation_defaults: values of the checkpoint's generation config, for requests that leave them out.
    """

    name: str
    family: str
    dtype: str
    device: str
    num_layers: int
    num_experts: int
    top_k: int
    vocab_size: int
    max_context_tokens: int
    tokenizer: Any
    engine: EngineLike
    experts: Callable[[], ExpertsSnapshot]
    decode_path: str = "host"
    """Where the experts of a decode step are driven: "host" or "device"."""
    batch_invariant: bool = True
    """Whether a request's tokens are promised not to depend on what else is in the batch."""
    price: Price | None = None
    """Gives the expected loss of a deficit: `price.expected_loss(deficit)`. None where nothing was calibrated."""
    growth: GrowthLike | None = None
    """Changes the served store; None where nothing can."""
    constraints: ConstraintCompiler | None = None
    """Compiles the constraints of requests; None where none are taken."""
    masks: RequestMasks | None = None
    """Masks that requests may choose; None where they may not."""
    other_names: tuple[str, ...] = ()
    encodings: Mapping[str, str] = field(default_factory=dict)
    expert_bits: float = 16.0
    trunk_bits: int = 16
    generation_defaults: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    adapter_prices: Mapping[str, Price] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, `name` first."""
        return (self.name, *self.other_names)

    def told_name(self, asked: str | None) -> str:
        """The name in an answer: the one that was asked for, if it is one of the model's."""
        return asked if asked is not None and asked in self.names else self.name


Loader = Callable[[LoadProgress], LoadedModel]
HealthState = Literal["loading", "ready", "draining", "failed"]


@dataclass(frozen=True)
class Health:
    """`is_ready`: a request would be taken now. `is_healthy`: nothing is broken (loading and draining are healthy).

    `progress` is the share of all loading that is done; `phase` is the phase under way, else empty.
    """

    is_ready: bool
    is_healthy: bool
    state: HealthState
    reason: str
    progress: float
    phase: str = ""


class Service:
    """Loads a model in a background thread and reports its health.

    Args:
        load: builds the model and starts its engine; called once, on its own thread.
        stall_seconds: an engine without progress for this long is reported as broken.
        on_failure: called on the loading thread if `load` raised; the error is in `error`.
    """

    def __init__(
        self,
        load: Loader,
        *,
        stall_seconds: float = 120.0,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._load = load
        self._stall_seconds = stall_seconds
        self._on_failure = on_failure
        self._model: LoadedModel | None = None
        self._progress = LoadProgress(on_change=self._log_progress)
        self._logged: tuple[Phase | None, float] = (None, -math.inf)
        self._draining = threading.Event()
        self.error: BaseException | None = None
        self.started_at = time.time()

    def start(self) -> None:
        """Begin to load."""
        threading.Thread(target=self._run, name="deepfew-load", daemon=True).start()

    @property
    def loaded(self) -> LoadedModel | None:
        """The model once it is loaded, whatever its state since."""
        return self._model

    def model(self) -> LoadedModel:
        """The model, ready to take a request.

        Raises:
            NotReadyError: it is loading, draining, stopped or failed.
        """
        health = self.health()
        if self._model is None or not health.is_ready:
            raise NotReadyError(health.reason)
        return self._model

    def health(self) -> Health:
        """The state of the model and its engine at this moment."""
        model, share, phase = self._model, self._progress.share, self._progress.phase or "starting"
        if self.error is not None:
            return Health(False, False, "failed", "the model could not be loaded; the log says why", share)
        if model is None:
            if self._draining.is_set():
                return Health(False, True, "draining", "the server is shutting down", share)
            return Health(False, True, "loading", f"loading: {phase} ({share:.0%})", share, phase)
        status = model.engine.status()
        if status.state == "failed":
            return Health(False, False, "failed", status.reason or "the engine has failed", status.progress)
        if self._draining.is_set() or status.state in ("draining", "stopped"):
            return Health(False, True, "draining", "the server is shutting down", 1.0)
        if status.state == "loading":
            return Health(False, True, "loading", status.reason or "loading", status.progress)
        if status.seconds_since_progress > self._stall_seconds:
            reason = f"the engine has made no progress for {status.seconds_since_progress:.0f} s"
            return Health(False, False, "failed", reason, 1.0)
        return Health(True, True, "ready", "", 1.0)

    def begin_drain(self) -> None:
        """Refuse new requests from now on; running ones continue."""
        self._draining.set()

    def close(self, drain_seconds: float) -> None:
        """Finish running requests within `drain_seconds`, stop the engine, which saves the usage. Blocks."""
        self.begin_drain()
        if self._model is not None:
            if self._model.growth is not None:
                self._model.growth.stop()
            self._model.engine.stop(drain_seconds)

    def _run(self) -> None:
        try:
            model = self._load(self._progress)
        except BaseException as error:
            self.error = error
            self._on_failure()
            return
        self._model = model
        log.info(
            "ready",
            extra={
                "model": model.name, "device": model.device, "dtype": model.dtype, "decode_path": model.decode_path
            },
        )  # fmt: skip

    def _log_progress(self, progress: LoadProgress) -> None:
        """Log every phase, and once a second within one."""
        phase, at = self._logged
        if progress.phase != phase or time.monotonic() - at >= LOG_SECONDS:
            log.info("loading", extra={"progress": round(progress.share, 3), "doing": progress.phase})
            self._logged = (progress.phase, time.monotonic())
