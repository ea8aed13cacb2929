"""An engine that says what a test scripted, on a thread of its own, with the interface of the real one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from expert_store.manifest import DeepExpert
from expert_store.residency.host_tier import TierStatistics
from extractor.statistics.price import Price
from extractor.statistics.statistics import PricePoint
from router.mask import ExpertMask
from server.engine.request import (
    ContextTooLongError,
    Deficit,
    EngineStatus,
    EngineStoppedError,
    EngineTotals,
    FailedEvent,
    FinishedEvent,
    GenerationError,
    GenerationRequest,
    OnEvent,
    QueueFullError,
    Timing,
    TokenEvent,
    TokenLogprob,
)
from server.engine.text import Detokenizer, Vocabulary
from server.growth.status import Candidate, GrowthBusyError, GrowthStatus, Reloaded, Shrunk, StoreDemand
from server.masks.masking import RequestMasks
from server.model.kv.rows import KvUsage
from server.model.kv_memory import MemoryShares
from server.serving.service import ExpertsSnapshot, LoadedModel, ShardInfo

LAYERS, EXPERTS = 2, 4
EOS = 0


class CharTokenizer:
    """One token a character; the id is the code point. `<|end|>` is token 0."""

    all_special_tokens = ("<|end|>",)
    special_tokens_map: ClassVar = {"eos_token": "<|end|>"}
    chat_template: str | dict[str, str] | None = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    )

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(char) for char in text]}

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(map(chr, ids))

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tokenize: bool = False,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        template = self.chat_template["default"] if isinstance(self.chat_template, dict) else self.chat_template
        return str(render_jinja_template([messages], chat_template=template, **variables)[0][0])


class ScriptedVocabulary(Vocabulary):
    """The n-th piece of an answer is token n; None is the end-of-sequence token."""

    keeps_special_tokens = False

    def __init__(self, pieces: list[str | bytes | None]) -> None:
        self._pieces = pieces

    def is_special(self, token_id: int) -> bool:
        return token_id > 0 and self._pieces[token_id - 1] is None

    def bytes_of(self, token_id: int) -> bytes:
        piece = " " if token_id == 0 else self._pieces[token_id - 1]
        return b"<|end|>" if piece is None else piece.encode() if isinstance(piece, str) else piece


NUM_CACHED = 2
"""Tokens of each prompt that KV memory has."""


@dataclass
class ScriptedEngine:
    """Answers every prompt with `answer`, one piece a token.

    Attributes:
        answer: text, or bytes, of the tokens; after them the end-of-sequence token.
        step_seconds, end_seconds: before every token, between the last one and the end.
        max_waiting: places; one more is refused with a QueueFullError.
        fail_after: tokens after which the request fails, if any.
        pause_after: tokens after which a request waits until `resume` is set.
        may_run: cleared, nothing moves.
        submitted, cancelled: what was asked for, in order.
    """

    answer: list[str | bytes] = field(default_factory=lambda: [" Paris", ",", " the", " city", " of", " light", "."])
    step_seconds: float = 0.0
    end_seconds: float = 0.0
    max_waiting: int = 64
    max_context: int = 200
    fail_after: int | None = None
    pause_after: int | None = None
    submitted: list[GenerationRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    state: str = "ready"
    reason: str = ""
    stalled_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.may_run = threading.Event()
        self.may_run.set()
        self.resume = threading.Event()
        self._active: dict[str, threading.Event] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def start(self) -> None:
        """Nothing to load."""

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        if self.state != "ready":
            raise EngineStoppedError(f"the engine is {self.state}")
        if len(request.prompt_ids) + request.sampling.max_new_tokens > self.max_context:
            raise ContextTooLongError("too long for the script")
        with self._lock:
            if len(self._active) >= self.max_waiting:
                raise QueueFullError(f"{len(self._active)} requests are waiting", retry_after_seconds=3.0)
            self._active[request.request_id] = threading.Event()
            self.submitted.append(request)
        thread = threading.Thread(target=self._run, args=(request, on_event), daemon=True)
        self._threads.append(thread)
        thread.start()

    def held_prefixes(self) -> frozenset[int]:
        return frozenset()

    def cancel(self, request_id: str) -> None:
        with self._lock:
            if request_id in self._active:
                self.cancelled.append(request_id)
                self._active[request_id].set()

    def stop(self, drain_seconds: float) -> None:
        until = time.monotonic() + drain_seconds
        self.state = "draining"
        while self._active and time.monotonic() < until:
            time.sleep(0.005)
        for event in list(self._active.values()):
            event.set()
        self.state = "stopped"

    def status(self) -> EngineStatus:
        return EngineStatus(
            state=self.state,  # type: ignore[arg-type]
            reason=self.reason,
            progress=1.0,
            num_running=len(self._active),
            num_waiting=0,
            num_waiting_tokens=0,
            seconds_since_progress=self.stalled_seconds,
            kv_tokens=3,
            kv_capacity_tokens=100,
            kv=KvUsage(num_blocks=10, num_used=3, num_cached=2),
            memory=MemoryShares(True, "", 3000, 1000, 600, 500, moves_to_slots=2, moves_to_kv=1),
            totals=EngineTotals(
                num_requests=len(self.submitted),
                prompt_tokens=5,
                cached_tokens=2,
                generated_tokens=7,
                num_steps=9,
                num_preemptions=1,
            ),
        )

    def _run(self, request: GenerationRequest, on_event: OnEvent) -> None:
        started = time.perf_counter()
        cancelled = self._active[request.request_id]
        sampling = request.sampling
        vocabulary = ScriptedVocabulary([*self.answer, None])
        detokenizer = Detokenizer(vocabulary, (0,), sampling)
        untold: list[TokenEvent] = []
        reason, count = "length", 0
        for index, piece in enumerate([*self.answer, None][: sampling.max_new_tokens], start=1):
            go = self.resume if self.pause_after is not None and index > self.pause_after else self.may_run
            while not go.wait(0.005) and not cancelled.is_set():
                pass
            if cancelled.wait(self.step_seconds) if self.step_seconds else cancelled.is_set():
                reason = "cancelled"
                break
            if self.fail_after is not None and index > self.fail_after:
                self._forget(request)
                on_event(FailedEvent(GenerationError("experts/deep-00001.safetensors is corrupt")))
                return
            count = index
            special = piece is None
            detokenizer.add(index, is_end=special)
            is_last = special or detokenizer.stop_string is not None or index == sampling.max_new_tokens
            if is_last:
                detokenizer.finish()
            top = tuple(
                TokenLogprob(2000 + rank, f"t{rank}".encode(), -1.0 - rank) for rank in range(request.num_logprobs)
            )
            token_id = EOS if special else 1000 + index
            untold.append(TokenEvent(index, token_id, "", b"", -0.25, special, top, is_last))
            for text, spelled in detokenizer.give():
                on_event(replace(untold.pop(0), text=text, token_bytes=spelled))
            if is_last:
                time.sleep(self.end_seconds)
            if special:
                reason = "eos_token"
            if detokenizer.stop_string is not None:
                reason = "stop_sequence"
                break
        seconds = time.perf_counter() - started
        self._forget(request)
        prefill = None
        if request.prompt_logprobs:
            ids = request.prompt_ids
            prefill = tuple(
                TokenLogprob(token, chr(token).encode(), None if at == 0 else -0.5) for at, token in enumerate(ids)
            )
        on_event(
            FinishedEvent(
                reason=reason,  # type: ignore[arg-type]
                generated_text=detokenizer.text,
                num_prompt_tokens=len(request.prompt_ids),
                num_generated_tokens=count,
                seed=None if request.sampling.is_greedy else (request.sampling.seed or 7),
                prefill=prefill,
                timing=Timing(0.001, 0.002, seconds, 0.003),
                deficit=Deficit(0.125, (0.0, 0.25), 12, 3, (0, 3)),
                stop_text=detokenizer.stop_string,
                num_cached_tokens=NUM_CACHED,
            )
        )

    def _forget(self, request: GenerationRequest) -> None:
        with self._lock:
            del self._active[request.request_id]

    @property
    def num_active(self) -> int:
        return len(self._active)


def experts_snapshot() -> ExpertsSnapshot:
    """Fixed numbers: expert 3 of each layer is not in the store, 0 and 1 are in slots."""
    shape = (LAYERS, EXPERTS)
    available, resident = np.ones(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
    available[:, 3] = False
    resident[:, :2] = True
    in_host = np.zeros(shape, dtype=np.bool_)
    in_host[0, 1:3] = True
    counts = np.arange(8, dtype=np.int64).reshape(shape)
    return ExpertsSnapshot(
        available=available,
        corrupt=np.zeros(shape, dtype=np.bool_),
        uses=counts,
        demand=counts + 1,
        served_mass=counts * 0.5,
        demand_mass=counts * 0.75,
        deficit=np.array([0.0, 0.25]),
        overall_deficit=0.125,
        num_tokens=11,
        top1_missing=np.array([0, 3]),
        top1_missing_tokens=3,
        resident=resident,
        hits=np.array([10, 20]),
        misses=np.array([1, 2]),
        evictions=np.array([0, 1]),
        fetch_bytes=np.array([1024, 2048]),
        fetch_seconds=np.array([0.5, 0.25]),
        expert_bytes=np.array([512, 512]),
        num_slots=2,
        slot_bytes=2048,
        host_hits=1,
        host_misses=2,
        tier=TierStatistics(in_host, host_bytes=1024, reads=3, read_bytes=1536, wait_seconds=0.125),
        shards=(ShardInfo("experts/deep-00000.safetensors", 4096, (0, 1)),),
    )


@dataclass
class ScriptedGrowth:
    """A store that can be grown, shrunk and reloaded in words alone.

    Attributes:
        busy: a change is under way, so another one is refused.
        asked: what was asked for, in order.
        failure: raised by every change, if there is one.
    """

    busy: bool = False
    failure: Exception | None = None
    asked: list[Any] = field(default_factory=list)

    def status(self) -> GrowthStatus:
        return GrowthStatus("growing" if self.busy else "idle", 512, 1024, None, 2, 1, 3, 4096, 3, 12288, 65536)

    def candidates(self) -> list[Candidate]:
        return [Candidate((place, 3 - place), 0.5 / (place + 1), 0.25 / (place + 1), 512) for place in range(3)]

    def demand(self) -> StoreDemand:
        available = np.zeros((LAYERS, EXPERTS), dtype=np.bool_)
        mass = np.ones((LAYERS, EXPERTS))
        return StoreDemand(available, mass, np.ones((LAYERS, EXPERTS)), {1: (0, 1)}, 512, self.status())

    def grow(self, count: int, named: Sequence[tuple[int, ...]] = ()) -> list[Candidate]:
        self._change(("grow", [*named] or count))
        return self.candidates()[:count]

    def shrink(self, indices: Collection[int] | None = None, *, count: int | None = None) -> Shrunk:
        self._change(("shrink", indices, count))
        return Shrunk((DeepExpert(1, "experts/deep-00001.safetensors", 512, "", 0, (0, 1), ()),), None)

    def reload(self) -> Reloaded:
        self._change(("reload",))
        return Reloaded(1, 0, 3)

    def stop(self) -> None:
        self.asked.append(("stop",))

    def _change(self, what: Any) -> None:
        if self.failure is not None:
            raise self.failure
        if self.busy:
            raise GrowthBusyError("the store is already growing: wait until that is done")
        self.asked.append(what)


PRICE = Price.of([PricePoint("code", 0.25, 0.2, 100, 0.5), PricePoint("prose", 0.5, 1.2, 100, 0.5)])
"""A deficit of 0.125 costs 0.1 nats in code and 0.3 in prose."""


def request_masks() -> RequestMasks:
    """One profile, of a kind of text that has a price."""
    code = ExpertMask.same_in_every_layer([0, 1], LAYERS, EXPERTS)
    return RequestMasks({"code": code}, LAYERS, EXPERTS)


def loaded(engine: Any, experts: Callable[[], ExpertsSnapshot] = experts_snapshot, **more: Any) -> LoadedModel:
    """A model around a scripted engine."""
    plain: dict[str, Any] = {
        "name": "scripted",
        "family": "qwen3_moe",
        "dtype": "float32",
        "device": "cpu",
        "num_layers": LAYERS,
        "num_experts": EXPERTS,
        "top_k": 2,
        "vocab_size": 0x110000,
        "max_context_tokens": 200,
        "tokenizer": CharTokenizer(),
        "growth": ScriptedGrowth(),
        "masks": request_masks(),
        "price": PRICE,
    }
    return LoadedModel(engine=engine, experts=experts, **{**plain, **more})
