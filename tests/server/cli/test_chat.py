"""`deepfew chat`: lines typed, answers shown, the conversation kept."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.api.chat.parser import Content, Delta, Thinking
from server.cli.chat import HELP, ChatError, Conversation
from tests import command_line
from tests.command_line import Ended
from tests.server.api.running import running
from tests.server.api.test_tools import THINKS, serving


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives these lines to `input`; an exception among them is raised."""

    def give(*lines: str | type[BaseException]) -> None:
        waiting: Iterator[Any] = iter([*lines, EOFError])

        def read(prompt: str = "") -> str:
            line = next(waiting)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)

    return give


def chat(*arguments: object) -> Ended:
    return command_line.run("chat", *arguments)


def test_a_conversation_with_a_store(tiny_store: Path, typed: Any, tmp_path: Path) -> None:
    file = tmp_path / "said.json"
    typed("The capital of France?", "/system Be short.", "And of Italy?", f"/save {file}", "/new", f"/save {file}2")
    ended = chat(tiny_store, "--temperature", 0, "--max-new-tokens", 12, "--device", "cpu", "--dtype", "float32")
    assert (ended.status, ended.err) == (0, "")
    saved = json.loads(file.read_text())
    assert [message["role"] for message in saved] == ["system", "user", "assistant", "user", "assistant"]
    assert "Paris" in saved[2]["content"]
    assert saved[2]["content"] in ended.out
    assert json.loads(Path(f"{file}2").read_text()) == saved[:1]


def test_a_conversation_with_a_running_server(typed: Any) -> None:
    with serving("It may rain.\n</think>\n\nRain.", THINKS) as (_, server):
        typed("Weather?", "And then?", "/exit")
        ended = chat(server.url, "--system", "Be short.", "--pool", 2)
        assert ended.status == 0
        assert ended.out.count("It may rain.") == ended.out.count("Rain.") == 2
        prompt = "".join(map(chr, server.engine.submitted[-1].prompt_ids))
        assert prompt.startswith("<system>Be short.\n<user>Weather?\n<assistant>Rain.\n<user>And then?")
        assert server.engine.submitted[-1].masking is not None


def test_a_key_opens_a_guarded_server(typed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(api_key="correct-horse-battery") as server:
        typed("Where?")
        assert "the API key is missing or wrong" in chat(server.url).out
        monkeypatch.setenv("DEEPFEW_API_KEY", "correct-horse-battery")
        typed("Where?")
        assert "Paris" in chat(server.url).out


def test_refusals_are_told_and_the_conversation_goes_on(typed: Any, tmp_path: Path) -> None:
    file = tmp_path / "said.json"
    with running() as server:
        typed("a<|end|>b", "Where?", f"/save {file}", "/save", f"/save {tmp_path}", "/unknown", "/system", "/help")
        out = chat(server.url).out
    assert "contains the text of a special token" in out
    assert [message["content"] for message in json.loads(file.read_text())] == ["Where?", " Paris, the city of light."]
    for told in ("name the file", "cannot be written", "no command /unknown", "the system says: nothing", HELP):
        assert told in out
    typed("Where?")
    assert "cannot be reached" in chat("http://127.0.0.1:9").out


def test_what_is_no_server_of_chats_is_told(typed: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            for told in (b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: {\n"):
                taken, _ = listening.accept()
                with taken:
                    while b"messages" not in taken.recv(65536):
                        pass
                    taken.sendall(told)

        with ThreadPoolExecutor(1) as thread:
            answered = thread.submit(answer)
            typed("Where?", "Here?")
            status, out, _ = chat(f"http://127.0.0.1:{listening.getsockname()[1]}")
            answered.result()
    assert status == 2
    assert out.count("does not speak as a server of chats does") == 2


def test_an_address_without_its_scheme_is_no_store() -> None:
    status, _, err = chat("127.0.0.1:8080")
    assert status == 2
    assert "begins with http://, as in http://127.0.0.1:8080" in err


def test_a_value_out_of_its_range_is_told(tiny_store: Path, typed: Any) -> None:
    typed("Where?")
    assert "`temperature`" in chat(tiny_store, "--temperature", 7, "--device", "cpu").out


def test_ctrl_c_stops_an_answer_that_stays_as_far_as_it_goes(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    closed: list[bool] = []

    def answer(body: dict[str, Any]) -> Any:
        try:
            yield Thinking("Hm")
            yield Content("Once upon")
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    conversation = Conversation(answer, {}, None)
    typed("Tell me.", KeyboardInterrupt, "/exit")
    conversation.run()
    assert closed == [True]
    assert conversation.messages == [
        {"role": "user", "content": "Tell me."},
        {"role": "assistant", "content": "Once upon", "reasoning_content": "Hm"},
    ]
    out = capsys.readouterr().out
    assert "(stopped)" in out
    assert "Ctrl-D ends the chat" in out


def test_a_message_that_was_refused_does_not_stay(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def answer(body: dict[str, Any]) -> Iterator[Delta]:
        asked.append(body)
        if len(asked) == 1:
            raise ChatError("`input[text]` is too long")
        yield Content("Yes.")

    conversation = Conversation(answer, {"seed": 1}, None)
    typed("a", "b")
    conversation.run()
    assert asked[1] == {"seed": 1, "messages": [{"role": "user", "content": "b"}]}
    assert [message["content"] for message in conversation.messages] == ["b", "Yes."]
    assert "error: `input[text]` is too long" in capsys.readouterr().out
