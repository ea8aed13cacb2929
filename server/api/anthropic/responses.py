"""Answers of Anthropic's dialect, whole or as the events of a stream.

Invariant: a block of a stream has ended before the next begins, and all have ended before `message_delta`.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, RootModel

from server.api.chat.answering import Ending
from server.api.chat.parser import Answer, Arguments, CallBegin, Content, Delta
from server.api.http.errors import error_body
from server.api.http.responses import named_event
from server.engine.request import EngineError
from server.serving.deficit import DeficitDetails

SIGNATURE = "unsigned"
"""Clients want a signature of thinking; here it says that there is none."""

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextPart(BaseModel):
    """A text."""

    type: Literal["text"]
    text: str


class ThinkingPart(BaseModel):
    """The thinking."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUsePart(BaseModel):
    """A call; `input` holds the arguments."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


Part = TextPart | ThinkingPart | ToolUsePart


class OutputTokens(BaseModel):
    """Tokens of the answer that were thinking."""

    thinking_tokens: int


class MessageUsage(BaseModel):
    """Token counts. The prompt's are `input_tokens`, which were computed, and those that earlier requests had read."""

    input_tokens: int
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokens | None = None


class AssistantMessage(BaseModel):
    """Answer to `/v1/messages`; `deficit` is ours."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Part]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    deficit: DeficitDetails | None = None


class TokenCountResponse(BaseModel):
    """Answer to `/v1/messages/count_tokens`."""

    input_tokens: int


class MessageStart(BaseModel):
    """The stream begins: a message without content."""

    type: Literal["message_start"]
    message: AssistantMessage


class BlockStart(BaseModel):
    """A block begins."""

    type: Literal["content_block_start"]
    index: int
    content_block: Part


class TextAdded(BaseModel):
    """More of a text."""

    type: Literal["text_delta"]
    text: str


class ThinkingAdded(BaseModel):
    """More of the thinking."""

    type: Literal["thinking_delta"]
    thinking: str


class SignatureAdded(BaseModel):
    """The signature at the end of the thinking."""

    type: Literal["signature_delta"]
    signature: str


class InputAdded(BaseModel):
    """More of a call's input, a part of a JSON text."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(BaseModel):
    """More of the block that began last."""

    type: Literal["content_block_delta"]
    index: int
    delta: TextAdded | ThinkingAdded | SignatureAdded | InputAdded


class BlockStop(BaseModel):
    """A block ends."""

    type: Literal["content_block_stop"]
    index: int


class StopDelta(BaseModel):
    """The reason of the end."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(BaseModel):
    """The end, with the token counts; `deficit` is ours."""

    type: Literal["message_delta"]
    delta: StopDelta
    usage: MessageUsage
    deficit: DeficitDetails


class MessageStop(BaseModel):
    """The stream ends."""

    type: Literal["message_stop"]


class MessageEvent(RootModel[MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop]):
    """One event of a stream; its name is its `type`."""


def stop_of(ending: Ending) -> StopDelta:
    """The reason of an answer's end."""
    reason: StopReason = "tool_use" if ending.num_calls else "end_turn"
    if ending.event.reason == "length":
        reason = "max_tokens"
    elif ending.event.stop_text is not None and not ending.num_calls:
        reason = "stop_sequence"
    return StopDelta(stop_reason=reason, stop_sequence=ending.event.stop_text if reason == "stop_sequence" else None)


def usage_of(ending: Ending) -> MessageUsage:
    """The token counts of an answer."""
    return MessageUsage(
        input_tokens=ending.event.num_prompt_tokens - ending.event.num_cached_tokens,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=ending.event.num_cached_tokens,
        output_tokens=ending.event.num_generated_tokens,
        output_tokens_details=OutputTokens(thinking_tokens=ending.num_thinking_tokens),
    )


