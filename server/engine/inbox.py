"""The inbox of the engine's thread: waiting requests, cancellations and actions that other threads hand over.

One lock guards all of it. Invariant: no two requests with one id are waiting or running, the queue keeps to its
bounds, and after `close` nothing gets in: whatever was taken is fetched before, comes out of it, or is told there.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from server.engine.admission import EngineLimits, check_queue
from server.engine.request import EngineStoppedError, InvalidRequestError
from server.engine.sequence import Sequence

Action = Callable[[], None]


class Inbox:
    """The one place where the engine's thread and all others meet.

    Args:
        limits: of the queue.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self._changed = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._ids: set[str] = set()
        self._cancelled: set[str] = set()
        self._actions: deque[tuple[Action, Future[None]]] = deque()
        self._is_woken = False
        self._takes_requests = self._takes_actions = False
        self._refusal = ""

    # -- any thread ----------------------------------------------------------------------------------------------------

    def gate(self, *, requests: bool, actions: bool, refusal: str) -> None:
        """Say what is taken from now on; what is not is refused with `refusal`."""
        with self._changed:
            self._takes_requests, self._takes_actions, self._refusal = requests, actions, refusal
            self.wake()

    def check_takes_requests(self) -> None:
        """Raises EngineStoppedError while no request is taken."""
        with self._changed:
            if not self._takes_requests:
                raise EngineStoppedError(self._refusal)

    def put(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            EngineStoppedError: no requests are taken. InvalidRequestError: its id is in use. QueueFullError.
        """
        request = sequence.request
        with self._changed:
            self.check_takes_requests()
            if request.request_id in self._ids:
                raise InvalidRequestError(f"a request with the id {request.request_id} is waiting or running")
            check_queue(request, self._limits, [waiting.num_prompt_tokens for waiting in self._waiting])
            self._ids.add(request.request_id)
            self._waiting.append(sequence)
            self.wake()

    def cancel(self, request_id: str) -> None:
        """Note that a request is to be dropped; one that is not here is no error."""
        with self._changed:
            if request_id in self._ids:
                self._cancelled.add(request_id)
                self.wake()

    def put_action(self, action: Action) -> Future[None]:
        """Queue an action; the future is of its end. Raises EngineStoppedError while no actions are taken."""
        future: Future[None] = Future()
        with self._changed:
            if not self._takes_actions:
                raise EngineStoppedError(self._refusal)
            self._actions.append((action, future))
            self.wake()
        return future

    def wake(self) -> None:
        """End the `wait` under way, or else the next one."""
        with self._changed:
            self._is_woken = True
            self._changed.notify()

    @property
    def waiting(self) -> tuple[int, int]:
        """Requests that wait, and the tokens of their prompts."""
        with self._changed:
            return len(self._waiting), sum(sequence.num_prompt_tokens for sequence in self._waiting)

    # -- engine thread -------------------------------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to fetch."""
        with self._changed:
            return not (self._waiting or self._cancelled or self._actions)

    def wait(self, seconds: float) -> None:
        """Sleep until something came in since the last `wait`, for at most `seconds`."""
        with self._changed:
            if not self._is_woken:
                self._changed.wait(seconds)
            self._is_woken = False

    def next(self) -> Sequence | None:
        """The sequence that waits longest; it no longer does."""
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def take_cancelled(self) -> tuple[list[Sequence], set[str]]:
        """The waiting sequences that were cancelled, which no longer wait, and the ids of all that were."""
        with self._changed:
            if not self._cancelled:
                return [], set()
            cancelled, self._cancelled = self._cancelled, set()
            dropped = [sequence for sequence in self._waiting if sequence.request.request_id in cancelled]
            self._waiting = deque(s for s in self._waiting if s.request.request_id not in cancelled)
        return dropped, cancelled

    def run_actions(self) -> None:
        """Run the actions that were queued; what one raises is its future's."""
        with self._changed:
            actions, self._actions = self._actions, deque()
        for action, future in actions:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                action()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended: its id is free."""
        with self._changed:
            self._ids.discard(sequence.request.request_id)
            self._cancelled.discard(sequence.request.request_id)

    def close(self, error: EngineStoppedError) -> list[Sequence]:
        """Take nothing any more, fail the actions that did not run, and give out the sequences that wait."""
        with self._changed:
            self.gate(requests=False, actions=False, refusal=str(error))
            left, actions = list(self._waiting), list(self._actions)
            self._waiting.clear()
            self._actions.clear()
        for _, future in actions:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        return left
