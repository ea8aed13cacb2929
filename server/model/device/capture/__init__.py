"""Decides whether a model can be captured, and says why others cannot."""

from __future__ import annotations

from server.errors import ServerError


class NotCapturableError(ServerError):
    """The model needs something that the captured decode step does not do; the message says what."""


def need(condition: bool, reason: str) -> None:
    """Raises NotCapturableError with the reason unless the condition holds."""
    if not condition:
        raise NotCapturableError(reason)
