"""The inbox of the engine's thread: waiting requests, cancellations and actions that other threads hand over.

One lock guards all of it. Invariant: no two requests with one id are waiting or running; the queue stays within its
bounds; after `close` nothing is accepted, and each accepted request was taken out before or is returned by `close`.
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
    """The queue between the engine's thread and all other threads.

    Args:
        limits: the bounds of the queue.
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
        """Set whether requests and actions are accepted; others are refused with the message `refusal`."""
        with self._changed:
            self._takes_requests, self._takes_actions, self._refusal = requests, actions, refusal
            self.wake()

    def check_takes_requests(self) -> None:
        """Raise EngineStoppedError while no requests are accepted."""
        with self._changed:
            if not self._takes_requests:
                raise EngineStoppedError(self._refusal)

    def put(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            EngineStoppedError: no requests are accepted. InvalidRequestError: its id is in use. QueueFullError.
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
        """Mark a request as cancelled; ignores an unknown id."""
        with self._changed:
            if request_id in self._ids:
                self._cancelled.add(request_id)
                self.wake()

    def put_action(self, action: Action) -> Future[None]:
        """Queue an action; return the future of its result. Raises EngineStoppedError while no actions are accepted."""
        future: Future[None] = Future()
        with self._changed:
            if not self._takes_actions:
                raise EngineStoppedError(self._refusal)
            self._actions.append((action, future))
            self.wake()
        return future

    def wake(self) -> None:
        """Make the current or the next `wait` return."""
        with self._changed:
            self._is_woken = True
            self._changed.notify()

    @property
    def waiting(self) -> tuple[int, int]:
        """The number of waiting requests, and of their prompt tokens."""
        with self._changed:
            return len(self._waiting), sum(sequence.num_prompt_tokens for sequence in self._waiting)

    # -- engine thread -------------------------------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether no request, cancellation or action waits."""
        with self._changed:
            return not (self._waiting or self._cancelled or self._actions)

    def wait(self, seconds: float) -> None:
        """Sleep until something was queued since the last `wait`, for at most `seconds`."""
        with self._changed:
            if not self._is_woken:
                self._changed.wait(seconds)
            self._is_woken = False

    def first(self) -> Sequence | None:
        """The sequence that has waited longest."""
        with self._changed:
            return self._waiting[0] if self._waiting else None

    def next(self) -> Sequence | None:
        """Remove and return the sequence that has waited longest."""
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def take_cancelled(self) -> tuple[list[Sequence], set[str]]:
        """Remove and return the cancelled sequences of the queue, and the ids of all cancelled requests."""
        with self._changed:
            if not self._cancelled:
                return [], set()
            cancelled, self._cancelled = self._cancelled, set()
            dropped = [sequence for sequence in self._waiting if sequence.request.request_id in cancelled]
            self._waiting = deque(s for s in self._waiting if s.request.request_id not in cancelled)
        return dropped, cancelled

    def run_actions(self) -> None:
        """Run the queued actions; an error of an action goes to its future."""
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
        """Free the id of a sequence that has ended."""
        with self._changed:
            self._ids.discard(sequence.request.request_id)
            self._cancelled.discard(sequence.request.request_id)

    def close(self, error: EngineStoppedError) -> list[Sequence]:
        """Accept nothing any more, fail the actions that did not run, and return the waiting sequences."""
        with self._changed:
            self.gate(requests=False, actions=False, refusal=str(error))
            left, actions = list(self._waiting), list(self._actions)
            self._waiting.clear()
            self._actions.clear()
        for _, future in actions:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        return left
