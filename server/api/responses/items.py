"""Answers of OpenAI's Responses dialect: output items, and the events that tell how they grow.

Invariant: items come one after another: each has ended before the next begins, and all before the response's last
event, unless it failed. The output of the last event is that of the answer without a stream.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, RootModel

from server.api.chat.answering import Ending
from server.api.chat.parser import Arguments, CallBegin, Content, Delta
from server.api.http.errors import message_of, row_of
from server.api.http.responses import named_event
from server.engine.request import EngineError
from server.serving.deficit import DeficitDetails

Status = Literal["in_progress", "completed", "incomplete"]


class OutputTextPart(BaseModel):
    """A text of the answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class ReasoningPart(BaseModel):
    """A text of the thinking."""

    type: Literal["reasoning_text"]
    text: str


class OutputMessage(BaseModel):
    """The content of the answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Status
    content: list[OutputTextPart]


class OutputReasoning(BaseModel):
    """The thinking, whole: there is no summary of it."""

    id: str
    type: Literal["reasoning"]
    status: Status
    summary: list[Any]
    content: list[ReasoningPart]


class OutputCall(BaseModel):
    """A call of a function; `arguments` is JSON as the model wrote it."""

    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


OutputItem = OutputMessage | OutputReasoning | OutputCall
Kind = Literal["message", "reasoning", "function_call"]


class CachedTokens(BaseModel):
    """Tokens of the prompt that earlier requests had read, so that they were not computed."""

    cached_tokens: int


class ReasoningTokens(BaseModel):
    """Tokens of the answer that were thinking."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Token counts."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class IncompleteDetails(BaseModel):
    """The reason of an answer that broke off."""

    reason: Literal["max_output_tokens"]


class Failure(BaseModel):
    """The error of an answer that failed."""

    code: str
    message: str


class ResponseObject(BaseModel):
    """Answer to `/v1/responses`; what was asked for is told again. `deficit` is ours."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: Failure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, Any]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    store: Literal[False]
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    deficit: DeficitDetails | None = None


class ResponseChanged(BaseModel):
    """The response begins or ends."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: int
    response: ResponseObject


class ItemChanged(BaseModel):
    """An item begins or ends."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputItem


class PartChanged(BaseModel):
    """A part of an item begins or ends."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    part: OutputTextPart | ReasoningPart


class TextChanged(BaseModel):
    """More of a text (`delta`), or all of it (`text`)."""

    type: Literal[
        "response.output_text.delta",
        "response.output_text.done",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
    ]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str | None = None
    text: str | None = None
    logprobs: list[Any] | None = None


class ArgumentsChanged(BaseModel):
    """More of a call's arguments (`delta`), or all of them (`arguments`)."""

    type: Literal["response.function_call_arguments.delta", "response.function_call_arguments.done"]
    sequence_number: int
    item_id: str
    output_index: int
    delta: str | None = None
    name: str | None = None
    arguments: str | None = None


class ResponseEvent(RootModel[ResponseChanged | ItemChanged | PartChanged | TextChanged | ArgumentsChanged]):
    """One event of a stream; its name is its `type`."""


@dataclass
class _Item:
    """An item that grows."""

    kind: Kind
    begin: CallBegin | None = None
    namespace: str | None = None
    name: str = ""
    texts: list[str] = field(default_factory=list)
    item_id: str = ""

    def __post_init__(self) -> None:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[self.kind]
        self.item_id = f"{prefix}_{uuid.uuid4().hex}"

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self, text: str) -> OutputTextPart | ReasoningPart:
        if self.kind == "reasoning":
            return ReasoningPart(type="reasoning_text", text=text)
        return OutputTextPart(type="output_text", text=text, annotations=[], logprobs=[])

    def output(self, status: Status, *, is_begun: bool = True) -> OutputItem:
        """The item as it is told; without its parts before it has begun."""
        if self.begin is not None:
            return OutputCall(
                id=self.item_id,
                type="function_call",
                status=status,
                call_id=self.begin.call_id,
                name=self.name,
                arguments=self.text,
                **({} if self.namespace is None else {"namespace": self.namespace}),
            )
        parts: Any = [self.part(self.text)] if is_begun else []
        if self.kind == "reasoning":
            return OutputReasoning(id=self.item_id, type="reasoning", status=status, summary=[], content=parts)
        return OutputMessage(id=self.item_id, type="message", role="assistant", status=status, content=parts)


def _kind_of(delta: Delta) -> Kind:
    if isinstance(delta, CallBegin | Arguments):
        return "function_call"
    return "message" if isinstance(delta, Content) else "reasoning"


