"""Requests of OpenAI's Responses dialect: the whole conversation as items, since nothing is stored.

Invariant: as in the other dialects, a field that would change the text and is not supported is refused by name; null,
and fields that cannot change the text, are taken and not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from server.api.chat.messages import Call, Chat, Message, ToolChoice
from server.api.chat.tools import MAX_TOOLS, CallId, ChoiceWord, ToolName, tool_choice, tools_of
from server.api.http.constraints import (
    FOR_PLAIN_TEXT,
    JsonObjectFormat,
    JsonSchema,
    SchemaName,
    TextFormat,
    constraint_of,
)
from server.api.http.fields import (
    MAX_PARTS,
    MAX_TOKENS,
    OBJECT,
    Bookkeeping,
    ModelName,
    NotKept,
    OrText,
    SamplingFields,
    Strict,
    Text,
    TokenCount,
    by_type,
    of_type,
    or_object,
    unsupported,
)
from server.api.responses.items import Status
from server.constraints.grammar import Constraint, Json

MAX_ITEMS = 4096
_STATELESS = "is not supported, as nothing is stored here: leave it out and send the whole input every time"


class InputText(Strict):
    """A text of the user, the system or the developer."""

    type: Literal["input_text"]
    text: Text


class OutputText(Strict):
    """A text of the assistant, sent back."""

    type: Literal["output_text"]
    text: Text
    annotations: list[Any] | None = Field(None, description="not kept")
    logprobs: list[Any] | None = Field(None, description="not kept")


class RefusalText(Strict):
    """A refusal of the assistant, sent back."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        return self.refusal


Content = Annotated[
    list[
        Annotated[
            Annotated[InputText, of_type("input_text")]
            | Annotated[OutputText, of_type("output_text")]
            | Annotated[RefusalText, of_type("refusal")],
            by_type("input_text", "output_text", "refusal"),
        ]
    ],
    Field(max_length=MAX_PARTS),
    OrText(lambda text: {"type": "input_text", "text": text}),
]


class MessageItem(Strict):
    """A message."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Bookkeeping | None = Field(None, description="not kept")
    status: Status | None = Field(None, description="not kept")
    phase: Bookkeeping | None = Field(None, description="not kept")


class FunctionCallItem(Strict):
    """A call of the assistant, sent back."""

    type: Literal["function_call"]
    call_id: CallId
    name: ToolName
    arguments: Text
    id: Bookkeeping | None = Field(None, description="not kept")
    status: Status | None = Field(None, description="not kept")
    namespace: ToolName | None = None
    caller: NotKept = Field(None, description="not kept")


class FunctionOutputItem(Strict):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: Content
    id: Bookkeeping | None = Field(None, description="not kept")
    status: Status | None = Field(None, description="not kept")


class ReasoningText(Strict):
    """A part of the thinking, or of its summary."""

    type: Literal["reasoning_text", "summary_text", "text"]
    text: Text


class ReasoningItem(Strict):
    """The thinking of the assistant, sent back."""

    type: Literal["reasoning"]
    summary: Annotated[list[ReasoningText], Field(max_length=MAX_PARTS)] | None = None
    content: Annotated[list[ReasoningText], Field(max_length=MAX_PARTS)] | None = None
    encrypted_content: Text | None = Field(None, description="not kept")
    id: Bookkeeping | None = Field(None, description="not kept")
    status: Status | None = Field(None, description="not kept")


Item = MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem


class FunctionTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: ToolName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of the arguments, an object's")
    strict: bool | None = Field(None, description="arguments keep to the schema")
    output_schema: NotKept = Field(None, description="not kept")
    defer_loading: unsupported(False) = None  # type: ignore[valid-type]
    allowed_callers: unsupported(["direct"]) = None  # type: ignore[valid-type]


class Namespace(Strict):
    """Functions under one name; the model knows each as `NAMESPACE.NAME`."""

    type: Literal["namespace"]
    name: ToolName
    description: Text | None = Field(None, description="not kept; the functions have their own")
    tools: Annotated[
        list[Annotated[Annotated[FunctionTool, of_type("function")], by_type("function")]], Field(max_length=MAX_TOOLS)
    ]


class WebSearch(BaseModel):
    """A search that OpenAI's servers run, which agents offer by themselves; the model is not told of it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: Literal["web_search", "web_search_preview"]


