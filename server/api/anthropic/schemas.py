"""Requests of Anthropic's dialect: the fields that the unmodified `anthropic` client and agents on it send.

Invariant: as in the other dialects, a field that would change the text and is not supported is refused by name; null,
and fields that cannot change the text, are taken and not kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.chat.messages import Call, Chat, Message, Tool, ToolChoice
from server.api.chat.tools import MAX_TOOLS, CallId, ToolName, tool_choice, tools_of
from server.api.http.constraints import JsonSchema
from server.api.http.errors import ValidationFailed
from server.api.http.fields import (
    MAX_PARTS,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TOKENS,
    MaskFields,
    ModelName,
    NotKept,
    OrText,
    SamplingFields,
    Strict,
    Text,
    TokenCount,
    by_type,
    of_type,
    unsupported,
)
from server.constraints.grammar import Constraint, Json

MAX_MESSAGES = 1024


class TextBlock(Strict):
    """A text."""

    type: Literal["text"]
    text: Text
    cache_control: NotKept = Field(None, description="not kept")
    citations: list[Any] | None = Field(None, description="not kept")


class ThinkingBlock(Strict):
    """The thinking of an assistant's message, sent back."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text | None = Field(None, description="not kept")


class RedactedThinkingBlock(Strict):
    """Thinking that another server has hidden; not kept."""

    type: Literal["redacted_thinking"]
    data: Text


class ToolUseBlock(Strict):
    """A call in an assistant's message."""

    type: Literal["tool_use"]
    id: CallId
    name: ToolName
    input: dict[str, Any]
    cache_control: NotKept = Field(None, description="not kept")
    caller: NotKept = Field(None, description="not kept")


Texts = Annotated[
    list[Annotated[Annotated[TextBlock, of_type("text")], by_type("text")]],
    Field(max_length=MAX_PARTS),
    OrText(lambda text: {"type": "text", "text": text}),
]


class ToolResultBlock(Strict):
    """The result of a call, in a user's message."""

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: Texts | None = None
    is_error: bool | None = Field(None, description="the text then begins with `Error: `")
    cache_control: NotKept = Field(None, description="not kept")


Block = Annotated[
    Annotated[TextBlock, of_type("text")]
    | Annotated[ThinkingBlock, of_type("thinking")]
    | Annotated[RedactedThinkingBlock, of_type("redacted_thinking")]
    | Annotated[ToolUseBlock, of_type("tool_use")]
    | Annotated[ToolResultBlock, of_type("tool_result")],
    by_type("text", "thinking", "redacted_thinking", "tool_use", "tool_result"),
]
Blocks = Annotated[
    list[Block], Field(min_length=1, max_length=MAX_PARTS), OrText(lambda text: {"type": "text", "text": text})
]


class MessageParam(Strict):
    """One message of a chat."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class ToolParam(Strict):
    """A tool of the client."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: Text | None = None
    input_schema: dict[str, Any] = Field(description="JSON Schema of the input, an object's")
    strict: bool | None = Field(None, description="inputs keep to the schema")
    cache_control: NotKept = Field(None, description="not kept")
    eager_input_streaming: bool | None = Field(None, description="not kept; inputs are always told as they are written")
    defer_loading: unsupported(False) = None  # type: ignore[valid-type]
    allowed_callers: unsupported(["direct"]) = None  # type: ignore[valid-type]
    input_examples: unsupported([]) = None  # type: ignore[valid-type]

    @property
    def parameters(self) -> dict[str, Any]:
        """The schema, by the name that other dialects have for it."""
        return self.input_schema


class ToolChoiceParam(Strict):
    """The calls that the client wants."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = Field(None, description="of the tool, with the type tool")
    disable_parallel_tool_use: bool | None = Field(None, description="only the first call is told")


class ThinkingParam(Strict):
    """Switches thinking, where the chat template has a switch."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = Field(None, description="not kept")
    display: Literal["summarized", "omitted"] | None = Field(None, description="not kept; thinking is told whole")


class OutputFormat(Strict):
    """A JSON value that is valid under a schema."""

    type: Literal["json_schema"]
    schema_: JsonSchema = Field(alias="schema")


