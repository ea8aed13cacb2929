"""The captured path's KV memory under the engine, in Triton's interpreter: no answer depends on what was found in it,
nor on how little of it there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from expert_store.store import Store
from router.mask import ExpertMask
from server.engine.admission import EngineLimits
from server.engine.engine import Engine
from server.masks.masking import FixedMasking
from server.model.device.running.assembly import load_device_runner
from server.model.device.step import graphs
from server.model.kv.blocks import BLOCK_TOKENS
from server.model.runner import RunnerOptions
from tests.server.engine.clients import WAIT_SECONDS, Client
from tests.server.model.device.small import DEVICE, TUNING

pytestmark = pytest.mark.exhaustive
BLOCK_BYTES = 2 * 2 * 32 * 4 * BLOCK_TOKENS
TURNS = (
    "Once upon a time there was a small dog who lived in a big house by the sea, with a cat and a goat. " * 2,
    "Every morning the dog went to the harbour and looked at the ships that came and went. ",
)


@pytest.fixture
def captured_engine(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []
    if DEVICE.type == "cpu":
        monkeypatch.setattr(graphs, "Tuning", lambda: TUNING)

    def make(**given: Any) -> Engine:
        options = RunnerOptions(
            **{"device": DEVICE, "dtype": torch.float32, "num_slots": 4, "max_rows": 3, "max_tokens": 128} | given
        )
        engine = Engine(
            lambda progress: load_device_runner(Store.open(small_store), options, proof=False),
            EngineLimits(prefill_chunk_tokens=BLOCK_TOKENS),
        )
        engine.start()
        engines.append(engine)
        engine.loaded.result(WAIT_SECONDS)
        return engine

    yield make
    for engine in engines:
        engine.stop(0)


def assert_nothing_is_held(engine: Engine) -> None:
    engine.runner.kv.check_integrity()
    assert engine.status().kv.num_used == 0


def test_chats_get_the_same_answers_whether_their_beginnings_are_kept_or_not(captured_engine):
    masks = [{}, {"masking": FixedMasking(ExpertMask.same_in_every_layer(range(2, 7), 2, 8))}]

    def chats(engine: Engine) -> list[tuple[list[int], list[float]]]:
        texts, answers = ["", ""], []
        for turn in TURNS:
            for at, mask in enumerate(masks):
                texts[at] += turn
                client = Client(engine, texts[at], max_new_tokens=4, ignore_eos=True, **mask)
                finished = client.result()
                answers.append((client.token_ids, [token.logprob for token in client.tokens]))
                texts[at] += finished.generated_text
        return answers

    kept = captured_engine()
    got = chats(kept)
    assert kept.status().totals.cached_tokens == 2 * BLOCK_TOKENS
    assert_nothing_is_held(kept)
    without = captured_engine(prefix_cache=False)
    assert got == chats(without)
    assert without.status().totals.cached_tokens == 0


def test_where_blocks_run_out_the_youngest_wait_and_every_answer_is_that_of_the_request_alone(captured_engine):
    def answers(engine: Engine) -> list[tuple[str, list[tuple[int, float]]]]:
        options: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
        clients = [
            Client(engine, TURNS[0][:99], seed=1, temperature=0.9, **options),
            Client(engine, TURNS[1][:40], repetition_penalty=1.3, **options),
            Client(engine, "Der Hund", **options),
        ]
        return [
            (client.result().reason, [(token.token_id, token.logprob) for token in client.tokens]) for client in clients
        ]

    narrow = captured_engine(kv_memory_bytes=3 * BLOCK_BYTES, least_tokens=BLOCK_TOKENS)
    assert narrow.runner.max_tokens == 3 * BLOCK_TOKENS
    got = answers(narrow)  # one engine after the other: the interpreter runs one kernel at a time
    assert narrow.status().totals.num_preemptions > 0
    assert_nothing_is_held(narrow)
    assert got == answers(captured_engine(prefix_cache=False))