class NamedFunction(Strict):
    """The function that must be called."""

    type: Literal["function"]
    name: ToolName


class Reasoning(Strict):
    """The effort of thinking, for chat templates that read it."""

    effort: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,16}$")] | None = Field(
        None, description="none switches thinking off, where the chat template has a switch"
    )
    summary: Bookkeeping | None = Field(None, description="not kept; thinking is told whole")
    generate_summary: Bookkeeping | None = Field(None, description="not kept")
    context: Bookkeeping | None = Field(None, description="not kept")


class NamedSchemaFormat(Strict):
    """A JSON value that is valid under a schema."""

    type: Literal["json_schema"]
    name: SchemaName | None = Field(None, description="not kept")
    schema_: JsonSchema = Field(alias="schema")
    description: Text | None = Field(None, description="not kept")
    strict: bool | None = Field(None, description="not kept: a schema is always enforced")


class TextConfig(Strict):
    """The form of the text."""

    format: (
        Annotated[
            Annotated[TextFormat, of_type("text")]
            | Annotated[JsonObjectFormat, of_type("json_object")]
            | Annotated[NamedSchemaFormat, of_type("json_schema")],
            by_type("text", "json_object", "json_schema", advice=FOR_PLAIN_TEXT),
        ]
        | None
    ) = None
    verbosity: unsupported("medium") = None  # type: ignore[valid-type]


class StreamOptions(Strict):
    """Of a stream."""

    include_obfuscation: bool | None = Field(None, description="not kept: there is none")