class ResponseWriter:
    """Writes an answer of `/v1/responses`, whole or as a stream.

    Args:
        asked: the response before it has begun.
        namespaces: (namespace, name) of functions by the names that the model knows.
    """

    def __init__(self, asked: ResponseObject, namespaces: Mapping[str, tuple[str, str]]) -> None:
        self._asked = asked
        self._namespaces = namespaces
        self._items: list[_Item] = []
        self._num_events = 0
        self._is_open = False

    def whole(self, deltas: list[Delta], ending: Ending) -> ResponseObject:
        """The response of an answer that has ended."""
        self.add(deltas)
        return self._ended(ending)

    def begin(self) -> bytes:
        """`response.created` and `response.in_progress`."""
        return self._changed("response.created", self._asked) + self._changed("response.in_progress", self._asked)

    def add(self, deltas: list[Delta]) -> bytes:
        """Items that begin, go on and end."""
        return b"".join(map(self._add, deltas))

    def _add(self, delta: Delta) -> bytes:
        kind = _kind_of(delta)
        begin = delta if isinstance(delta, CallBegin) else None
        told = b""
        if begin is not None or not self._is_open or self._items[-1].kind != kind:
            told = self._close() + self._begin(self._item(kind, begin))
        if isinstance(delta, CallBegin):
            return told
        item = self._items[-1]
        item.texts.append(delta.text)
        if kind == "function_call":
            return told + self._event(
                ArgumentsChanged,
                type="response.function_call_arguments.delta",
                item_id=item.item_id,
                delta=delta.text,
            )
        return told + self._text(item, "delta", delta=delta.text)

    def _item(self, kind: Kind, begin: CallBegin | None) -> _Item:
        if begin is None:
            return _Item(kind)
        namespace, name = self._namespaces.get(begin.name, (None, begin.name))
        return _Item(kind, begin, namespace, name)

    def _begin(self, item: _Item) -> bytes:
        self._items.append(item)
        self._is_open = True
        told = self._event(
            ItemChanged, type="response.output_item.added", item=item.output("in_progress", is_begun=False)
        )
        return told + (b"" if item.begin is not None else self._part("added", item, ""))

    def _close(self, status: Status = "completed") -> bytes:
        if not self._is_open:
            return b""
        self._is_open = False
        item = self._items[-1]
        if item.begin is None:
            told = self._text(item, "done", text=item.text) + self._part("done", item, item.text)
        else:
            told = self._event(
                ArgumentsChanged,
                type="response.function_call_arguments.done",
                item_id=item.item_id,
                name=item.name,
                arguments=item.text,
            )
        return told + self._event(ItemChanged, type="response.output_item.done", item=item.output(status))

    def end(self, ending: Ending) -> bytes:
        """The last item's end, and `response.completed` or `response.incomplete`."""
        response = self._ended(ending)
        is_cut = response.status == "incomplete"
        told = self._close("incomplete" if is_cut else "completed")
        return told + self._changed("response.incomplete" if is_cut else "response.completed", response)

    def fail(self, error: EngineError) -> bytes:
        """`response.failed`."""
        failure = Failure(code=row_of(error).openai_code or "server_error", message=message_of(error))
        output = self._output("incomplete")
        response = self._asked.model_copy(update={"status": "failed", "error": failure, "output": output})
        return self._changed("response.failed", response)

    def _output(self, last: Status) -> list[OutputItem]:
        """All items, of which only the last may be incomplete."""
        whole = [item.output("completed") for item in self._items[:-1]]
        return whole + [item.output(last) for item in self._items[-1:]]

    def _ended(self, ending: Ending) -> ResponseObject:
        end = ending.event
        is_cut = end.reason == "length"
        usage = ResponseUsage(
            input_tokens=end.num_prompt_tokens,
            input_tokens_details=CachedTokens(cached_tokens=end.num_cached_tokens),
            output_tokens=end.num_generated_tokens,
            output_tokens_details=ReasoningTokens(reasoning_tokens=ending.num_thinking_tokens),
            total_tokens=end.num_prompt_tokens + end.num_generated_tokens,
        )
        return self._asked.model_copy(
            update={
                "status": "incomplete" if is_cut else "completed",
                "incomplete_details": IncompleteDetails(reason="max_output_tokens") if is_cut else None,
                "output": self._output("incomplete" if is_cut else "completed"),
                "usage": usage,
                "deficit": ending.deficit,
            }
        )

    def _changed(self, kind: str, response: ResponseObject) -> bytes:
        return self._event(ResponseChanged, type=kind, response=response, is_placed=False)

    def _part(self, kind: Literal["added", "done"], item: _Item, text: str) -> bytes:
        return self._event(
            PartChanged,
            type=f"response.content_part.{kind}",
            item_id=item.item_id,
            content_index=0,
            part=item.part(text),
        )

    def _text(self, item: _Item, kind: Literal["delta", "done"], **text: Any) -> bytes:
        if item.kind == "message":
            text["logprobs"] = []
        name = "output_text" if item.kind == "message" else "reasoning_text"
        return self._event(TextChanged, type=f"response.{name}.{kind}", item_id=item.item_id, content_index=0, **text)

    def _event(self, model: type[BaseModel], *, is_placed: bool = True, **values: Any) -> bytes:
        place = {"output_index": len(self._items) - 1} if is_placed else {}
        told = named_event(model(sequence_number=self._num_events, **place, **values))
        self._num_events += 1
        return told
