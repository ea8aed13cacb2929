"""Constrained requests in the engine: alone and beside others, greedy and sampled, and how they end."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import torch
from transformers import AutoTokenizer

from expert_store.store import Store
from server.constraints.compiler import CompiledConstraint, ConstraintCompiler
from server.constraints.grammar import Constraint, Json, OneOf, Regex, Text
from server.engine.engine import Engine
from server.engine.request import ConstraintFailedError
from server.model.host.assembly import load_model
from server.model.host.runner import HostRunner
from server.model.runner import Runner, RunnerOptions
from tests.server.engine.clients import WAIT_SECONDS, Client

PROMPT = "Once upon a time"
ANIMAL = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["fox", "Bär"]},
        "name": {"type": "string", "maxLength": 12},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
    },
    "required": ["kind", "name", "legs"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiled(tiny_checkpoint: Path) -> Callable[[Constraint], CompiledConstraint]:
    return ConstraintCompiler(AutoTokenizer.from_pretrained(tiny_checkpoint), 8192, {0, 4}).compile


def animal(text: str) -> None:
    jsonschema.validate(json.loads(text), ANIMAL)


def test_answers_under_a_schema_are_valid_greedy_and_sampled(make_engine, compiled) -> None:
    engine: Engine = make_engine()
    constraint = compiled(Json(ANIMAL))
    settings = [
        {},
        {"do_sample": True, "seed": 1},
        {"temperature": 2.0, "top_k": 50, "top_p": 0.8, "seed": 2},
    ]
    clients = [Client(engine, PROMPT, constraint=constraint, max_new_tokens=120, **setting) for setting in settings]
    for client in clients:
        end = client.result()
        animal(end.generated_text)
        assert end.reason == "eos_token"
        assert "".join(token.text for token in client.tokens) == end.generated_text


def test_a_constrained_row_changes_nothing_for_the_rows_beside_it(make_engine, compiled) -> None:
    engine: Engine = make_engine()
    plain = {"max_new_tokens": 12}, {"max_new_tokens": 12, "do_sample": True, "seed": 7}
    alone = [Client(engine, PROMPT, **sampling) for sampling in plain]
    for client in alone:
        client.result()
    beside = [Client(engine, PROMPT, **sampling) for sampling in plain]
    constrained = Client(engine, PROMPT, constraint=compiled(Json(ANIMAL)), max_new_tokens=100)
    for before, client in zip(alone, beside, strict=True):
        assert client.result().generated_text == before.result().generated_text
        assert [token.logprob for token in client.tokens] == [token.logprob for token in before.tokens]
    animal(constrained.result().generated_text)


def test_a_constraint_that_the_text_follows_by_itself_changes_nothing(make_engine, compiled) -> None:
    engine: Engine = make_engine()
    free = Client(engine, PROMPT, max_new_tokens=12)
    text = free.result().generated_text
    forced = Client(engine, PROMPT, constraint=compiled(OneOf((Text(text), Text("🦊")))), max_new_tokens=40)
    assert forced.result().generated_text == text
    assert forced.token_ids == free.token_ids
    assert [token.logprob for token in forced.tokens] == [token.logprob for token in free.tokens]


def test_the_text_ends_where_nothing_can_follow_and_at_an_end_token_where_the_text_may_go_on(
    make_engine, compiled
) -> None:
    engine: Engine = make_engine()
    whole = Client(engine, PROMPT, constraint=compiled(Text("A fox")), max_new_tokens=50)
    assert whole.result().generated_text == "A fox"
    assert whole.result().reason == "eos_token"
    assert whole.tokens[-1].is_last
    assert not whole.tokens[-1].special
    open_end = Client(engine, PROMPT, constraint=compiled(Regex("[ab]+")), logit_bias={0: 100.0}, max_new_tokens=50)
    assert open_end.result().reason == "eos_token"
    assert set(open_end.result().generated_text) <= {"a", "b"}
    assert open_end.tokens[-1].special


def test_the_end_that_was_forbidden_comes_where_nothing_else_can(make_engine, compiled) -> None:
    engine: Engine = make_engine()
    for more in ({"min_tokens": 40}, {"ignore_eos": True}):
        client = Client(engine, PROMPT, constraint=compiled(Text("A fox")), max_new_tokens=50, **more)
        assert client.result().generated_text == "A fox"
    more = {"logit_bias": {0: 100.0}, "max_new_tokens": 9}
    longest = Client(engine, PROMPT, constraint=compiled(Regex("[ab]+")), ignore_eos=True, **more)
    assert longest.result().reason == "length"
    least = Client(engine, PROMPT, constraint=compiled(Regex("[ab]+")), min_tokens=4, **more)
    assert (least.result().reason, least.result().num_generated_tokens) == ("eos_token", 5)


def test_length_and_stop_strings_end_a_constrained_text_before_it_is_complete(make_engine, compiled) -> None:
    engine: Engine = make_engine()
    cut = Client(engine, PROMPT, constraint=compiled(Json(ANIMAL)), max_new_tokens=3)
    assert cut.result().reason == "length"
    assert cut.result().num_generated_tokens == 3
    exact = Client(engine, PROMPT, constraint=compiled(Text("A")), max_new_tokens=1)
    assert (exact.result().reason, exact.result().generated_text) == ("eos_token", "A")
    stopped = Client(engine, PROMPT, constraint=compiled(Json(ANIMAL)), max_new_tokens=80, stop=("name",))
    assert stopped.result().reason == "stop_sequence"
    assert stopped.result().generated_text.endswith('"name')


def test_logprobs_are_those_of_the_model_without_the_constraint(make_engine, compiled) -> None:
    engine: Engine = make_engine()
    free = Client(engine, PROMPT, num_logprobs=3, max_new_tokens=1)
    forced = Client(engine, PROMPT, num_logprobs=3, constraint=compiled(Text("🦊")), max_new_tokens=8)
    assert forced.result().generated_text == "🦊"
    assert free.result().reason == "length"
    assert forced.tokens[0].top == free.tokens[0].top
    assert forced.tokens[0].logprob < free.tokens[0].top[-1].logprob


def test_a_constraint_that_takes_too_much_work_fails_its_request_alone(make_engine, compiled) -> None:
    engine: Engine = make_engine()
    other = Client(engine, PROMPT, max_new_tokens=20)
    client = Client(engine, PROMPT, constraint=compiled(Regex("((a{100}){100}){100}")), max_new_tokens=50)
    assert isinstance(client.error(), ConstraintFailedError)
    assert other.result().reason == "length"


def test_the_device_chooses_for_constrained_and_penalised_requests_as_the_host_does(
    small_store: Path, compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from server.model.device.running.assembly import load_device_runner
    from server.model.device.step import graphs
    from tests.server.model.device.small import DEVICE, TUNING

    if DEVICE.type == "cpu":
        monkeypatch.setattr(graphs, "Tuning", lambda: TUNING)
    options = RunnerOptions(device=DEVICE, dtype=torch.float32, num_slots=8, max_rows=4, max_tokens=64)
    constraint = compiled(Regex("[ab]{2}c"))

    def answers(load: Callable[..., Runner]) -> list[tuple[str, list[int]]]:
        engine = Engine(load)
        engine.start()
        try:
            engine.loaded.result(WAIT_SECONDS)
            clients = [
                Client(engine, PROMPT, constraint=constraint, max_new_tokens=12),
                Client(engine, PROMPT, constraint=constraint, do_sample=True, seed=4, max_new_tokens=12),
                Client(engine, PROMPT, presence_penalty=2.0, logit_bias={7: 3.0}, max_new_tokens=3),
                Client(engine, PROMPT, max_new_tokens=3),
            ]
            return [(client.result().generated_text, client.token_ids) for client in clients]
        finally:
            engine.stop(0)

    device = answers(lambda progress: load_device_runner(Store.open(small_store), options, proof=False))
    host = answers(lambda progress: HostRunner(load_model(Store.open(small_store), options), max_rows=4, max_tokens=64))
    assert device == host
    assert all(re.fullmatch("[ab]{2}c", text) for text, _ in device[:2])
