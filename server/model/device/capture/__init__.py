"""Decides whether a model can be captured; a refusal gives the reason."""

from __future__ import annotations

from server.errors import ServerError


class NotCapturableError(ServerError):
    """The captured decode step does not support this model; the message gives the reason."""


def need(condition: bool, reason: str) -> None:
    """Raises NotCapturableError with the reason unless the condition holds."""
    if not condition:
        raise NotCapturableError(reason)
