"""Tries grammars in a process of its own, because a hostile schema may take any time and memory to read.

Run as a program, this module is that process: it reads a grammar a line, as JSON, and writes the reason for which it is
refused, as JSON, empty if it is not. Invariant: `Trial.reason` returns in time, whatever the grammar is.
"""

from __future__ import annotations

import json
import resource
import select
import subprocess
import sys
import time
import weakref

from llguidance import LLMatcher, LLParserLimits

LIMITS = LLParserLimits(
    initial_lexer_fuel=100_000,
    step_lexer_fuel=20_000,
    max_lexer_states=20_000,
    max_items_in_row=10_000,
    verbose_errors=False,
)
"""Measured: with these, the worst step of hostile patterns takes 65 ms; with llguidance's own limits 1.4 s."""
SECONDS = 5.0
MEMORY_BYTES = 2 * 2**30
TOO_MUCH = f"it takes more than {SECONDS:g} s or {MEMORY_BYTES // 2**30} GiB to read; make it simpler"


class Trial:
    """The process, which starts with the first grammar, anew after one that took too much, and ends with this object.

    For one thread at a time.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def reason(self, grammar: str, until: float) -> str:
        """The reason for which a grammar is refused, in llguidance's words, or `TOO_MUCH`; empty if it is taken.

        Args:
            until: `time.monotonic()` at which to give up.

        Raises:
            RuntimeError: the process does not start.
        """
        if self._process is None or self._process.poll() is not None:  # none yet, or the system has ended it
            self._process = _started()
            self._end = weakref.finalize(self, _end, self._process)  # also when this object is forgotten
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(grammar).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))
        answer = self._process.stdout.readline() if ready else b""
        if answer:
            return str(json.loads(answer))
        self._end()
        self._process = None
        return TOO_MUCH


def _started() -> subprocess.Popen[bytes]:
    """A process that is ready, in a session of its own so that Ctrl-C does not reach it."""
    process = subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    if not process.stdout.readline():
        process.communicate()
        raise RuntimeError(f"the process that tries grammars ended with {process.returncode} before it was ready")
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _serve() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(LLMatcher.validate_grammar(json.loads(line), limits=LIMITS)), flush=True)


if __name__ == "__main__":
    _serve()
