"""A chat as every dialect hands it over: messages, the tools that the answer may call, and the template's variables.

Invariant: `place` says where a message or the tools stand in the client's body, so that a refusal names the client's
own field whatever its dialect.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Call:
    """A call of a tool in an assistant's message; `arguments` is JSON as the model wrote it."""

    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        content: None only for an assistant that has none.
        place: of the message in the client's body, as `messages[0]`.
        name: of who speaks, for templates that show it.
        thinking: of the assistant, before the content.
        calls: of the assistant, after the content.
        call_id: the call that a tool's message answers.
    """

    role: Role
    content: str | None
    place: str
    name: str | None = None
    thinking: str | None = None
    calls: tuple[Call, ...] = ()
    call_id: str | None = None


@dataclass(frozen=True)
class Tool:
    """A function that the answer may call; `parameters` is the JSON Schema of its arguments, an object's."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    is_strict: bool = False


@dataclass(frozen=True)
class ToolChoice:
    """The calls that the client wants.

    Attributes:
        kind: "auto" leaves it to the model, "none" hides the tools, "required" forces a call of any tool.
        name: forces a call of this tool, where `kind` is "required".
        is_parallel: whether one answer may have several calls.
    """

    kind: Literal["auto", "none", "required"] = "auto"
    name: str | None = None
    is_parallel: bool = True


@dataclass(frozen=True)
class Chat:
    """Messages to answer.

    Attributes:
        choice: has no meaning without tools.
        variables: of the chat template, as `enable_thinking`.
        effort: `reasoning_effort`, for templates that read it.
        is_wish: whether a template that does not read the effort ignores it; else it refuses the chat.
        thinks: switches the thinking where the template has a switch; None leaves it to the template.
        tools_place: of the tools in the client's body.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = field(default_factory=ToolChoice)
    variables: Mapping[str, Any] = field(default_factory=dict)
    effort: str | None = None
    is_wish: bool = False
    thinks: bool | None = None
    tools_place: str = "tools"

    @property
    def shown_tools(self) -> tuple[Tool, ...]:
        """The tools that the model is told of."""
        return () if self.choice.kind == "none" else self.tools


def new_call_id() -> str:
    """An id for a call whose format has none."""
    return f"call_{uuid.uuid4().hex[:24]}"
