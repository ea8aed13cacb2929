"""KV memory that remembers prompts, and that is too small for all requests: no answer changes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router.mask import ExpertMask
from server.engine.engine import Engine
from server.engine.request import ContextTooLongError, ExpertMissingError, FinishedEvent
from server.masks.masking import FixedMasking, PoolMasking
from server.masks.pools import PromptPool
from server.model.host.runner import HostRunner
from server.model.host.sequence_runner import SequenceRunner
from tests.server.engine.clients import Client

TURNS = (
    "Once upon a time there was a small dog who lived in a big house by the sea. ",
    "Every morning the dog went to the harbour and looked at the ships. ",
    "One day a ship came with a cat on board, and the cat said: ",
)
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
MASKS = {
    "all experts": dict,
    "a profile": lambda: {"masking": FixedMasking(ExpertMask.same_in_every_layer(range(2, 7), 2, 8))},
    "a pool": lambda: {"masking": PoolMasking(PromptPool(3, 2, 8), NUM_TOKENS[0])},
    "a temperature": lambda: {"router_temperature": 0.5},
}
NUM_TOKENS = [0]
"""Tokens of the next prompt, which its pool waits for."""


@pytest.fixture
def small_engine(make_engine: Callable[..., Engine], small_store: Path) -> Callable[..., Engine]:
    """An engine over a small random model, whose prompts are read 32 tokens at a time."""

    def make(**options: Any) -> Engine:
        return make_engine(**{"store_path": small_store, "num_slots": 8, "prefill_chunk_tokens": 32} | options)

    return make


def chat(engine: Engine, kind: str, **options: Any) -> list[tuple[list[int], FinishedEvent]]:
    """A chat of three turns, each of them sent with all before it and its answers."""
    text, answers = "", []
    for turn in TURNS:
        text += turn
        NUM_TOKENS[0] = len(engine.runner.model.tokenizer(text).input_ids)
        client = Client(engine, text, **OPTIONS, **MASKS[kind](), **options)
        finished = client.result()
        answers.append((client.token_ids, finished))
        text += finished.generated_text
    return answers


def assert_nothing_is_held(engine: Engine) -> None:
    engine.runner.kv.check_integrity()
    assert engine.status().kv.num_used == 0


@pytest.mark.parametrize("runner_type", [HostRunner, SequenceRunner])
def test_chats_get_the_same_answers_and_deficits_whether_their_beginnings_are_kept_or_not(
    small_engine: Callable[..., Engine], runner_type: type[HostRunner | SequenceRunner]
) -> None:
    kept, without = (small_engine(shares=shares, runner_type=runner_type) for shares in (True, False))
    for kind in (*MASKS, *reversed(MASKS)):
        for (tokens, end), (wanted, wanted_end) in zip(chat(kept, kind), chat(without, kind), strict=True):
            assert tokens == wanted, kind
            assert end.deficit == wanted_end.deficit, kind
            assert (end.deficit.demand is None) == (wanted_end.deficit.demand is None)
            if end.deficit.demand is not None:
                assert np.array_equal(end.deficit.demand, wanted_end.deficit.demand)
            assert wanted_end.num_cached_tokens == 0
    assert without.status().totals.cached_tokens == 0
    totals = kept.status().totals
    assert totals.cached_tokens > 0.4 * totals.prompt_tokens
    assert_nothing_is_held(kept)
    assert kept.status().kv.num_cached > 0


def test_what_was_found_is_told_and_never_the_whole_prompt(small_engine: Callable[..., Engine]) -> None:
    engine = small_engine()
    prompt = TURNS[0] * 4
    first, second = (Client(engine, prompt, **OPTIONS).result() for _ in range(2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == (second.num_prompt_tokens - 1) // 32 * 32 > 0
    assert Client(engine, prompt, prompt_logprobs=True, **OPTIONS).result().num_cached_tokens == 0


def test_requests_that_read_the_same_at_once_read_it_once(small_engine: Callable[..., Engine]) -> None:
    engine = small_engine(max_rows=4)
    blocker = Client(engine, "Once", hold=True, **OPTIONS)
    blocker.first.wait(60)
    same = [Client(engine, TURNS[0] * 4, seed=3, temperature=0.9, **OPTIONS) for _ in range(3)]
    blocker.go_on.set()
    ends = [client.result() for client in same]
    assert len({tuple(client.token_ids) for client in same}) == 1
    prompt = ends[0].num_prompt_tokens
    assert sum(prompt - end.num_cached_tokens for end in ends) <= prompt + 2 * 32 + 2 * (prompt % 32)
    assert_nothing_is_held(engine)


def test_a_request_that_refuses_what_is_missing_refuses_it_also_where_the_prompt_is_found(
    small_engine: Callable[..., Engine],
) -> None:
    engine = small_engine(mask=ExpertMask.same_in_every_layer(range(5), 2, 8))
    Client(engine, TURNS[0] * 3, **OPTIONS).result()
    errors = [Client(engine, text, on_missing="refuse", **OPTIONS).error() for text in (TURNS[0] * 3, TURNS[0])]
    assert all(isinstance(error, ExpertMissingError) for error in errors)
    assert str(errors[0]) == str(errors[1])
    assert_nothing_is_held(engine)


def test_where_blocks_run_out_the_youngest_wait_and_every_answer_is_that_of_the_request_alone(
    small_engine: Callable[..., Engine],
) -> None:
    texts: Sequence[tuple[str, dict[str, Any]]] = (
        (TURNS[0], {"seed": 1, "temperature": 0.9, "presence_penalty": 0.5}),
        (TURNS[1], {"repetition_penalty": 1.3}),
        (TURNS[2], {"masking": "a pool"}),
        ("Der Hund", {"seed": 2, "top_p": 0.9}),
    )

    def ask(engine: Engine) -> list[Client]:
        clients = []
        for text, given in texts:
            options = dict(given)
            if kind := options.pop("masking", None):
                NUM_TOKENS[0] = len(engine.runner.model.tokenizer(text).input_ids)
                options |= MASKS[kind]()
            clients.append(Client(engine, text, max_new_tokens=70, ignore_eos=True, num_logprobs=1, **options))
        return clients

    roomy, narrow = small_engine(shares=False), small_engine(max_tokens=128, kv_blocks=6)
    wanted, got = ask(roomy), ask(narrow)
    for one, other in zip(got, wanted, strict=True):
        end, wanted_end = one.result(), other.result()
        assert [(token.token_id, token.text, token.logprob) for token in one.tokens] == [
            (token.token_id, token.text, token.logprob) for token in other.tokens
        ]
        assert end.deficit == wanted_end.deficit
    assert narrow.status().totals.num_preemptions > 0
    assert narrow.status().totals.generated_tokens == 4 * 70
    assert_nothing_is_held(narrow)


@pytest.mark.parametrize("runner_type", [HostRunner, pytest.param(SequenceRunner, marks=pytest.mark.exhaustive)])
def test_every_answer_is_the_same_while_slots_and_kv_memory_take_memory_from_one_another(
    small_engine: Callable[..., Engine], runner_type: type[HostRunner | SequenceRunner]
) -> None:
    moving = small_engine(
        runner_type=runner_type,
        num_slots=6,
        max_tokens=128,
        kv_blocks=4,
        moving={"least_slots": 2, "look_steps": 8, "kept_looks": 2},
    )
    fixed = small_engine(runner_type=runner_type, num_slots=8, max_tokens=128, shares=False)

    def ask(engine: Engine, seed: int) -> list[Client]:
        """Three requests at once, which KV memory has no room for, then three short ones alone."""
        options = {"ignore_eos": True, "temperature": 0.9, "seed": seed, "num_logprobs": 1}
        blocker = Client(engine, "Once", hold=True, **OPTIONS)
        blocker.first.wait(60)
        clients = [Client(engine, text, max_new_tokens=40, **options) for text in TURNS]
        blocker.go_on.set()
        for client in clients:
            client.result()
        for text in ("The", "A", "In"):
            clients.append(Client(engine, text, max_new_tokens=20, **options))
            clients[-1].result()
        return clients

    for round_number in range(2):
        for one, other in zip(ask(moving, round_number), ask(fixed, round_number), strict=True):
            assert [(token.token_id, token.logprob) for token in one.tokens] == [
                (token.token_id, token.logprob) for token in other.tokens
            ]
    memory = moving.status().memory
    assert min(memory.moves_to_kv, memory.moves_to_slots) >= 2, memory
    assert fixed.status().memory.moves_to_kv == fixed.status().memory.moves_to_slots == 0
    moving.runner.balance.check_integrity()  # type: ignore[attr-defined]
    moving.runner.model.cache.check_integrity()
    assert_nothing_is_held(moving)


def test_a_request_that_lost_its_row_can_be_cancelled(small_engine: Callable[..., Engine]) -> None:
    engine = small_engine(max_tokens=160, kv_blocks=5)
    held: list[Client] = []
    preempt = engine._batch._preempt

    def cancelling(error: Any) -> Any:
        youngest = preempt(error)
        engine.cancel(youngest.request.request_id)
        return youngest

    engine._batch._preempt = cancelling  # type: ignore[method-assign]
    held = [Client(engine, TURNS[0], max_new_tokens=100, ignore_eos=True) for _ in range(3)]
    reasons = [client.result().reason for client in held]
    assert sorted(reasons) == ["cancelled", "cancelled", "length"]
    assert_nothing_is_held(engine)


def test_a_request_that_could_never_fit_is_refused_with_figures(small_engine: Callable[..., Engine]) -> None:
    engine = small_engine(max_tokens=64, kv_blocks=2)
    with pytest.raises(ContextTooLongError, match="a sequence holds 64: max_new_tokens may be at most"):
        Client(engine, TURNS[0], max_new_tokens=100)
