"""A server is ready only with a model that can answer a completion and a chat."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.readiness import UnservableModelError, checked
from server.errors import SettingsError
from tests.server.api.running import running, wait_until
from tests.server.api.scripted import CharTokenizer, ScriptedEngine, loaded


class Wordless(CharTokenizer):
    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": []}


def with_template(template: str | None) -> CharTokenizer:
    tokenizer = CharTokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CharTokenizer.chat_template, None])
def test_a_model_that_can_answer_passes_with_and_without_a_chat_template(template: str | None) -> None:
    engine = ScriptedEngine()
    model = loaded(engine, tokenizer=with_template(template))
    assert checked(model) is model
    assert engine.state == "ready"


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"tokenizer": Wordless()}, UnservableModelError, "makes no tokens of 'Hello'"),
        ({"tokenizer": with_template("{% for")}, UnservableModelError, "an error in line 1"),
        ({"tokenizer": with_template("fixed")}, UnservableModelError, "does not show the text"),
        ({"vocab_size": 100}, UnservableModelError, "makes token 117 of 'Hello', and the model has 100"),
        ({"max_context_tokens": 23}, SettingsError, "has 23 tokens: set at least 24"),
    ],
)
def test_a_model_that_can_serve_nobody_is_never_ready(
    change: dict[str, Any], error: type[Exception], reason: str
) -> None:
    engine = ScriptedEngine()
    with pytest.raises(error, match=reason):
        checked(loaded(engine, **change))
    assert engine.state == "stopped"
    with running(ScriptedEngine(), load=lambda progress: checked(loaded(engine, **change))) as server:
        with server.client() as client:
            wait_until(lambda: server.service.error is not None)
            ready = client.get("/health/ready")
            assert (ready.status_code, ready.json()["state"]) == (503, "failed")
