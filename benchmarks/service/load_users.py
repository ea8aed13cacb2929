"""Locust users of one server, a process of their own: `python -m benchmarks.service.load_users URL …` prints JSON.

A closed loop: every user sends its next request when its last was answered, and leaves after its number of requests.
Each is a greedy stream of `POST /v1/completions`; with `--chats` a user's request is its last one, the answer to it,
and a new turn. Locust starts the users, keeps the failures and the count; times are taken at the lines of the stream,
which locust does not see, and reported to it as requests of type SSE. Its
percentiles are rounded, so every time is printed as it was.

A process of its own because locust replaces the standard library's sockets when it is imported.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from typing import Any

import gevent
from locust import FastHttpUser, constant, events, task
from locust.env import Environment
from locust.exception import StopUser

from benchmarks.harness.servers import PROMPTS

TIMEOUT_SECONDS = 600
TURN_WORDS = 60
WORDS = "the dog went to the harbour and saw a ship that came from a city far away with nine sailors and one old cat"


def main() -> None:
    """Run the users and print one JSON object: seconds, failures, and the answers with their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--users", type=int, required=True)
    parser.add_argument("--requests", type=int, required=True, help="of each user")
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--chats", action="store_true", help="requests of a user grow by its answers")
    arguments = parser.parse_args()
    logging.getLogger("locust").setLevel(logging.ERROR)
    counts = (arguments.users, arguments.requests, arguments.max_tokens)
    print(json.dumps(run(arguments.url, arguments.model, *counts, chats=arguments.chats)))


def run(url: str, model: str, users: int, requests: int, max_tokens: int, *, chats: bool) -> dict[str, Any]:
    """Times in seconds; `answers` as (prompt, text, TTFT, latency, turn) in the order in which they ended."""
    answers: list[tuple[str, str, float, float, int]] = []
    numbers = iter(range(users))

    class CompletionUser(FastHttpUser):
        host = url
        wait_time = constant(0)
        network_timeout = connection_timeout = TIMEOUT_SECONDS

        def on_start(self) -> None:
            self.number, self.turn, self.chat = next(numbers), 0, ""

        @task
        def complete(self) -> None:
            if self.turn == requests:
                raise StopUser
            prompt = PROMPTS[(self.number + self.turn) % len(PROMPTS)]
            if chats:
                prompt = self.chat + _turn(self.number, self.turn)
            self.turn += 1
            begin = time.perf_counter()
            found = _ask(self, model, prompt, max_tokens)
            if found is not None:
                text, first = found
                latency = time.perf_counter() - begin
                answers.append((prompt, text, first, latency, self.turn))
                self.chat = prompt + text
                self.environment.events.request.fire(
                    request_type="SSE",
                    name="whole stream",
                    response_time=latency * 1000,
                    response_length=len(text),
                    exception=None,
                    context={},
                )

    environment = Environment(user_classes=[CompletionUser], events=events)
    runner = environment.create_local_runner()
    begin = time.perf_counter()
    runner.start(users, spawn_rate=users)
    runner.spawning_greenlet.join()
    while runner.user_count:
        gevent.sleep(0.005)
    seconds = time.perf_counter() - begin
    runner.quit()
    reasons = [f"{error.name}: {error.error}" for error in environment.stats.errors.values()]
    return {"seconds": seconds, "failures": users * requests - len(answers), "reasons": reasons, "answers": answers}


def _turn(user: int, turn: int) -> str:
    """What a user says in a turn of a chat: as many words for all, in an order of each user's own."""
    words = WORDS.split()
    return " ".join(words[((2 * user + 3) * at + turn) % len(words)] for at in range(TURN_WORDS)) + ". "


def _ask(user: FastHttpUser, model: str, prompt: str, max_tokens: int) -> tuple[str, float] | None:
    """The text of one streamed answer and the seconds to its first chunk with text; None when it failed."""
    body = {
        "model": model,
        "prompt": prompt,
        "stream": True,
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    begin, first, text = time.perf_counter(), None, ""
    with user.client.post("/v1/completions", json=body, stream=True, catch_response=True) as response:
        if response.status_code != 200:
            response.failure(f"status {response.status_code}")
            return None
        is_whole = False
        while line := response.stream.readline(b"\n"):
            event = line.strip().removeprefix(b"data: ")
            if not event.startswith(b"{"):
                continue
            found = json.loads(event)
            if "error" in found:
                response.failure(str(found["error"])[:200])
                return None
            for choice in found.get("choices", []):
                piece = choice.get("text") or ""
                if piece and first is None:
                    first = time.perf_counter() - begin
                text += piece
                is_whole = is_whole or choice.get("finish_reason") is not None
        if not is_whole:
            response.failure("the stream ended without a reason")
            return None
        response.success()
    return text, time.perf_counter() - begin if first is None else first


if __name__ == "__main__":
    main()