class ResponsesRequest(SamplingFields):
    """`POST /v1/responses`."""

    model: ModelName | None = Field(None, description="any name: one model is served")
    input: Annotated[
        list[
            Annotated[
                Annotated[MessageItem, of_type("message")]
                | Annotated[FunctionCallItem, of_type("function_call")]
                | Annotated[FunctionOutputItem, of_type("function_call_output")]
                | Annotated[ReasoningItem, of_type("reasoning")],
                by_type(
                    "message",
                    "function_call",
                    "function_call_output",
                    "reasoning",
                    default="message",
                    advice="items that are stored or that a server runs are not supported",
                ),
            ]
        ],
        Field(min_length=1, max_length=MAX_ITEMS),
        OrText(lambda text: {"role": "user", "content": text}),
    ]
    instructions: Text | None = Field(None, description="the system's message, before the input")
    max_output_tokens: TokenCount | None = Field(None, description="at most so many; default what the context has")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="default the generation config's, else 1; 0 is greedy"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: (
        Annotated[
            list[
                Annotated[
                    Annotated[FunctionTool, of_type("function")]
                    | Annotated[Namespace, of_type("namespace")]
                    | Annotated[WebSearch, of_type("web_search")]
                    | Annotated[WebSearch, of_type("web_search_preview")],
                    by_type("function", "namespace", "web_search", "web_search_preview"),
                ]
            ],
            Field(max_length=MAX_TOOLS),
        ]
        | None
    ) = None
    tool_choice: Annotated[ChoiceWord | Annotated[NamedFunction, OBJECT], or_object(str)] | None = Field(
        None, description="default auto; required forces a call, and so does the name of a function"
    )
    parallel_tool_calls: bool | None = Field(None, description="whether an answer may have several calls; default true")
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="variables for the chat template")
    store: unsupported(False, advice=_STATELESS) = None  # type: ignore[valid-type]
    previous_response_id: unsupported(advice=_STATELESS) = None  # type: ignore[valid-type]
    conversation: unsupported(advice=_STATELESS) = None  # type: ignore[valid-type]
    prompt: unsupported(advice=_STATELESS) = None  # type: ignore[valid-type]
    background: unsupported(False, advice=_STATELESS) = None  # type: ignore[valid-type]
    include: (
        list[
            Literal[
                "reasoning.encrypted_content",
                "code_interpreter_call.outputs",
                "computer_call_output.output.image_url",
                "file_search_call.results",
                "message.input_image.image_url",
                "web_search_call.results",
                "web_search_call.action.sources",
            ]
        ]
        | None
    ) = Field(None, description="not kept: answers have nothing of these")
    truncation: unsupported("disabled") = None  # type: ignore[valid-type]
    top_logprobs: unsupported(0) = None  # type: ignore[valid-type]
    context_management: unsupported([]) = None  # type: ignore[valid-type]
    max_tool_calls: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(
        None, description="not kept: the server runs no tools"
    )
    metadata: dict[str, Any] | None = Field(None, description="told again in the answer, else not kept")
    client_metadata: NotKept = Field(None, description="not kept")
    user: Bookkeeping | None = Field(None, description="not kept")
    service_tier: Bookkeeping | None = Field(None, description="not kept")
    safety_identifier: Bookkeeping | None = Field(None, description="not kept")
    prompt_cache_key: Bookkeeping | None = Field(None, description="not kept")
    prompt_cache_retention: Bookkeeping | None = Field(None, description="not kept")
    prompt_cache_options: NotKept = Field(None, description="not kept")

    def chat(self) -> Chat:
        """The chat that is asked for.

        Raises:
            ValidationFailed: nothing is there to answer, or a choice of a tool that there is not.
        """
        effort = self.reasoning.effort if self.reasoning else None
        return Chat(
            messages=self._messages(),
            tools=tools_of(self.functions),
            choice=self._choice(),
            variables=self.chat_template_kwargs or {},
            effort=effort,
            is_wish=True,
            thinks=None if effort is None else effort != "none",
        )

    def content(self) -> Constraint | None:
        """The form that the content must have, if one is asked for."""
        asked = self.text.format if self.text else None
        return Json(asked.schema_) if isinstance(asked, NamedSchemaFormat) else constraint_of(asked)

    @property
    def functions(self) -> list[FunctionTool]:
        """The functions that the model is told of, those of namespaces by their whole names."""
        found: list[FunctionTool] = []
        for tool in self.tools or ():
            if isinstance(tool, FunctionTool):
                found.append(tool)
            elif isinstance(tool, Namespace):
                found += [each.model_copy(update={"name": f"{tool.name}.{each.name}"}) for each in tool.tools]
        return found

    @property
    def namespaces(self) -> dict[str, tuple[str, str]]:
        """The namespace and the name in it, by the whole name."""
        return {
            f"{tool.name}.{each.name}": (tool.name, each.name)
            for tool in self.tools or ()
            if isinstance(tool, Namespace)
            for each in tool.tools
        }

    def _messages(self) -> tuple[Message, ...]:
        said: list[Message] = []
        if self.instructions:
            said.append(Message("system", self.instructions, "instructions"))
        for at, item in enumerate(self.input):
            message = _message(item, f"input[{at}]")
            joined = _joined(said[-1], message) if said else None
            if joined is None:
                said.append(message)
            else:
                said[-1] = joined
        return tuple(said)

    def _choice(self) -> ToolChoice:
        names = [tool.name for tool in self.functions]
        is_parallel = self.parallel_tool_calls is not False
        if isinstance(self.tool_choice, NamedFunction):
            return tool_choice("required", self.tool_choice.name, names, is_parallel=is_parallel)
        return tool_choice(self.tool_choice or "auto", None, names, is_parallel=is_parallel)


def _message(item: Item, place: str) -> Message:
    """The message of one item; parts of the assistant's are joined by `_joined`."""
    if isinstance(item, MessageItem):
        return Message(item.role, _text(item.content), place)
    if isinstance(item, FunctionCallItem):
        name = f"{item.namespace}.{item.name}" if item.namespace else item.name
        return Message("assistant", None, place, calls=(Call(item.call_id, name, item.arguments),))
    if isinstance(item, FunctionOutputItem):
        return Message("tool", _text(item.output), place, call_id=item.call_id)
    return Message("assistant", None, place, thinking=_text(item.content or item.summary or []))


def _text(parts: Sequence[InputText | OutputText | RefusalText | ReasoningText]) -> str:
    return "".join(part.text for part in parts)


def _joined(first: Message, second: Message) -> Message | None:
    """Both as one message, if they are: the system's at the beginning; thinking, content and calls of one answer."""
    leading = ("system", "developer")
    if first.place == "instructions" and second.role in leading:
        return replace(first, content=f"{first.content}\n\n{second.content}")
    if first.role != "assistant" or second.role != "assistant":
        return None
    goes_on = (not second.thinking or not (first.thinking or first.content or first.calls)) and (
        second.content is None or not (first.content or first.calls)
    )
    if not goes_on:
        return None
    return replace(
        first,
        content=second.content if first.content is None else first.content,
        thinking=first.thinking or second.thinking,
        calls=(*first.calls, *second.calls),
    )
