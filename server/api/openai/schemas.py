"""Requests of the OpenAI dialect: the fields that the unmodified `openai` client and its relatives send.

Invariant: null and neutral values of a known field are taken, and so are fields that cannot change the answer's text
(`user`, `metadata`, `store` …), which are not kept. A field that would change the text and is not supported is refused
by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.api.http.fields import (
    MAX_TEXT,
    MAX_TOKENS,
    MAX_TOP_TOKENS,
    NO_NUL,
    Bookkeeping,
    ModelName,
    SamplingFields,
    Strict,
    Text,
    TokenCount,
    is_text,
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


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(type(item) is int and 0 <= item <= MAX_TOKENS for item in value)
    )


def _is_prompt(value: Any) -> bool:
    return bool(value) and is_text(value)


def _prompts(value: Any) -> list[str | list[int]]:
    """A prompt or several, as texts or as token ids, always as a list."""
    if _is_prompt(value) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value and (all(map(_is_prompt, value)) or all(map(_is_ids, value))):
        return value
    raise PydanticCustomError(
        "prompt", "must be a text, a list of texts, a list of token ids, or a list of such lists; none of them empty"
    )


def _content(value: Any) -> str | None:
    """A message's text; text parts are joined."""
    if value is None or is_text(value):
        return None if value is None else str(value)
    if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
        raise PydanticCustomError(
            "content", f"must be a text without NUL of at most {MAX_TEXT} characters, or a list of text parts"
        )
    return "".join(_part_text(part, place) for place, part in enumerate(value))


def _part_text(part: dict[str, Any], place: int) -> str:
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        raise PydanticCustomError(
            "content",
            f"part {place} is not of type text; images, audio, files and other parts are not supported: send text",
        )
    if set(part) - {"type", kind, "cache_control", "annotations"}:
        raise PydanticCustomError("content", f"part {place} has an unknown key; known are type, {kind}, cache_control")
    if not is_text(part.get(kind)):
        raise PydanticCustomError(
            "content", f"part {place} has no text in `{kind}`, or one that is too long or has NUL"
        )
    return str(part[kind])


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
_CONTENT_TEXT = {"type": "string", "maxLength": MAX_TEXT, "pattern": NO_NUL}
_PART = {
    kind: {
        "type": "object",
        "properties": {
            "type": {"const": kind},
            kind: _CONTENT_TEXT,
            "cache_control": {"anyOf": [{"type": "null"}, {"type": "object"}]},
        },
        "required": ["type", kind],
        "additionalProperties": False,
    }
    for kind in ("text", "refusal")
}
Content = Annotated[
    str | None,
    BeforeValidator(_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "null"},
                _CONTENT_TEXT,
                {"type": "array", "minItems": 1, "items": {"anyOf": list(_PART.values())}},
            ]
        }
    ),
]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
TemplateValue = bool | int | float | Text | list[Any] | dict[str, Any] | None


class StreamOptions(Strict):
    """Of a stream; `include_usage` adds a last chunk with the token counts."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="not kept: there is none")
    continuous_usage_stats: unsupported(False) = None  # type: ignore[valid-type]


class Common(SamplingFields):
    """The fields that completions and chat share."""

    model: ModelName | None = Field(None, description="any name: one model is served")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = Field(None, description="answers to each prompt")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="default the generation config's, else 1; 0 is greedy"
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    user: Bookkeeping | None = Field(None, description="not kept")
    prompt_logprobs: unsupported() = None  # type: ignore[valid-type]
    truncate_prompt_tokens: unsupported() = None  # type: ignore[valid-type]
    return_tokens_as_token_ids: unsupported(False) = None  # type: ignore[valid-type]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Common):
    """`POST /v1/completions`."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = Field(
        None, description=f"default {DEFAULT_COMPLETION_TOKENS}; 0 with echo only"
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_TOKENS)] | None = Field(
        None, description="log-probabilities of the tokens and of so many alternatives"
    )
    echo: bool | None = Field(None, description="begin the text with the prompt, and the logprobs with its tokens")
    best_of: Count | None = Field(None, description="only 1, or the same as n")
    suffix: unsupported("") = None  # type: ignore[valid-type]
    add_special_tokens: unsupported(True) = None  # type: ignore[valid-type]


class Message(Strict):
    """One message of a chat; the assistant's may be an answer of this server, sent back as it was."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = None
    name: Text | None = Field(None, description="for chat templates that show it")
    refusal: Text | None = Field(None, description="the text of a message without content")
    reasoning_content: Text | None = Field(None, description="for chat templates that show it")
    annotations: list[Any] | None = Field(None, description="not kept")
    cache_control: dict[str, Any] | None = Field(None, description="not kept")
    audio: unsupported() = None  # type: ignore[valid-type]
    function_call: unsupported() = None  # type: ignore[valid-type]
    tool_calls: unsupported([]) = None  # type: ignore[valid-type]
    tool_call_id: unsupported() = None  # type: ignore[valid-type]
    parsed: unsupported() = None  # type: ignore[valid-type]


class ResponseFormat(Strict):
    """Only plain text."""

    type: Literal["text"]


class ChatRequest(Common):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: TokenCount | None = Field(None, description="at most so many; default what the context has room for")
    max_completion_tokens: TokenCount | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_TOKENS)] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, TemplateValue] | None = Field(
        None, description="variables for the chat template, as enable_thinking"
    )
    reasoning_effort: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,16}$")] | None = Field(
        None, description="for chat templates that read it"
    )
    metadata: dict[str, Any] | None = Field(None, description="not kept")
    store: bool | None = Field(None, description="not kept; nothing is stored")
    parallel_tool_calls: bool | None = Field(None, description="not kept; there are no tools")
    service_tier: Bookkeeping | None = Field(None, description="not kept")
    safety_identifier: Bookkeeping | None = Field(None, description="not kept")
    prompt_cache_key: Bookkeeping | None = Field(None, description="not kept")
    prompt_cache_retention: Bookkeeping | None = Field(None, description="not kept")
    prediction: dict[str, Any] | None = Field(None, description="not kept; it could only save time")
    tool_prompt: Text | None = Field(None, description="not kept; there are no tools")
    tools: unsupported([]) = None  # type: ignore[valid-type]
    tool_choice: unsupported("none", "auto") = None  # type: ignore[valid-type]
    functions: unsupported([]) = None  # type: ignore[valid-type]
    function_call: unsupported("none", "auto") = None  # type: ignore[valid-type]
    modalities: unsupported(["text"]) = None  # type: ignore[valid-type]
    audio: unsupported() = None  # type: ignore[valid-type]
    verbosity: unsupported("medium") = None  # type: ignore[valid-type]
    web_search_options: unsupported() = None  # type: ignore[valid-type]
    chat_template: unsupported() = None  # type: ignore[valid-type]
    documents: unsupported([]) = None  # type: ignore[valid-type]
    add_generation_prompt: unsupported(True) = None  # type: ignore[valid-type]
    continue_final_message: unsupported(False) = None  # type: ignore[valid-type]
    add_special_tokens: unsupported(False) = None  # type: ignore[valid-type]
    echo: unsupported(False) = None  # type: ignore[valid-type]