class OutputConfig(Strict):
    """The effort of thinking, for chat templates that read it, and the form of the text."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(Strict):
    """`POST /v1/messages/count_tokens`: the fields that make the prompt."""

    model: ModelName | None = Field(None, description="any name: one model is served")
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: Texts | None = None
    tools: (
        Annotated[
            list[
                Annotated[
                    Annotated[ToolParam, of_type("custom")],
                    by_type("custom", default="custom", advice="describe a tool by its name and its input_schema"),
                ]
            ],
            Field(max_length=MAX_TOOLS),
        ]
        | None
    ) = None
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingParam | None = None
    output_config: OutputConfig | None = None
    cache_control: NotKept = Field(None, description="not kept")
    context_management: NotKept = Field(None, description="not kept; the history is read whole")
    mcp_servers: unsupported([]) = None  # type: ignore[valid-type]

    def chat(self) -> Chat:
        """The chat that is asked for.

        Raises:
            ValidationFailed: a block in a message of another role, or a choice of a tool that there is not.
        """
        system = [Message("system", _joined(self.system), "system")] if self.system else []
        said = [each for at, message in enumerate(self.messages) for each in _messages(message, f"messages[{at}]")]
        if said[-1].role == "assistant":
            raise ValidationFailed(
                "`messages` ends with the assistant's: to continue it is not supported, so end with a user's message",
                param="messages",
            )
        effort = self.output_config.effort if self.output_config else None
        return Chat(
            messages=(*system, *said),
            tools=self._tools(),
            choice=self._choice(),
            effort="high" if effort in ("xhigh", "max") else effort,
            is_wish=True,
            thinks=None if self.thinking is None else self.thinking.type != "disabled",
        )

    def _tools(self) -> tuple[Tool, ...]:
        return tools_of(self.tools or ())

    def _choice(self) -> ToolChoice:
        asked = self.tool_choice or ToolChoiceParam(type="auto")
        names = [tool.name for tool in self.tools or ()]
        is_parallel = not asked.disable_parallel_tool_use
        if (asked.type == "tool") != (asked.name is not None):
            raise ValidationFailed(
                "`tool_choice.name` belongs to the type tool alone, which needs it", param="tool_choice.name"
            )
        kind: Literal["auto", "none", "required"] = "required"
        if asked.type in ("auto", "none"):
            kind = "auto" if asked.type == "auto" else "none"
        return tool_choice(kind, asked.name, names, is_parallel=is_parallel)


class MessagesRequest(CountTokensRequest, MaskFields):
    """`POST /v1/messages`."""

    max_tokens: TokenCount = Field(description="at most so many, and no more than the context has room for")
    stream: bool | None = None
    stop_sequences: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="default the generation config's, else 1; 0 is greedy"
    )
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    metadata: NotKept = Field(None, description="not kept")
    service_tier: Annotated[str, Field(max_length=MAX_STOP_LENGTH)] | None = Field(None, description="not kept")
    inference_geo: Annotated[str, Field(max_length=MAX_STOP_LENGTH)] | None = Field(None, description="not kept")
    speed: unsupported("standard") = None  # type: ignore[valid-type]
    container: unsupported() = None  # type: ignore[valid-type]

    def content(self) -> Constraint | None:
        """The form that the text must have, if one is asked for."""
        asked = self.output_config.format if self.output_config else None
        return None if asked is None else Json(asked.schema_)

    def sampling(self) -> SamplingFields:
        """The fields that decide which tokens are chosen, by the names of the other dialects."""
        return SamplingFields(
            top_k=self.top_k,
            top_p=self.top_p,
            stop=self.stop_sequences or [],
            profile=self.profile,
            pool=self.pool,
            on_missing=self.on_missing,
            adapter=self.adapter,
            router_temperature=self.router_temperature,
        )


def _joined(blocks: Sequence[TextBlock]) -> str:
    return "\n\n".join(block.text for block in blocks)


def _messages(message: MessageParam, place: str) -> Iterator[Message]:
    """The messages that one of this dialect stands for: results of calls are messages of their own."""
    allowed: dict[str, tuple[type[Strict], ...]] = {
        "assistant": (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
        "user": (TextBlock, ToolResultBlock),
        "system": (TextBlock,),
    }
    for at, block in enumerate(message.content):
        if not isinstance(block, allowed[message.role]):
            name = f"{place}.content[{at}]"
            raise ValidationFailed(f"`{name}` has a type that a message of this role has not", param=name)
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            text = _joined(block.content or [])
            text = f"Error: {text}" if block.is_error and not text.startswith("Error") else text
            yield Message("tool", text, place, call_id=block.tool_use_id)
    texts = [block for block in message.content if isinstance(block, TextBlock)]
    if message.role != "assistant":
        if texts:
            yield Message(message.role, _joined(texts), place)
        return
    thinking = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
    uses = [block for block in message.content if isinstance(block, ToolUseBlock)]
    yield Message(
        "assistant",
        _joined(texts) or None,
        place,
        thinking="\n".join(thinking) or None,
        calls=tuple(Call(use.id, use.name, json.dumps(use.input, ensure_ascii=False)) for use in uses),
    )
