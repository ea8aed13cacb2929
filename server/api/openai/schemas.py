"""Requests of the OpenAI dialect: the fields that the unmodified `openai` client and its relatives send.

Invariant: null and neutral values of a known field are taken, and so are fields that cannot change the answer's text
(`user`, `metadata`, `store` …), which are not kept. A field that would change the text and is not supported is refused
by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.api.chat.messages import Call, Chat, ToolChoice
from server.api.chat.messages import Message as ChatMessage
from server.api.chat.tools import MAX_TOOLS, CallId, ChoiceWord, ToolName, tool_choice, tools_of
from server.api.http.constraints import ResponseFormat
from server.api.http.errors import ValidationFailed
from server.api.http.fields import (
    MAX_TEXT,
    MAX_TOKENS,
    MAX_TOP_TOKENS,
    NO_NUL,
    OBJECT,
    Bookkeeping,
    ModelName,
    NotKept,
    SamplingFields,
    Strict,
    Text,
    TokenCount,
    by_type,
    is_text,
    of_type,
    or_object,
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
    response_format: ResponseFormat | None = Field(
        None, description="JSON, or JSON that is valid under a schema, enforced token by token"
    )
    user: Bookkeeping | None = Field(None, description="not kept")
    prompt_logprobs: unsupported() = None  # type: ignore[valid-type]
    truncate_prompt_tokens: unsupported() = None  # type: ignore[valid-type]
    return_tokens_as_token_ids: unsupported(False) = None  # type: ignore[valid-type]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def draw_seed(self) -> int | None:
        """The seed as the engine takes it, of 64 bits without a sign."""
        return None if self.seed is None else self.seed % 2**64


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


class CalledFunction(Strict):
    """The function of a call, in a message of the assistant."""

    name: ToolName
    arguments: Text = Field(description="JSON, as the model wrote it")


class ToolCall(Strict):
    """A call in a message of the assistant."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="not kept; the place in a stream")


class Message(Strict):
    """One message of a chat; the assistant's may be an answer of this server, sent back as it was."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: Text | None = Field(None, description="for chat templates that show it")
    refusal: Text | None = Field(None, description="the text of a message without content")
    reasoning_content: Text | None = Field(None, description="for chat templates that show it")
    reasoning: Text | None = Field(None, description="the same, as other servers call it")
    annotations: list[Any] | None = Field(None, description="not kept")
    cache_control: NotKept = Field(None, description="not kept")
    audio: unsupported() = None  # type: ignore[valid-type]
    function_call: unsupported() = None  # type: ignore[valid-type]
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: CallId | None = Field(None, description="the call that a tool's message answers")
    parsed: unsupported() = None  # type: ignore[valid-type]


class Function(Strict):
    """A function that the model may call."""

    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of the arguments, an object's")
    strict: bool | None = Field(None, description="arguments keep to the schema")


class FunctionTool(Strict):
    """A tool: a function."""

    type: Literal["function"]
    function: Function
    cache_control: NotKept = Field(None, description="not kept")


class FunctionName(Strict):
    """The name of a function."""

    name: ToolName


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(Common):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: TokenCount | None = Field(None, description="at most so many; default what the context has room for")
    max_completion_tokens: TokenCount | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_TOKENS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="variables for the chat template, as enable_thinking"
    )
    reasoning_effort: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,16}$")] | None = Field(
        None,
        description="for chat templates that read it; none also for those with a switch of thinking, or without it",
    )
    metadata: dict[str, Any] | None = Field(None, description="not kept")
    store: bool | None = Field(None, description="not kept; nothing is stored")
    tools: (
        Annotated[
            list[
                Annotated[
                    Annotated[FunctionTool, of_type("function")],
                    by_type("function", advice="tools of free text and of the server are not supported"),
                ]
            ],
            Field(max_length=MAX_TOOLS),
        ]
        | None
    ) = None
    tool_choice: Annotated[ChoiceWord | Annotated[NamedTool, OBJECT], or_object(str)] | None = Field(
        None, description="default auto; required forces a call, and so does the name of a tool"
    )
    parallel_tool_calls: bool | None = Field(None, description="whether an answer may have several calls; default true")
    service_tier: Bookkeeping | None = Field(None, description="not kept")
    safety_identifier: Bookkeeping | None = Field(None, description="not kept")
    prompt_cache_key: Bookkeeping | None = Field(None, description="not kept")
    prompt_cache_retention: Bookkeeping | None = Field(None, description="not kept")
    prediction: dict[str, Any] | None = Field(None, description="not kept; it could only save time")
    tool_prompt: Text | None = Field(None, description="not kept; the chat template has its own")
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

    def chat(self) -> Chat:
        """The chat that is asked for.

        Raises:
            ValidationFailed: a message or the choice of a tool does not fit the rest.
        """
        return Chat(
            messages=tuple(_message(message, f"messages[{place}]") for place, message in enumerate(self.messages)),
            tools=tools_of(tool.function for tool in self.tools or ()),
            choice=self._choice(),
            variables=self.chat_template_kwargs or {},
            effort=self.reasoning_effort,
            thinks=False if self.reasoning_effort == "none" else None,
        )

    def _choice(self) -> ToolChoice:
        names = [tool.function.name for tool in self.tools or ()]
        is_parallel = self.parallel_tool_calls is not False
        if isinstance(self.tool_choice, NamedTool):
            return tool_choice("required", self.tool_choice.function.name, names, is_parallel=is_parallel)
        return tool_choice(self.tool_choice or "auto", None, names, is_parallel=is_parallel)


def _message(message: Message, place: str) -> ChatMessage:
    if message.content is None and message.role != "assistant":
        name = f"{place}.content"
        raise ValidationFailed(f"`{name}` is missing; only an assistant's may be", param=name)
    for key, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if getattr(message, key) and message.role != role:
            raise ValidationFailed(f"`{place}.{key}`: only a message of the {role} has it", param=f"{place}.{key}")
    if message.role == "tool" and message.tool_call_id is None:
        name = f"{place}.tool_call_id"
        raise ValidationFailed(f"`{name}` is missing: name the call that the message answers", param=name)
    return ChatMessage(
        role=message.role,
        content=message.content or message.refusal,
        place=place,
        name=message.name,
        thinking=message.reasoning_content or message.reasoning,
        calls=tuple(Call(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()),
        call_id=message.tool_call_id,
    )
