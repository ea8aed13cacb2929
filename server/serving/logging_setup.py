"""Logging: one handler, JSON lines for machines or short lines for people, fields given by `extra`.

Invariant: no call in the server puts a prompt or an answer into a record, except those that `log_prompts` turns on.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal, TextIO

_OWN_FIELDS = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}
MAX_VALUE = 4000


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """`12:00:00 info  message  key=value`; control characters in values are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={_plain(value)}" for key, value in _extra(record).items())
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {record.levelname.lower():7} {_plain(record.getMessage())}" + (f"  {fields}" if fields else "")
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def configure_logging(log_format: Literal["auto", "text", "json"], level: str, stream: TextIO | None = None) -> None:
    """Send every record of this process, and Python's warnings, to `stream` (stderr by default). Replaces handlers of
    earlier calls."""
    stream = sys.stderr if stream is None else stream
    as_text = log_format == "text" or (log_format == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for package in ("server", "extractor", "router", "expert_store"):
        logging.getLogger(package).setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    fields = {key: value for key, value in vars(record).items() if key not in _OWN_FIELDS}
    return {key: value[:MAX_VALUE] if isinstance(value, str) else value for key, value in fields.items()}


def _plain(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() else json.dumps(text)


def _time_of(record: logging.LogRecord) -> str:
    clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{clock}.{int(record.msecs):03d}Z"
