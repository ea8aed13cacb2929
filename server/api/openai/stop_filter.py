"""Stop strings as OpenAI means them: never in the text, not even a part of one in a stream.

The engine's text ends with the stop string that ended it. Invariant: the pieces that `feed` and `finish` give join to
the engine's text without that stop string, and nothing given out could have been the beginning of one.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Holds back the end of the text for as long as it could be the beginning of a stop string.

    Args:
        stops: the stop strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._num_fed = 0

    def feed(self, text: str) -> str:
        """Take more text; returns what is certain to stay."""
        self._num_fed += len(text)
        self._held += text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain = len(self._held) - keep
        given, self._held = self._held[:certain], self._held[certain:]
        return given

    def finish(self, whole_text: str, stop_text: str | None) -> str:
        """The rest, once the whole text and the stop string that ended it (or None) are known."""
        given = self._held + whole_text[self._num_fed :]
        self._held = ""
        return given[: len(given) - len(stop_text)] if stop_text else given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(stop), len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
