"""The engine over the bundled checkpoint: batches that change at every step, endings of every kind."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from expert_store.errors import ShardCorruptError
from router.ledger import UsageLedger
from router.mask import ExpertMask
from server.engine.engine import Engine
from server.engine.request import (
    ContextTooLongError,
    EngineStoppedError,
    FailedEvent,
    GenerationRequest,
    InvalidRequestError,
    QueueFullError,
)
from server.model.host.runner import HostRunner
from server.model.host.sequence_runner import SequenceRunner
from server.model.runner import Chosen, RowStep, Runner, StepOutput
from tests.server.engine.clients import WAIT_SECONDS, Client, held_until_stopped


def test_greedy_answer_and_its_events(make_engine: Callable[..., Engine]) -> None:
    client = Client(make_engine(), "The capital of France is", max_new_tokens=10, num_logprobs=2)
    result = client.result()
    assert result.generated_text == " Paris."
    assert result.reason == "eos_token"
    assert result.seed is None
    assert [token.index for token in client.tokens] == list(range(1, result.num_generated_tokens + 1))
    assert client.tokens[-1].special
    for token in client.tokens:
        assert (token.top[0].token_id, token.top[0].token_bytes) == (token.token_id, token.token_bytes)
        assert token.top[0].logprob == pytest.approx(token.logprob, abs=1e-4)
    assert result.deficit.overall == 0.0


def test_seeded_requests_give_the_same_text_alone_and_in_any_company(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_rows=3)
    sampling = {"max_new_tokens": 24, "temperature": 0.9, "top_p": 0.95, "seed": 11}
    alone = Client(engine, "Once upon a time", **sampling).result().generated_text
    crowd = []
    for at, text in enumerate(["Der Hund", "12 + 5 =", "def main():", "The river", "Paris is"]):
        crowd.append(Client(engine, text, max_new_tokens=6 + 7 * at, do_sample=True))
        if at == 2:
            seeded = Client(engine, "Once upon a time", **sampling)
    assert seeded.result().generated_text == alone
    assert all(client.result().reason in ("length", "eos_token") for client in crowd)


def test_a_request_joins_while_another_runs_and_leaves_before_it(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    long = Client(engine, "Once upon a time", hold=True, max_new_tokens=30, ignore_eos=True)
    assert long.first.wait(WAIT_SECONDS)
    short = Client(engine, "The capital of France is", max_new_tokens=3)
    long.go_on.set()
    assert short.result().generated_text == " Paris."
    assert long.result().num_generated_tokens == 30
    assert short.end_number < long.end_number


def test_a_cancelled_request_is_gone_within_a_step(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_rows=1)
    running = Client(engine, "Once upon a time", name="running", hold=True, max_new_tokens=200, ignore_eos=True)
    waiting = Client(engine, "Der Hund", name="waiting", max_new_tokens=5)
    assert running.first.wait(WAIT_SECONDS)
    engine.cancel("waiting")
    engine.cancel("running")
    running.go_on.set()
    assert waiting.result().reason == running.result().reason == "cancelled"
    assert len(running.tokens) == 2, "the step under way was its last"
    status = engine.status()
    assert (status.num_running, status.num_waiting, status.kv_tokens) == (0, 0, 0)
    engine.runner.model.cache.check_integrity()


def test_stop_strings_end_the_text(make_engine: Callable[..., Engine]) -> None:
    result = Client(make_engine(), "Once upon a time", max_new_tokens=60, stop=("named",)).result()
    assert result.reason == "stop_sequence"
    assert result.generated_text.endswith("named")
    assert result.stop_text == "named"


def test_a_stop_string_that_is_a_special_token_ends_the_text_before_it(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    prompt = "The capital of France is"
    usual = Client(engine, prompt, max_new_tokens=10)
    usual.result()
    special = engine.runner.model.tokenizer.decode([usual.token_ids[-1]])
    ways = {"max_new_tokens": 10, "ignore_eos": True, "stop": (special,)}
    for keeps, shown in ((True, " Paris." + special), (False, " Paris.")):
        client = Client(engine, prompt, **ways, include_stop_str_in_output=keeps, skip_special_tokens=False)
        result = client.result()
        assert (result.reason, result.stop_text, result.generated_text) == ("stop_sequence", special, shown)
        assert "".join(token.text for token in client.tokens) == shown
        assert b"".join(token.token_bytes for token in client.tokens) == shown.encode()
        assert result.num_generated_tokens == len(usual.token_ids)
        assert client.tokens[-1].is_last == keeps, "a token behind the cut is never told"


def test_the_prompts_tokens_are_told_with_bytes_and_alternatives(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(prefill_chunk_tokens=4)
    text = "Der Schnee ☃ ist weiß"
    client = Client(engine, text, prompt_logprobs=True, num_logprobs=2, max_new_tokens=1)
    prefill = client.result().prefill
    assert b"".join(token.token_bytes for token in prefill) == text.encode()
    assert prefill[0].logprob is None
    for token in prefill[1:]:
        assert token.logprob <= token.top[0].logprob
        assert token.top[0].logprob >= token.top[1].logprob
        assert all(token.logprob == each.logprob for each in token.top if each.token_id == token.token_id)


class ChoosingRunner(HostRunner):
    """Takes the most likely token of every row, also of those whose choice the engine keeps to itself."""

    def decode(self, steps: Sequence[RowStep]) -> StepOutput:
        output = super().decode(steps)
        assert all(step.takes_best for step in steps), "these rows are not to be drawn by the runner"
        best = output.logits.max(dim=-1)
        normaliser = output.logits.logsumexp(dim=-1)
        return replace(output, chosen=Chosen(best.indices.numpy(), best.values.numpy(), normaliser.numpy()))


def test_a_runner_that_chooses_tokens_is_not_followed_where_it_cannot_do_what_a_request_asks_for(
    make_engine: Callable[..., Engine],
) -> None:
    asked = [{"typical_p": 0.5, "seed": 3}, {"repetition_penalty": 1.5}]
    engine, chooses = make_engine(), make_engine(runner_type=ChoosingRunner)
    prompt = "The capital of France is"
    texts = [Client(engine, prompt, max_new_tokens=24, **sampling).result().generated_text for sampling in asked]
    clients = [Client(chooses, prompt, max_new_tokens=24, **sampling) for sampling in [{}, *asked]]
    assert [client.result().generated_text for client in clients] == [" Paris.", *texts]
    assert Client(engine, prompt, max_new_tokens=24, logit_bias={300: 100}).result().num_generated_tokens == 24
    assert Client(engine, prompt, max_new_tokens=24, min_tokens=20).result().num_generated_tokens >= 20


def test_what_can_never_be_served_is_refused_with_what_could(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    with pytest.raises(ContextTooLongError, match="max_new_tokens may be at most 25"):
        Client(engine, "Once upon a time", max_new_tokens=253)
    with pytest.raises(ContextTooLongError, match="shorten the prompt"):
        Client(engine, "word " * 400, max_new_tokens=1)
    with pytest.raises(InvalidRequestError, match="no tokens"):
        engine.submit(GenerationRequest("empty", ()), print)
    with pytest.raises(InvalidRequestError, match="outside 0 to 8191"):
        engine.submit(GenerationRequest("unknown", (8192,)), print)
    with pytest.raises(InvalidRequestError, match="logit_bias is outside 0 to 8191"):
        Client(engine, "Once", logit_bias={8192: 1.0})
    assert engine.status().totals.num_refused == 5
    assert Client(engine, "Once upon a time", max_new_tokens=2).result().num_generated_tokens == 2


def test_the_queue_is_bounded_by_requests_and_by_tokens(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_rows=1, max_waiting_requests=2, max_waiting_tokens=12)
    busy = Client(engine, "Once upon a time", hold=True, max_new_tokens=2, ignore_eos=True)
    assert busy.first.wait(WAIT_SECONDS)
    Client(engine, "Once upon a time", max_new_tokens=1)
    with pytest.raises(QueueFullError, match="prompt tokens are waiting"):
        Client(engine, "one two three four five six seven eight nine ten", max_new_tokens=1)
    Client(engine, "Once", max_new_tokens=1)
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        Client(engine, "Once", max_new_tokens=1)
    busy.go_on.set()


def test_a_long_prompt_does_not_hold_up_running_requests(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(prefill_chunk_tokens=16)
    running = Client(engine, "Once upon a time", hold=True, max_new_tokens=150, ignore_eos=True)
    assert running.first.wait(WAIT_SECONDS)
    steps_before = len(running.tokens)
    long = Client(engine, "word " * 90, max_new_tokens=1)
    running.go_on.set()
    long.result()
    assert len(running.tokens) >= steps_before + 4, "no token was made between the chunks of the prompt"


def test_a_corrupt_expert_fails_the_requests_that_need_it_and_the_engine_goes_on(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()

    def broken(*args: object) -> None:
        raise ShardCorruptError("deep-00007.safetensors is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.model.store, "read_expert", broken)
        client = Client(engine, "Der Hund ist groß und die Katze", max_new_tokens=20)
        assert client.ended.wait(WAIT_SECONDS)
        assert isinstance(client.events[-1], FailedEvent)
        assert "deep-00007" in str(client.events[-1].error)
    engine.runner.model.cache.check_integrity()
    assert Client(engine, "The capital of France is", max_new_tokens=3).result().generated_text == " Paris."


def test_an_unforeseen_error_ends_every_request_and_says_so(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_rows=1)
    first = Client(engine, "Once", hold=True, max_new_tokens=200, ignore_eos=True)
    second = Client(engine, "Once", max_new_tokens=5)
    assert first.first.wait(WAIT_SECONDS)

    def boom(*args: object, **kwargs: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine.runner, "decode", boom)
    first.go_on.set()
    for client in (first, second):
        assert client.ended.wait(WAIT_SECONDS)
        assert isinstance(client.events[-1], FailedEvent)
    while engine.is_alive:
        time.sleep(0.01)
    assert engine.status().state == "failed"
    assert "device lost" in engine.status().reason
    with pytest.raises(EngineStoppedError, match="device lost"):
        Client(engine, "Once", max_new_tokens=1)


def test_stopping_lets_accepted_requests_finish_within_the_drain(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_rows=1)
    clients = [Client(engine, "The capital of France is", max_new_tokens=3) for _ in range(3)]
    engine.stop(drain_seconds=WAIT_SECONDS)
    assert [client.result().generated_text for client in clients] == [" Paris."] * 3
    assert engine.status().state == "stopped"
    with pytest.raises(EngineStoppedError):
        engine.submit(GenerationRequest("late", (5,)), print)


def test_a_drain_that_is_over_fails_what_is_left(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    monkeypatch.setattr(engine.runner, "decode", held_until_stopped(engine, engine.runner.decode))
    client = Client(engine, "Once", max_new_tokens=200, ignore_eos=True)
    assert client.first.wait(WAIT_SECONDS)
    engine.stop(drain_seconds=0)
    assert isinstance(client.events[-1], FailedEvent)


def test_stopping_does_not_wait_for_ever_for_a_wedged_thread(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, released = make_engine(), threading.Event()
    monkeypatch.setattr("server.engine.engine.STOP_MARGIN_SECONDS", 0.3)

    def hang(*args: object, **kwargs: object) -> None:
        released.wait(WAIT_SECONDS)
        raise ShardCorruptError("released")

    monkeypatch.setattr(engine.runner, "decode", hang)
    client = Client(engine, "Once", max_new_tokens=5)
    assert client.first.wait(WAIT_SECONDS)
    started = time.monotonic()
    engine.stop(drain_seconds=0.2)
    assert time.monotonic() - started > 0.4
    status = engine.status()
    assert (status.state, status.is_wedged) == ("failed", True)
    assert "did not end within" in status.reason
    assert "stuck in" in status.reason
    assert "in hang" in caplog.text, "the log has the stack of the thread"
    with pytest.raises(EngineStoppedError):
        Client(engine, "Once", max_new_tokens=1)
    released.set()
    client.error()
    engine.stop(0)


def test_a_loader_that_fails_is_told_in_the_status() -> None:
    def loader(progress: object) -> Runner:
        raise ShardCorruptError("no manifest here")

    engine = Engine(loader)
    engine.start()
    while engine.is_alive:
        time.sleep(0.01)
    assert engine.status().state == "failed"
    assert "no manifest here" in engine.status().reason


def test_usage_is_kept_across_restarts(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    path = tmp_path / "usage.json"
    for runs in (1, 2):
        engine = make_engine(usage_path=path)
        result = Client(engine, "The capital of France is", max_new_tokens=3).result()
        engine.stop(5)
        routed = result.num_prompt_tokens + result.num_generated_tokens - 1  # the last token is never fed back
        assert UsageLedger.load(path).num_tokens == routed * runs


def test_an_unreadable_usage_file_is_set_aside(make_engine: Callable[..., Engine], tmp_path: Path) -> None:
    path = tmp_path / "usage.json"
    path.write_text("not usage")
    engine = make_engine(usage_path=path)
    Client(engine, "Once", max_new_tokens=2).result()
    engine.stop(5)
    assert UsageLedger.load(path).num_tokens > 0
    (aside,) = tmp_path.glob("usage.json.unreadable-*")
    assert aside.read_text() == "not usage"


def test_a_masked_engine_reports_the_deficit_of_each_answer(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(mask=ExpertMask.same_in_every_layer(range(16), 8, 64))
    result = Client(engine, "Once upon a time", max_new_tokens=8).result()
    assert 0.2 < result.deficit.overall < 1.0
    assert len(result.deficit.per_layer) == 8
    assert engine.ledger.deficit == pytest.approx(result.deficit.overall)


class PoolOfPrompt:
    """Keeps, per layer, the experts that the first step wanted; stands for any policy that follows the text."""

    def __init__(self) -> None:
        self.mask: ExpertMask | None = None
        self.num_observed = 0

    def observe(self, demand_index, demand_weight) -> None:
        self.num_observed += demand_index.shape[1]
        if self.mask is None:
            allowed = np.zeros((8, 64), dtype=np.bool_)
            for layer, ids in enumerate(demand_index):
                allowed[layer, np.unique(ids)] = True
            self.mask = ExpertMask.of(allowed)


def test_requests_with_masks_of_their_own_get_what_each_gets_alone(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    texts = ["Once upon a time", "The capital of France is", "Der Hund ist"]
    alone = [Client(engine, text, masking=PoolOfPrompt(), max_new_tokens=12).result() for text in texts]
    pools = [PoolOfPrompt() for _ in texts]
    unmasked = Client(engine, texts[0], max_new_tokens=12)
    together = [Client(engine, text, masking=pool, max_new_tokens=12) for text, pool in zip(texts, pools, strict=True)]
    assert [client.result().generated_text for client in together] == [result.generated_text for result in alone]
    for client, pool, result in zip(together, pools, alone, strict=True):
        final = client.result()
        assert final.deficit.overall == pytest.approx(result.deficit.overall, abs=1e-6)
        assert final.deficit.overall > 0.0
        assert pool.num_observed == final.num_prompt_tokens + final.num_generated_tokens - 1
    assert unmasked.result().deficit.overall == 0.0


def test_a_mask_that_leaves_nothing_of_what_is_served_is_refused(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(mask=ExpertMask.same_in_every_layer(range(16), 8, 64))
    pool = PoolOfPrompt()
    pool.mask = ExpertMask.same_in_every_layer([20], 8, 64)
    with pytest.raises(InvalidRequestError, match="too little in common"):
        Client(engine, "Once", masking=pool, max_new_tokens=2)


def test_status_may_be_asked_while_rows_come_and_go(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(runner_type=SequenceRunner)
    runner = engine.runner

    class Joining:
        @property
        def length(self) -> int:
            if runner.kv.num_free_rows:
                runner.allocate()  # as the engine's thread does while another one counts
            return 3

    row = runner.allocate()
    runner.kv._rows[row] = Joining()
    assert engine.status().kv_tokens == 3