def message_of(message_id: str, model: str, answer: Answer, ending: Ending) -> AssistantMessage:
    """A whole answer. A call whose arguments are no JSON object, as where they broke off, is told as text."""
    parts: list[Part] = []
    if answer.thinking:
        parts.append(ThinkingPart(type="thinking", thinking=answer.thinking, signature=SIGNATURE))
    if answer.content:
        parts.append(TextPart(type="text", text=answer.content))
    for call in answer.calls:
        try:
            arguments = json.loads(call.arguments)
        except (ValueError, RecursionError):
            arguments = None
        if isinstance(arguments, dict):
            parts.append(ToolUsePart(type="tool_use", id=call.call_id, name=call.name, input=arguments))
        else:
            parts.append(TextPart(type="text", text=f"{call.name}: {call.arguments}"))
    return AssistantMessage(
        id=message_id,
        type="message",
        role="assistant",
        model=model,
        content=parts,
        usage=usage_of(ending),
        deficit=ending.deficit,
        **stop_of(ending).model_dump(),
    )


class MessageWriter:
    """Writes a stream of `/v1/messages`.

    Args:
        message_id: of the message; model: its name.
        num_prompt_tokens: which the first event tells; the last one tells how many of them were computed.
        path: of the request, whose dialect an error has.
    """

    def __init__(self, message_id: str, model: str, num_prompt_tokens: int, path: str) -> None:
        self._id, self._model, self._num_prompt_tokens, self._path = message_id, model, num_prompt_tokens, path
        self._index = -1
        self._open: type[Part] | None = None

    def begin(self) -> bytes:
        """`message_start`."""
        message = AssistantMessage(
            id=self._id,
            type="message",
            role="assistant",
            model=self._model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=MessageUsage(
                input_tokens=self._num_prompt_tokens,
                cache_creation_input_tokens=0,
                cache_read_input_tokens=0,
                output_tokens=0,
            ),
        )
        return named_event(MessageStart(type="message_start", message=message))

    def add(self, deltas: list[Delta]) -> bytes:
        """Blocks that begin, go on and end."""
        return b"".join(map(self._add, deltas))

    def _add(self, delta: Delta) -> bytes:
        if isinstance(delta, CallBegin):
            return self._turn_to(ToolUsePart(type="tool_use", id=delta.call_id, name=delta.name, input={}))
        if isinstance(delta, Arguments):
            return self._delta(InputAdded(type="input_json_delta", partial_json=delta.text))
        if isinstance(delta, Content):
            begin = self._turn_to(TextPart(type="text", text=""), is_new=False)
            return begin + self._delta(TextAdded(type="text_delta", text=delta.text))
        begin = self._turn_to(ThinkingPart(type="thinking", thinking="", signature=""), is_new=False)
        return begin + self._delta(ThinkingAdded(type="thinking_delta", thinking=delta.text))

    def _turn_to(self, part: Part, *, is_new: bool = True) -> bytes:
        if not is_new and self._open is type(part):
            return b""
        stop = self._stop()
        self._index += 1
        self._open = type(part)
        return stop + named_event(BlockStart(type="content_block_start", index=self._index, content_block=part))

    def _stop(self) -> bytes:
        if self._open is None:
            return b""
        is_thinking = self._open is ThinkingPart
        signed = self._delta(SignatureAdded(type="signature_delta", signature=SIGNATURE)) if is_thinking else b""
        self._open = None
        return signed + named_event(BlockStop(type="content_block_stop", index=self._index))

    def _delta(self, delta: TextAdded | ThinkingAdded | SignatureAdded | InputAdded) -> bytes:
        return named_event(BlockDelta(type="content_block_delta", index=self._index, delta=delta))

    def end(self, ending: Ending) -> bytes:
        """The last block's end, `message_delta` and `message_stop`."""
        delta = MessageDelta(
            type="message_delta", delta=stop_of(ending), usage=usage_of(ending), deficit=ending.deficit
        )
        return self._stop() + named_event(delta) + named_event(MessageStop(type="message_stop"))

    def fail(self, error: EngineError) -> bytes:
        """`error`."""
        return named_event(error_body(error, self._path))
