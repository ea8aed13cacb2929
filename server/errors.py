"""The root of what this package raises on purpose; the message says what is wrong, got, wanted, and what to do.

ServerError
├── SettingsError      a setting that is unknown, malformed, or that contradicts another
├── UsageError         a command that cannot be carried out as it was typed
├── PortTakenError     another process listens on the address
├── ApiError           a request that the HTTP layer refuses (`server.api.http.errors`)
├── EngineError        a request that the engine refuses or cannot finish (`server.engine.request`)
├── GrowthError        a store that cannot grow or shrink as asked (`server.growth.status`)
├── ProfileError       a profile that does not exist, or that does not fit the model
├── TextsError         texts that cannot be read, or of which nothing is left
├── TrunkError         a trunk that is no model that can be served
├── UnservableModelError   a model whose files do not allow it to serve (`server.api.readiness`)
├── DecodePathError    the decode path that was asked for cannot run here
├── NotCapturableError, RouterRefusedError   the decode step of this model cannot be captured
└── StepMemoryError    a step for which the device has no memory
"""

from __future__ import annotations

from expert_store.errors import StoreError
from extractor.errors import ExtractError
from router.errors import RouterError


class ServerError(Exception):
    """Base of everything that this package raises on purpose."""


class SettingsError(ServerError):
    """A setting that is unknown, malformed, or that contradicts another; the message names the key and its origin."""


class UsageError(ServerError):
    """A command that cannot be carried out as it was typed; the message says what to change."""


def message_of(error: BaseException) -> str | None:
    """The text of an error that a user can put right: of ours, or of the operating system. None for a bug of ours."""
    if isinstance(error, (StoreError, RouterError, ExtractError, ServerError)):
        return str(error)
    if isinstance(error, OSError):
        if error.filename is None or not error.strerror:
            return str(error)
        return f"{error.filename}: {error.strerror}; check the path, its permissions and the room on its disk"
    return None
