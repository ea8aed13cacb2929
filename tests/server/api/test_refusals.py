"""What is not taken: every bad body and parameter is refused before the response begins, in words of our own."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.api.running import Running, running, wait_until

JSON = {"content-type": "application/json"}
LEAK = "do-not-echo-me"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(max_body_bytes=100_000) as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


def refused(response: httpx.Response, status: int, error_type: str = "validation") -> str:
    """Check the shape of a refusal and return its message."""
    assert response.status_code == status, response.text
    payload = response.json()
    assert set(payload) == {"error", "error_type"}
    assert payload["error_type"] == error_type
    assert LEAK not in response.text
    assert len(response.content) < 1000
    assert response.headers["x-request-id"]
    return str(payload["error"])


USER = [{"role": "user", "content": "a"}]
CHATS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
IMAGE = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}
TEXT = {"type": "input_text"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": 5}}
PLACES: list[tuple[str, dict[str, Any], str, str]] = [
    (CHATS, {"messages": USER, "tool_choice": "all"}, "tool_choice", "'none', 'auto' or 'required'"),
    (CHATS, {"messages": USER, "tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
    (CHATS, {"messages": USER, "tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "must be function"),
    (CHATS, {"messages": USER, "tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "required"),
    (CHATS, {"messages": USER, "logit_bias": {"a": 1}}, "logit_bias.a", "pattern"),
    (CHATS, {"messages": ["a"]}, "messages[0]", "should be an object"),
    (CHATS, {"messages": USER, "response_format": {"type": "xml"}}, "response_format.type", "json_object, json_schema"),
    (CHATS, {"messages": USER, "response_format": SCHEMA}, "response_format.json_schema.schema", "an object"),
    (RESPONSES, {"input": [{"role": "user", "content": [TEXT]}]}, "input[0].content[0].text", "required"),
    (RESPONSES, {"input": "a", "tool_choice": {"type": "b", "name": "c"}}, "tool_choice.type", "'function'"),
    (
        MESSAGES,
        {"messages": [{"role": "user", "content": [IMAGE]}]},
        "messages[0].content[0].content[0].type",
        "images",
    ),
    (MESSAGES, {"messages": USER, "tools": [{"type": "bash_20250124", "name": "b"}]}, "tools[0].type", "input_schema"),
    (MESSAGES, {"messages": USER, "system": [{"type": "text"}]}, "system[0].text", "required"),
]


@pytest.mark.parametrize(("path", "body", "place", "wanted"), PLACES)
def test_a_refusal_names_the_place_in_the_clients_own_body(
    client: httpx.Client, path: str, body: dict[str, Any], place: str, wanted: str
) -> None:
    """No class of ours, no member of a union, and one problem only."""
    error = client.post(path, json={"max_tokens": 1, **body} if path == MESSAGES else body).json()["error"]
    assert error["message"].startswith(f"`{place}`: ")
    assert wanted in error["message"]
    assert error["message"].count("`") == 2
    assert error.get("param", place) == place


BODIES: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 400),
    "blank": (b"  \n", 400),
    "truncated": (b'{"inputs": "a', 400),
    "NaN": (b'{"inputs":"a","parameters":{"temperature":NaN}}', 400),
    "Infinity": (b'{"inputs":"a","parameters":{"temperature":Infinity}}', 400),
    "-Infinity": (b'{"inputs":"a","parameters":{"temperature":-Infinity}}', 400),
    "1e400": (b'{"inputs":"a","parameters":{"temperature":1e400}}', 400),
    "lone surrogate": (b'{"inputs":"\\ud800"}', 422),
    "lone surrogate in a key": (b'{"inputs":"a","\\ud800":1}', 422),
    "bad UTF-8": (b'{"inputs":"\xff\xfe"}', 400),
    "byte order mark": (b'\xef\xbb\xbf{"inputs":"a"}', 400),
    "UTF-16": ('{"inputs":"a"}'.encode("utf-16"), 400),
    "deep nesting": (b'{"inputs":' + b"[" * 20_000 + b"]" * 20_000 + b"}", 400),
    "deep nesting, never closed": (b"[" * 90_000, 400),
    "a string never closed, of escapes": (b'"' + b'\\"' * 45_000, 400),
    "many values": (b'{"inputs":"a","parameters":{"stop":[' + b'"",' * 30_000 + b'""]}}', 422),
    "5000 digits": (b'{"inputs":"a","parameters":{"seed":' + b"9" * 5000 + b"}}", 400),
    "duplicate keys": (b'{"inputs":"a","inputs":"b"}', 400),
    "duplicate keys inside": (b'{"inputs":"a","parameters":{"top_k":1,"top_k":2}}', 400),
    "an array": (b"[]", 422),
    "a number": (b"1", 422),
    "null": (b"null", 422),
    "no inputs": (b"{}", 422),
    "inputs null": (b'{"inputs":null}', 422),
    "inputs a number": (b'{"inputs":1}', 422),
    "inputs a list": (b'{"inputs":["a"]}', 422),
    "inputs empty": (b'{"inputs":""}', 422),
    "NUL": (b'{"inputs":"a\\u0000b"}', 422),
    "raw NUL": (b'{"inputs":"a\x00b"}', 400),
    "unknown field": (b'{"inputs":"a","do-not-echo-me <script>":1}', 422),
    "parameters a list": (b'{"inputs":"a","parameters":[]}', 422),
    "stream a string": (b'{"inputs":"a","stream":"true"}', 422),
    "stream a number": (b'{"inputs":"a","stream":1}', 422),
    "two documents": (b'{"inputs":"a"}{"inputs":"b"}', 400),
}


@pytest.mark.parametrize("name", BODIES)
def test_bad_body_is_refused(client: httpx.Client, name: str) -> None:
    body, status = BODIES[name]
    refused(client.post("/generate", content=body, headers=JSON), status)


PARAMETERS: list[tuple[str, Any]] = [
    ("max_new_tokens", 0),
    ("max_new_tokens", -1),
    ("max_new_tokens", 2**63),
    ("max_new_tokens", True),
    ("max_new_tokens", 1.5),
    ("max_new_tokens", "1"),
    ("max_new_tokens", 200),
    ("temperature", -1),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", 1e300),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_p", 0),
    ("top_p", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("typical_p", 0),
    ("typical_p", 1.1),
    ("repetition_penalty", 0),
    ("seed", -1),
    ("seed", 2**64),
    ("seed", 1.5),
    ("stop", {}),
    ("stop", [LEAK] * 17),
    ("stop", [LEAK * 100]),
    ("stop", [1]),
    ("truncate", 0),
    ("truncate", -5),
    ("top_n_tokens", -1),
    ("top_n_tokens", 1000),
    ("do_sample", 1),
    ("details", "yes"),
    ("best_of", 2),
    ("best_of", 10**9),
    ("best_of", True),
    ("frequency_penalty", 2.5),
    ("presence_penalty", -2.5),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"99999999": 1}),
    ("min_tokens", -1),
    ("min_tokens", 150),
    ("stop_token_ids", [5]),
    ("bad_words", ["a"]),
    ("use_beam_search", True),
    ("guided_json", {}),
    ("watermark", True),
    ("grammar", {"type": "json", "value": LEAK}),
    ("grammar", {"type": LEAK, "value": "a"}),
    ("grammar", {"type": "regex", "value": ""}),
    ("grammar", {"type": "regex", "value": LEAK * 1000}),
    ("grammar", {"type": "regex", "value": "served by nobody here"}),
    ("adapter_id", LEAK),
    ("temprature", 1),
]


@pytest.mark.parametrize(("name", "value"), PARAMETERS)
def test_bad_parameter_is_refused_by_its_name(client: httpx.Client, name: str, value: Any) -> None:
    for stream in (False, True):
        body = {"inputs": "a", "parameters": {name: value}, "stream": stream}
        response = client.post("/generate", content=json.dumps(body), headers=JSON)
        assert f"`parameters.{name}" in refused(response, 422)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 1),
        ("frequency_penalty", 0),
        ("presence_penalty", 0.0),
        ("watermark", False),
        ("typical_p", None),
        ("typical_p", 1),
        ("typical_p", 1.0),
        ("top_p", 1),
        ("top_p", 1.0),
        ("top_k", -1),
        ("top_k", 0),
        ("top_k", 2.0),
        ("min_p", 0),
        ("min_tokens", 0),
        ("repetition_penalty", 1.0),
        ("logit_bias", {}),
        ("temperature", 0),
        ("temperature", 0.0),
        ("temperature", 1),
        ("stop", []),
        ("stop", [""]),
        ("stop", ""),
        ("stop_token_ids", []),
        ("do_sample", False),
        ("top_n_tokens", 0),
        ("seed", 1e3),
    ],
)
def test_neutral_value_is_taken(client: httpx.Client, name: str, value: Any) -> None:
    response = client.post("/generate", json={"inputs": "a", "parameters": {name: value, "max_new_tokens": 1}})
    assert response.status_code == 200


def test_prompt_at_the_context_limit_is_taken_and_one_more_is_refused(client: httpx.Client) -> None:
    body = {"inputs": "a" * 199, "parameters": {"max_new_tokens": 1}}
    assert client.post("/generate", json=body).status_code == 200
    for length in (200, 201, 5000):
        assert "shorten the prompt" in refused(client.post("/generate", json={"inputs": "a" * length}), 422)
    body["parameters"] = {"max_new_tokens": 2}
    assert "ask for at most 1" in refused(client.post("/generate", json=body), 422)


def test_prompt_details_cannot_be_streamed(client: httpx.Client) -> None:
    body = {"inputs": "a", "parameters": {"decoder_input_details": True}, "stream": True}
    assert "decoder_input_details" in refused(client.post("/generate", json=body), 422)


def test_long_body_is_refused_by_its_declared_length_and_by_its_real_one(client: httpx.Client) -> None:
    body = json.dumps({"inputs": LEAK * 10_000}).encode()
    refused(client.post("/generate", content=body, headers=JSON), 413)
    refused(client.post("/generate", content=iter([body[:50_000], body[50_000:]]), headers=JSON), 413)


def test_declared_length_of_gigabytes_is_refused_before_anything_is_read(server: Running) -> None:
    for length in (20 * 2**30, 10**30):
        with server.raw() as connection:
            head = (
                "POST /generate HTTP/1.1\r\nHost: localhost\r\n"
                f"Content-Type: application/json\r\nContent-Length: {length}"
            )
            connection.sendall(head.encode() + b"\r\n\r\n")
            assert connection.recv(20).split()[1] in (b"413", b"400")


def test_compressed_body_and_other_types_are_refused(client: httpx.Client) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    refused(client.post("/generate", content=bomb, headers={**JSON, "content-encoding": "gzip"}), 415)
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        refused(client.post("/generate", content=b'{"inputs":"a"}', headers={"content-type": media_type}), 415)


@pytest.fixture(scope="module")
def impatient() -> Iterator[Running]:
    with running(receive_seconds=0.3) as found:
        yield found


def test_body_that_does_not_come_is_given_up(impatient: Running) -> None:
    with impatient.raw() as connection:
        head = (
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        connection.sendall(head)
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_headers_that_do_not_come_are_given_up(impatient: Running) -> None:
    for beginning in (b"", b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Slow: "):
        with impatient.raw() as connection:
            connection.sendall(beginning)
            wait_until(lambda: connection.recv(1) == b"")


def test_connection_serves_many_requests_and_is_not_given_up_while_it_waits(server: Running) -> None:
    with server.raw() as connection:
        for _ in range(3):
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_long_headers_and_malformed_requests_are_refused(server: Running) -> None:
    for request in (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 100_000,
        b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n" + b"X-Many: a\r\n" * 4_000 + b"\r\n",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nno length\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nBad Header\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ):
        with server.raw() as connection:
            try:
                connection.sendall(request)
                answer = connection.recv(4096)
            except ConnectionError:
                continue
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error_type"] == "validation"


def test_unknown_path_and_method_have_the_same_shape(client: httpx.Client) -> None:
    refused(client.get(f"/{LEAK}"), 404, "not_found")
    refused(client.get("/generate/"), 405, "method_not_allowed")
    refused(client.post("/../etc/passwd"), 404, "not_found")
    refused(client.get("/generate"), 405, "method_not_allowed")
    response = client.request("DELETE", "/experts")
    refused(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "GET"


def test_request_id_is_kept_when_it_is_plain_and_replaced_when_it_is_not(client: httpx.Client) -> None:
    assert client.get("/health/live", headers={"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    for bad in ("a b", "x" * 65, 'a"b', "../a", ""):
        assert client.get("/health/live", headers={"x-request-id": bad}).headers["x-request-id"] != bad


def test_connections_over_the_limit_are_refused() -> None:
    with running(max_connections=2) as server:
        held = [server.raw(), server.raw()]
        wait_until(lambda: len(server.listener.server_state.connections) == 2)
        with server.raw() as third:
            assert third.recv(4096).startswith(b"HTTP/1.1 503 ")
        for connection in held:
            connection.close()
        wait_until(lambda: not server.listener.server_state.connections)
        with server.client() as client:
            assert client.get("/health/live").status_code == 200


def test_no_cross_origin_headers(client: httpx.Client) -> None:
    response = client.options(
        "/generate", headers={"origin": "https://a.example", "access-control-request-method": "POST"}
    )
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", ["a.example", "a.example:8080", "127.0.0.1.a.example", "[2001:db8::1]:80", "10.0.0.1"])
def test_without_a_key_another_hosts_name_is_refused(client: httpx.Client, host: str) -> None:
    refused = client.post("/generate", json={"inputs": "a"}, headers={"host": host})
    assert (refused.status_code, refused.json()["error_type"]) == (421, "misdirected")
    assert host not in refused.text
    assert client.get("/v1/models", headers={"host": host}).json()["error"]["code"] == "misdirected"
    assert client.get("/health/live", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["localhost:1", "LOCALHOST", "a.localhost", "127.0.0.9", "[::1]:8080", "localhost."])
def test_without_a_key_every_name_of_this_machine_is_taken(client: httpx.Client, host: str) -> None:
    assert client.get("/info", headers={"host": host}).status_code == 200


def test_with_a_key_any_name_is_taken() -> None:
    with running(api_key="0123456789") as server, server.client() as client:
        headers = {"host": "a.example", "authorization": "Bearer 0123456789"}
        assert client.get("/info", headers=headers).status_code == 200


def test_bodies_of_any_size_are_refused_at_the_limits_that_everybody_has() -> None:
    bodies: dict[str, tuple[bytes, int]] = {
        "nested 200,000 deep": (b'{"inputs":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 400),
        "100,000 stops": (b'{"inputs":"a","parameters":{"stop":[' + b'"x",' * 100_000 + b'"x"]}}', 400),
        "a value of 20 MB": (json.dumps({"inputs": 1, "x": LEAK * 1_500_000}).encode(), 413),
    }
    with running() as server, server.client() as client:
        for name, (body, status) in bodies.items():
            begin = time.process_time()
            refused(client.post("/generate", content=body, headers=JSON), status)
            assert time.process_time() - begin < 5, name
        assert client.post("/generate", json={"inputs": "a"}).status_code == 200
