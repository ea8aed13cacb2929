"""Requests of the OpenAI dialect: the fields that the unmodified `openai` client sends.

Invariant: a field that this server does not support is refused by name. `user` changes nothing about the answer; it is
taken and not kept.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.api.http.fields import (
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TEXT,
    MAX_TOKENS,
    MAX_TOP_TOKENS,
    NO_NUL,
    MaskFields,
    Strict,
    TokenCount,
    unsupported,
)

MAX_MESSAGES = 1024
MAX_COUNT = 128
DEFAULT_COMPLETION_TOKENS = 16

_TEXT_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT, "pattern": NO_NUL}
_IDS_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKENS},
}


def _is_text(value: Any, longest: int = MAX_TEXT) -> bool:
    if not isinstance(value, str) or not 1 <= len(value) <= longest or "\0" in value:
        return False
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(type(item) is int and 0 <= item <= MAX_TOKENS for item in value)
    )


def _prompts(value: Any) -> list[str | list[int]]:
    """A prompt or several, as texts or as token ids, always as a list."""
    if _is_text(value) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value and (all(map(_is_text, value)) or all(map(_is_ids, value))):
        return value
    raise PydanticCustomError(
        "prompt", "must be a text, a list of texts, a list of token ids, or a list of such lists; none of them empty"
    )


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if isinstance(stops, list) and len(stops) <= MAX_STOPS and all(_is_text(item, MAX_STOP_LENGTH) for item in stops):
        return stops
    raise PydanticCustomError(
        "stop", f"must be a text or a list of at most {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters"
    )


def _content(value: Any) -> str:
    """A message's text; a list of text parts is joined."""
    parts = value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(part, dict) and set(part) == {"type", "text"} and part["type"] == "text" for part in value)
    ):
        parts = [part["text"] for part in value]
        if all(isinstance(part, str) for part in parts):
            parts = "".join(parts)
    if parts == "" or _is_text(parts):
        return str(parts)
    raise PydanticCustomError("content", "must be a text or a list of text parts; images and audio are not supported")


Prompts = Annotated[
    list[str | list[int]],
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT_SCHEMA,
                {"type": "array", "minItems": 1, "items": _TEXT_SCHEMA},
                _IDS_SCHEMA,
                {"type": "array", "minItems": 1, "items": _IDS_SCHEMA},
            ]
        }
    ),
]
_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH, "pattern": NO_NUL}
Stops = Annotated[
    list[str],
    BeforeValidator(_stops),
    WithJsonSchema(
        {"anyOf": [{"type": "null"}, _STOP_SCHEMA, {"type": "array", "maxItems": MAX_STOPS, "items": _STOP_SCHEMA}]}
    ),
]
_CONTENT_TEXT = {"type": "string", "maxLength": MAX_TEXT, "pattern": NO_NUL}
Content = Annotated[
    str,
    BeforeValidator(_content),
    WithJsonSchema(
        {
            "anyOf": [
                _CONTENT_TEXT,
                {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": _CONTENT_TEXT},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ),
]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]


class StreamOptions(Strict):
    """Of a stream; `include_usage` adds a last chunk with the token counts."""

    include_usage: bool | None = None
    include_obfuscation: unsupported(False) = None  # type: ignore[valid-type]


class Common(MaskFields):
    """What completions and chat share."""

    model: Name = Field(description="name of the model, as /v1/models lists it")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = Field(None, description="answers to each prompt")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="default 1; 0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: TokenCount | None = Field(None, description="not OpenAI's: sample from the k most likely tokens")
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(None, description="not OpenAI's")
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stop: Stops = Field(default_factory=list, description="generation ends before one of these")
    user: Annotated[str, Field(max_length=MAX_STOP_LENGTH)] | None = None
    presence_penalty: unsupported(0, 0.0) = None  # type: ignore[valid-type]
    frequency_penalty: unsupported(0, 0.0) = None  # type: ignore[valid-type]
    logit_bias: unsupported() = None  # type: ignore[valid-type]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Common):
    """`POST /v1/completions`."""

    prompt: Prompts
    max_tokens: TokenCount | None = Field(None, description=f"default {DEFAULT_COMPLETION_TOKENS}")
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_TOKENS)] | None = Field(
        None, description="log-probabilities of the tokens and of so many alternatives"
    )
    best_of: unsupported(1) = None  # type: ignore[valid-type]
    echo: unsupported(False) = None  # type: ignore[valid-type]
    suffix: unsupported() = None  # type: ignore[valid-type]


class Message(Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: unsupported() = None  # type: ignore[valid-type]
    refusal: unsupported() = None  # type: ignore[valid-type]
    tool_calls: unsupported() = None  # type: ignore[valid-type]


class ResponseFormat(Strict):
    """Only plain text."""

    type: Literal["text"]


class ChatRequest(Common):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: TokenCount | None = Field(None, description="default: what the context has room for")
    max_completion_tokens: TokenCount | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_TOKENS)] | None = None
    response_format: ResponseFormat | None = None
    tools: unsupported() = None  # type: ignore[valid-type]
    tool_choice: unsupported("none") = None  # type: ignore[valid-type]
    functions: unsupported() = None  # type: ignore[valid-type]
    function_call: unsupported("none") = None  # type: ignore[valid-type]
    reasoning_effort: unsupported() = None  # type: ignore[valid-type]
    chat_template: unsupported() = None  # type: ignore[valid-type]
    chat_template_kwargs: unsupported() = None  # type: ignore[valid-type]
    audio: unsupported() = None  # type: ignore[valid-type]
