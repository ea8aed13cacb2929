"""The front: what a client gets from the replicas behind it, and what it gets when they end."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse
from starlette.types import Message

from server.api.front import MAX_TRIES, Front, answer_of
from server.api.replicas import PassedRequest, ReplicaLostError
from server.growth.fleet import FleetStore
from server.serving.service import NotReadyError
from server.settings.schema import HttpSettings

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
LOST = ReplicaLostError("the replica ended")


def _body(text: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


class _Replicas:
    """Replicas whose answers are given: messages, and errors to raise between them. One list for each try."""

    def __init__(self, *answers: Sequence[Message | Exception]) -> None:
        self.answers = list(answers)
        self.requests: list[PassedRequest] = []
        self.num_closed = 0

    async def open(self, request: PassedRequest) -> AsyncGenerator[Message, None]:
        self.requests.append(request)
        try:
            for message in self.answers[len(self.requests) - 1]:
                if isinstance(message, Exception):
                    raise message
                if message["type"] == "wait":
                    await asyncio.Event().wait()
                yield message
        finally:
            self.num_closed += 1

    async def stores(self) -> Mapping[str, FleetStore]:
        return {}  # of replicas whose store cannot change

    async def ask_all(self, request: PassedRequest) -> Mapping[str, tuple[int, bytes]]:
        if request.path == "/experts/reload":
            return {"all-0": (200, b'{"added":1}'), "all-1": (409, b'{"error":"busy"}')}
        return {f"all-{at}": (200, b"# TYPE x gauge\nx 1.0\n") for at in range(2)}


def _ask(
    replicas: _Replicas, path: str = "/generate", body: bytes = b"{}", leaves: bool = False, method: str = "POST"
) -> list[Message]:
    """The messages that a client gets; a client that leaves does so after the first of them."""
    sent: list[Message] = []

    async def run() -> None:
        has_sent = asyncio.Event()
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            await (has_sent if leaves else asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)
            has_sent.set()

        scope = {"type": "http", "method": method, "path": path, "headers": [(b"host", b"localhost")]}
        await Front(replicas, HttpSettings(max_body_bytes=1000))(scope, receive, send)

    asyncio.run(run())
    return sent


def _json(sent: list[Message]) -> tuple[int, Any]:
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def test_a_request_is_passed_on_as_it_is_and_its_answer_back() -> None:
    replicas = _Replicas([START, _body(b"data: 1\n\n"), _body(b"", False)])
    assert _ask(replicas, "//generate/", b'{"inputs": "a"}') == [START, _body(b"data: 1\n\n"), _body(b"", False)]
    (request,) = replicas.requests
    assert (request.method, request.path, request.body) == ("POST", "/generate", b'{"inputs": "a"}')
    assert request.headers == ((b"host", b"localhost"),)


def test_head_stays_head_so_that_a_stream_without_an_end_ends() -> None:
    replicas = _Replicas([START, _body(b"", more=False)])
    _ask(replicas, "//experts/live/", body=b"", method="HEAD")
    assert [(request.method, request.path) for request in replicas.requests] == [("HEAD", "/experts/live")]


def test_a_request_runs_again_where_the_client_saw_nothing() -> None:
    replicas = _Replicas([LOST], [START, LOST], [START, _body(b"data: 1\n\n"), _body(b"", False)])
    assert _ask(replicas) == [START, _body(b"data: 1\n\n"), _body(b"", False)]
    assert len(replicas.requests) == MAX_TRIES


def test_a_request_that_fails_everywhere_gets_an_error_in_its_dialect() -> None:
    status, answer = _json(_ask(_Replicas(*[[LOST]] * MAX_TRIES), "/v1/completions"))
    assert status == 500
    assert answer["error"]["message"] == "the replica ended"


def test_a_change_of_the_store_is_never_asked_for_twice() -> None:
    replicas = _Replicas([LOST], [START])
    assert _json(_ask(replicas, "/experts/grow"))[0] == 500
    assert len(replicas.requests) == 1


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("/generate_stream", b'data: {"error":"the replica ended","error_type":"incomplete_generation"}\n\n'),
        ("/v1/completions", b'data: {"error":{"message":"the replica ended"'),
        ("/v1/messages", b"event: error\ndata: "),
    ],
)
def test_a_stream_that_the_client_has_seen_ends_with_an_error(path: str, last: bytes) -> None:
    replicas = _Replicas([START, _body(b"data: 1\n\n"), LOST], [START])
    sent = _ask(replicas, path)
    assert sent[:2] == [START, _body(b"data: 1\n\n")]
    assert sent[2]["body"].startswith(last)
    assert sent[2]["more_body"] is False
    assert len(replicas.requests) == 1


def test_an_answer_that_is_no_stream_breaks_off_and_no_second_one_begins() -> None:
    start = {**START, "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(ReplicaLostError):
        _ask(_Replicas([start, _body(b'{"a":'), LOST]))


def test_an_unexpected_error_is_said_in_the_dialect_without_its_text() -> None:
    status, answer = _json(_ask(_Replicas([KeyError("secret")]), "/v1/completions"))
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert "secret" not in json.dumps(answer)
    with pytest.raises(KeyError):
        _ask(_Replicas([START, _body(b"data: 1\n\n"), KeyError("secret")]))


def test_no_replica_in_time_is_503() -> None:
    status, answer = _json(_ask(_Replicas([NotReadyError("no replica took the request")])))
    assert (status, answer["error_type"]) == (503, "healthcheck")


def test_a_client_that_leaves_closes_its_request() -> None:
    replicas = _Replicas([START, _body(b"data: 1\n\n"), {"type": "wait"}])
    assert _ask(replicas, leaves=True) == [START, _body(b"data: 1\n\n")]
    assert replicas.num_closed == 1


def test_a_body_that_is_too_long_reaches_no_replica() -> None:
    replicas = _Replicas()
    assert _json(_ask(replicas, body=b"x" * 1001))[0] == 413
    assert replicas.requests == []


def test_liveness_needs_no_replica() -> None:
    assert _json(_ask(_Replicas(), "/health/live")) == (200, {"status": "ok"})


def test_metrics_are_those_of_all_replicas() -> None:
    sent = _ask(_Replicas(), "/metrics", method="GET")
    assert sent[1]["body"] == b'# TYPE x gauge\nx{replica="all-0"} 1.0\nx{replica="all-1"} 1.0\n'


def test_all_replicas_take_a_changed_store_and_a_refusal_of_one_is_told() -> None:
    assert _json(_ask(_Replicas(), "/experts/reload")) == (409, {"error": "busy"})


def _application() -> FastAPI:
    application = FastAPI()

    @application.post("/echo")
    async def echo(request: Request) -> JSONResponse:
        return JSONResponse({"body": (await request.body()).decode(), "key": request.headers["x-key"]})

    @application.post("/broken")
    async def broken() -> None:
        raise KeyError("broken")

    return application


async def _messages(path: str) -> list[Message]:
    request = PassedRequest("POST", path, b"", ((b"x-key", b"k"),), b"text")
    return [message async for batch in answer_of(_application(), request) for message in batch]


def test_an_application_answers_a_passed_request() -> None:
    start, *bodies = asyncio.run(_messages("/echo"))
    assert start["status"] == 200
    assert json.loads(b"".join(message["body"] for message in bodies)) == {"body": "text", "key": "k"}


def test_an_error_of_the_application_is_raised() -> None:
    with pytest.raises(KeyError, match="broken"):
        asyncio.run(_messages("/broken"))


def test_closing_an_answer_cancels_the_application() -> None:
    async def run() -> list[str]:
        seen: list[str] = []

        async def application(scope: Any, receive: Any, send: Any) -> None:
            await send(START)
            try:
                await receive()
                await receive()
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        answer = answer_of(application, PassedRequest("POST", "/", b"", (), b""))
        seen.append((await anext(answer))[0]["type"])
        await answer.aclose()
        return seen

    assert asyncio.run(run()) == ["http.response.start", "cancelled"]
