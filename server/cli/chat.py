"""`deepfew chat STORE|URL`: a conversation in the terminal, in this process or with a running server.

Both ways send the same `ChatRequest` and give the same parts of an answer. Invariant: an answer that was stopped or
that broke off stays in the conversation as far as it goes; a message that was refused does not.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from extractor.cli.progress import progress_bar
from server.api.chat.parser import AnswerReader, Content, Delta, Thinking
from server.api.chat.template import prompt_of
from server.api.http.engine_requests import request_of
from server.api.http.errors import validation_failed
from server.api.openai.schemas import ChatRequest
from server.cli.flags import with_settings
from server.cli.generate import AdapterOption, OnMissingOption, PoolOption, ProfileOption
from server.engine.request import Event, FailedEvent, FinishedEvent
from server.errors import ServerError, UsageError
from server.model.load_progress import LoadProgress
from server.serving.loading import check_store, load
from server.serving.logging_setup import configure_logging
from server.serving.service import LoadedModel
from server.settings.load import Resolved

Parts = Generator[Delta, None, None]
Answering = Callable[[dict[str, Any]], Parts]
"""Gives the parts of the answer to a body of `/v1/chat/completions`; closing it stops the answer."""

HELP = """\
/system TEXT  set what the system says, from the next answer on; without a text, show it
/new          forget the conversation
/save FILE    write the conversation as JSON, in the form of `messages`
/help         show this
/exit         end, as does Ctrl-D
Ctrl-C stops an answer; what was said of it stays in the conversation."""
REMOTE_SECONDS = 600
_HOST_AND_PORT = re.compile(r"[\w.-]+:[0-9]{1,5}(/v1)?/?")


class ChatError(ServerError):
    """The running server refused a message or could not be reached."""


@with_settings("model", "engine", "masks", "log", store_required=True)
def chat(
    resolved: Resolved,
    *,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="Said by the system.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(metavar="N", help="Most tokens of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="N", help="Divides the logits; 0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed gives the same answers.")] = None,
    profile: ProfileOption = None,
    pool: PoolOption = None,
    adapter: AdapterOption = "auto",
    on_missing: OnMissingOption = "mask",
) -> int:
    """Chat in the terminal with a store, or with a running server by its address (http://…).

    Messages may come from a pipe, a line each; the exit status is then 2 if one got no answer.
    """
    settings = resolved.settings
    configure_logging(settings.log.log_format, "error")
    asked = {
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "profile": profile,
        "pool": pool,
        "adapter": None if adapter == "auto" else adapter,
        "on_missing": on_missing,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    url = re.sub(r"^(https?):/+", r"\1://", str(settings.store))  # a path keeps one slash of two
    if "://" in url:
        key = settings.http.api_key
        answer = _remote(url.rstrip("/"), None if key is None else key.get_secret_value())
        return Conversation(answer, asked, system).run()
    if _HOST_AND_PORT.fullmatch(url) and not Path(url).exists():
        raise UsageError(f"{url} is no directory; the address of a server begins with http://, as in http://{url}")
    check_store(settings)
    with progress_bar("loading") as bar:
        model = load(
            settings, LoadProgress(on_change=lambda progress: bar.show(str(progress.phase), progress.share, 1.0))
        )
    try:
        return Conversation(_local(model), asked, system).run()
    finally:
        model.engine.stop(0.0)


def _local(model: LoadedModel) -> Answering:
    """Answers by an engine of this process."""

    def answer(body: dict[str, Any]) -> Parts:
        try:
            asked = ChatRequest.model_validate(body)
        except ValidationError as error:
            raise validation_failed(error) from None
        prompt = prompt_of(model.tokenizer, asked.chat())
        sampling = prompt.sampling(
            model, asked, max_tokens=asked.max_tokens, temperature=asked.temperature, seed=asked.draw_seed
        )
        request = request_of(model, prompt.ids, sampling, asked)
        reader = AnswerReader(prompt.parser())
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        model.engine.submit(request, events.put)
        try:
            while True:
                event = events.get()
                if isinstance(event, FailedEvent):
                    raise event.error
                if isinstance(event, FinishedEvent):
                    yield from reader.read([], event)
                    return
                yield from reader.read([event], None)
        finally:
            model.engine.cancel(request.request_id)

    return answer


def _remote(url: str, key: str | None) -> Answering:
    """Answers by the server at `url`."""
    address = f"{url.removesuffix('/v1')}/v1/chat/completions"
    headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})

    def answer(body: dict[str, Any]) -> Parts:
        data = json.dumps({**body, "stream": True}).encode()
        request = urllib.request.Request(address, data=data, headers=headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=REMOTE_SECONDS) as response:
                for line in response:
                    if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                        yield from _parts(json.loads(line.removeprefix(b"data: ")))
        except urllib.error.HTTPError as error:
            with error:
                raise ChatError(f"{url} refused it: {_reason(error.read())}") from error
        except OSError as error:
            raise ChatError(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from error
        except (http.client.HTTPException, ValueError) as error:
            raise ChatError(f"{url} broke off, or does not speak as a server of chats does: {error}") from error

    return answer


def _parts(event: dict[str, Any]) -> Iterator[Delta]:
    if "error" in event:
        raise ChatError(str(event["error"].get("message")))
    for choice in event.get("choices", ()):
        if text := choice["delta"].get("reasoning_content"):
            yield Thinking(text)
        if text := choice["delta"].get("content"):
            yield Content(text)


def _reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace") or "it gave no reason"


class Conversation:
    """The messages so far, and the loop that asks for the next.

    Args:
        answer: gives answers.
        asked: fields of every request beside the messages.
        system: said by the system, if anything.
    """

    def __init__(self, answer: Answering, asked: dict[str, Any], system: str | None) -> None:
        self._answer, self._asked, self._system = answer, asked, system
        self._said: list[dict[str, Any]] = []
        self._has_failed = False
        self._console = Console(highlight=False, soft_wrap=True)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The system's message, if there is one, and all that was said."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        return system + self._said

    def run(self) -> int:
        """Take lines until the end of the input; returns 2 if a message from a pipe got no answer, else 0."""
        is_typed = sys.stdin.isatty()
        if is_typed:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # gives `input` its editing and its history
            self._note("type a message; /help shows the commands")
        while True:
            try:
                line = input("> " if is_typed else "").strip()
            except EOFError:
                return self._status(is_typed)
            except KeyboardInterrupt:
                self._note("\n/exit or Ctrl-D ends the chat")
                continue
            if line == "/exit":
                return self._status(is_typed)
            if line.startswith("/"):
                self._command(*line.partition(" ")[::2])
            elif line:
                self._say(line)

    def _status(self, is_typed: bool) -> int:
        return 2 if self._has_failed and not is_typed else 0

    def _command(self, name: str, text: str) -> None:
        text = text.strip()
        if name == "/system":
            if text:
                self._system = text
            self._note(f"the system says: {self._system or 'nothing'}")
        elif name == "/new":
            self._said.clear()
            self._note("the conversation is forgotten")
        elif name == "/save":
            self._save(text)
        elif name == "/help":
            self._console.print(HELP, markup=False)
        else:
            self._note(f"there is no command {name}; /help shows all")

    def _save(self, file: str) -> None:
        if not file:
            self._note("name the file: /save FILE")
            return
        try:
            Path(file).expanduser().write_text(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n")
        except OSError as error:
            self._note(f"{file} cannot be written: {error.strerror}")
        else:
            self._note(f"{len(self.messages)} messages are in {file}")

    def _say(self, text: str) -> None:
        """One message and its answer."""
        self._said.append({"role": "user", "content": text})
        content: list[str] = []
        thinking: list[str] = []
        begin = time.monotonic()
        try:
            with contextlib.closing(self._answer({**self._asked, "messages": self.messages})) as parts:
                for part in parts:
                    self._show(part, content, thinking)
        except KeyboardInterrupt:
            self._note("\n(stopped)")
        except ServerError as error:
            self._has_failed = True
            begun = "\n" if content or thinking else ""
            self._console.print(f"{begun}error: {error}", style="red", markup=False)
            if not content:
                self._said.pop()
                return
        else:
            self._note(f"\n({time.monotonic() - begin:.1f} s)" if sys.stdout.isatty() else "")
        answer: dict[str, Any] = {"role": "assistant", "content": "".join(content)}
        if thinking:
            answer["reasoning_content"] = "".join(thinking)
        self._said.append(answer)

    def _show(self, part: Delta, content: list[str], thinking: list[str]) -> None:
        if isinstance(part, Thinking):
            thinking.append(part.text)
            self._console.print(part.text, style="dim", end="", markup=False)
        elif isinstance(part, Content):
            if thinking and not content:
                self._console.print()
            content.append(part.text)
            self._console.file.write(part.text)
            self._console.file.flush()

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False)
