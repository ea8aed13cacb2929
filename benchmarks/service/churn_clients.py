"""The clients of the churn benchmark: their requests, and the verdict on each answer.

Invariant: a request ends in an answer, a refusal, an error event, or a failure that a fault of that time explains;
every other end is in `lost`. An answer that is not the known one is in `wrong`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.service.churn_server import ChurnServer, Disk

STORY = (
    "Once there was a boy called Hugo. He lived in the meadow with his uncle, and he had a boat. One day he went far. "
)
PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "Water is",
    "The moon",
    "In the city of",
    STORY * 3,
    STORY * 3 + "The boat was",
    STORY * 5 + "Hugo said",
)
"""The last ones begin alike, and are long enough to be found in KV memory."""
LONG_PROMPTS = tuple(f"{name} told me this. " + STORY * 5 for name in ("Anna", "Ben", "Carl", "Dora", "Emma", "Frank"))
"""They have nothing in common, so that four of them at once need more KV memory than there is at the start."""
LONG_PERIOD_SECONDS, LONG_SECONDS = 200.0, 50.0
"""In the first part of every period clients send long prompts, so that memory moves to and fro."""
REFUSED = {400, 413, 415, 422, 429}
NUM_TOKENS = 24
HUNG_ANSWERS = 200
OUTAGE_PAUSE_SECONDS = 0.3
UNREAD = "could not be read"


@dataclass
class Sent:
    """One request: when it was begun, when its last byte had been sent, and how many answers others had got by then."""

    name: str
    begin: float
    others: int
    sent: float = float("inf")


class Clients:
    """Clients of one server and what they saw.

    Args:
        server, disk: what was done to them explains what a client saw.
        model: name of the served model.
        seed: of every choice.

    Attributes:
        seen: requests by kind and outcome.
        num_answered: whole answers that were read to their end.
        num_unseen: the most answers that the server may have finished and nobody read.
    """

    def __init__(self, server: ChurnServer, disk: Disk, model: str, seed: int) -> None:
        self._server = server
        self._disk = disk
        self._model = model
        self._random = random.Random(seed)
        self._reference: dict[tuple[str, str], str] = {}
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.lost: list[str] = []
        self.num_answered = 0
        self.num_unseen = 0
        self._pause_until = 0.0
        self._began = time.monotonic()
        timeouts = httpx.Timeout(120, pool=None)
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=20)
        self._client = httpx.AsyncClient(base_url=server.url, timeout=timeouts, limits=limits)

    async def learn(self) -> None:
        """Ask everything one at a time: the right answers the first time, compared with those ever after."""
        for prompt in (*PROMPTS, *LONG_PROMPTS):
            for dialect in ("generate", "chat"):
                text = await self._alone(dialect, prompt)
                known = self._reference.setdefault((dialect, prompt), text)
                if text != known:
                    self.wrong.append(f"alone, {dialect} {prompt!r}: {text!r}, wanted {known!r}")

    async def close(self) -> None:
        """Leave."""
        await self._client.aclose()

    async def run(self, until: float) -> None:
        """One request after another until the time is over."""
        kinds = (self.whole, self.stream, self.chat, self.leave, self.give_up, self.slow, self.half, self.bad)
        while time.monotonic() < until:
            kind = self._random.choices((*kinds, self.several, self.burst), weights=(6, 5, 3, 5, 2, 1, 1, 3, 2, 1))[0]
            await kind()
            await asyncio.sleep(max(0.0, self._pause_until - time.monotonic()))

    async def whole(self) -> None:
        """A whole answer."""
        prompt = self._random.choice(self._prompts())
        response = await self._post("whole", "/generate", _generate(prompt))
        if response is not None:
            self._compare("generate", prompt, response.json()["generated_text"])

    async def stream(self, pause: float = 0.0) -> None:
        """A stream read to its end: events numbered without a gap, one last event."""
        prompt = self._random.choice(self._prompts())
        name = "slow reader" if pause else "stream"
        events = await self._events(name, "/generate_stream", _generate(prompt), pause)
        if events is None:
            return
        if [event.get("index") for event in events] != list(range(1, len(events) + 1)):
            self.lost.append(f"{name}: events numbered {[event.get('index') for event in events]}")
        self._compare("generate", prompt, str(events[-1].get("generated_text") if events else None))

    async def slow(self) -> None:
        """A stream read slowly."""
        await self.stream(pause=0.05)

    async def chat(self) -> None:
        """A stream in OpenAI's dialect."""
        prompt = self._random.choice(self._prompts())
        events = await self._events("chat", "/v1/chat/completions", {**self._chat(prompt), "stream": True})
        if events is not None:
            self._compare(
                "chat", prompt, "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
            )

    async def leave(self) -> None:
        """A stream left after a few events, or before the first."""
        sent = self._begin("leave")
        try:
            body = _generate(self._random.choice(self._prompts()), tokens=200)
            async with self._client.stream("POST", "/generate_stream", **self._options(sent, body)) as response:
                if not self._is_answered(sent, response):
                    return
                self.num_unseen += 1
                num_lines = self._random.randrange(12)
                async for _ in response.aiter_lines():
                    num_lines -= 1
                    if num_lines < 0:
                        break
        except httpx.HTTPError as error:
            self._explain(sent, error)

    async def give_up(self) -> None:
        """A whole answer that is not waited for."""
        sent = self._begin("give up")
        body = _generate(self._random.choice(self._prompts()), tokens=200)
        try:
            wait = self._random.uniform(0.01, 1.0)
            response = await asyncio.wait_for(self._client.post("/generate", **self._options(sent, body)), wait)
            self.num_unseen += self._is_answered(sent, response)
        except TimeoutError:
            self.num_unseen += 1
            self.seen["give up: left"] += 1
        except httpx.HTTPError as error:
            self._explain(sent, error)

    async def half(self) -> None:
        """A client that sends half of its body and leaves."""
        host, _, port = self._server.url.removeprefix("http://").partition(":")
        try:
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            writer.write(b'Content-Length: 500\r\n\r\n{"inputs": "')
            await asyncio.sleep(self._random.uniform(0, 0.3))
            writer.close()
            await writer.wait_closed()
        except OSError:
            pass
        self.seen["half a body"] += 1

    async def bad(self) -> None:
        """A body that is refused."""
        bodies = (b"{", b'{"inputs":1}', b"[" * 5000, b'{"inputs":"a","parameters":{"best_of":9}}', b"")
        await self._post("bad", "/generate", self._random.choice(bodies))

    async def several(self) -> None:
        """Several prompts, two answers each."""
        prompts = self._random.sample(PROMPTS, 2)
        body = {"model": self._model, "prompt": prompts, "n": 2, "max_tokens": NUM_TOKENS, "temperature": 0}
        response = await self._post("several", "/v1/completions", body)
        if response is None:
            self.num_unseen += 4
        else:
            texts = [choice["text"] for choice in response.json()["choices"]]
            for prompt, text in zip([prompt for prompt in prompts for _ in range(2)], texts, strict=True):
                self._compare("generate", prompt, text)

    async def burst(self) -> None:
        """More at once than the queue takes."""
        await asyncio.gather(*(self.whole() for _ in range(30)))

    async def _alone(self, dialect: str, prompt: str) -> str:
        body, path = _generate(prompt), "/generate"
        if dialect == "chat":
            body, path = self._chat(prompt), "/v1/chat/completions"
        for _ in range(600):
            response = await self._client.post(path, json=body)
            if response.status_code == 200:
                found = response.json()
                self.num_answered += 1
                return str(
                    found["generated_text"] if dialect == "generate" else found["choices"][0]["message"]["content"]
                )
            await asyncio.sleep(0.1)  # a shard that is not whole, or a full queue
        raise SystemExit(f"no answer alone to {prompt!r}: {response.status_code} {response.text[:200]}")

    async def _post(self, name: str, path: str, body: dict[str, Any] | bytes) -> httpx.Response | None:
        sent = self._begin(name)
        try:
            response = await self._client.post(path, **self._options(sent, body))
        except httpx.HTTPError as error:
            self._explain(sent, error)
            return None
        return response if self._is_answered(sent, response) else None

    async def _events(
        self, name: str, path: str, body: dict[str, Any], pause: float = 0.0
    ) -> list[dict[str, Any]] | None:
        """The events of a stream that was read to its end; None when there was none, or an error event ended it."""
        sent = self._begin(name)
        found: list[dict[str, Any]] = []
        try:
            async with self._client.stream("POST", path, **self._options(sent, body)) as response:
                if not self._is_answered(sent, response):
                    return None
                async for line in response.aiter_lines():
                    await asyncio.sleep(pause)
                    if line.startswith("data: {"):
                        found.append(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            self._explain(sent, error)
            return None
        if found and "error" in found[-1]:
            self._unread(sent, json.dumps(found[-1]), f"{name}: error event")
            return None
        return found

    def _begin(self, name: str) -> Sent:
        return Sent(name, time.monotonic(), self.num_answered)

    def _options(self, sent: Sent, body: dict[str, Any] | bytes) -> dict[str, Any]:
        """Arguments of an httpx request with an id of its own; they record the moment when all of it has been sent."""

        async def trace(event: str, _: object) -> None:
            if event == "http11.send_request_body.complete":
                sent.sent = time.monotonic()

        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", "x-request-id": uuid.UUID(int=self._random.getrandbits(128)).hex}
        return {"content": content, "headers": headers, "extensions": {"trace": trace}}

    def _is_answered(self, sent: Sent, response: httpx.Response) -> bool:
        """Count a response by its status; False unless it is 200."""
        status = response.status_code
        wanted, got = response.request.headers["x-request-id"], response.headers.get("x-request-id")
        if got != wanted:
            self.lost.append(f"{sent.name}: status {status} has the request id {got}, sent was {wanted}")
        if status == 200:
            self.seen[f"{sent.name}: 200"] += 1
            return True
        if status in (424, 500):
            text = response.text if response.is_closed else ""
            self._unread(sent, text, f"{sent.name}: {status}")
        elif status == 503 and self._server.outage(sent.begin, time.monotonic()) is not None:
            self.seen[f"{sent.name}: 503 in an outage"] += 1
            self._pause_until = time.monotonic() + OUTAGE_PAUSE_SECONDS
        elif status in REFUSED:
            self.seen[f"{sent.name}: {status}"] += 1
        else:
            self.lost.append(f"{sent.name}: status {status}")
        return False

    def _unread(self, sent: Sent, text: str, what: str) -> None:
        """A request that failed for want of an expert: right only while a shard was not whole."""
        self.seen[f"{what}, a shard could not be read"] += 1
        if (text and UNREAD not in text) or not self._disk.is_faulty(sent.begin, time.monotonic()):
            self.lost.append(f"{what} without a fault of the disk: {text[:200]}")

    def _explain(self, sent: Sent, error: httpx.HTTPError) -> None:
        """A request without an answer: by an outage, by a slow machine, or lost."""
        now = time.monotonic()
        outage = self._server.outage(sent.begin, now)
        if outage is not None and (outage.kind == "kill" or sent.sent > outage.begin):
            self.seen[f"{sent.name}: cut by {outage.kind}"] += 1
            self._pause_until = now + OUTAGE_PAUSE_SECONDS
            return
        others = self.num_answered - sent.others
        if isinstance(error, httpx.TimeoutException) and others < HUNG_ANSWERS:
            self.seen[f"{sent.name}: timed out on a slow machine"] += 1
            self.num_unseen += 1
            return
        self.lost.append(
            f"{sent.name}: {type(error).__name__} {error} after {now - sent.begin:.1f} s, {others} answers"
        )

    def _compare(self, dialect: str, prompt: str, text: str) -> None:
        self.num_answered += 1
        if text != self._reference[dialect, prompt]:
            self.wrong.append(f"{dialect} {prompt!r}: {text!r}, wanted {self._reference[dialect, prompt]!r}")

    def _prompts(self) -> tuple[str, ...]:
        is_long = (time.monotonic() - self._began) % LONG_PERIOD_SECONDS < LONG_SECONDS
        return LONG_PROMPTS if is_long else PROMPTS

    def _chat(self, prompt: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {"model": self._model, "messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0}


def _generate(prompt: str, tokens: int = NUM_TOKENS) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": tokens}}
