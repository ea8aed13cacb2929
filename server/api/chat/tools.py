"""Tools and the choice among them, checked: the same for all dialects, each of which spells them in its own way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import StringConstraints

from server.api.chat.messages import Tool, ToolChoice
from server.api.http.errors import ValidationFailed
from server.api.http.fields import WORD

MAX_TOOLS = 512
ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
ChoiceWord = Annotated[Literal["none", "auto", "required"], WORD]
CallId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:/-]{1,256}$")]


class FunctionLike(Protocol):
    """A function as OpenAI's dialects describe it."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str | None: ...
    @property
    def parameters(self) -> dict[str, Any] | None: ...
    @property
    def strict(self) -> bool | None: ...


def tools_of(functions: Iterable[FunctionLike], place: str = "tools") -> tuple[Tool, ...]:
    """The tools of these functions.

    Raises:
        ValidationFailed: two have one name, or the parameters of one are no object's.
    """
    tools: dict[str, Tool] = {}
    for at, function in enumerate(functions):
        if function.name in tools:
            raise ValidationFailed(f"`{place}[{at}]` has the name of a tool before it", param=f"{place}[{at}]")
        schema: Mapping[str, Any] = function.parameters or {"type": "object", "properties": {}}
        if schema.get("type", "object") != "object":
            raise ValidationFailed(
                f"`{place}[{at}]`: the type of its parameters must be object, as arguments have names",
                param=f"{place}[{at}]",
            )
        tools[function.name] = Tool(function.name, function.description or "", schema, bool(function.strict))
    return tuple(tools.values())


def tool_choice(
    kind: Literal["auto", "none", "required"],
    name: str | None,
    names: Sequence[str],
    *,
    is_parallel: bool,
    place: str = "tool_choice",
) -> ToolChoice:
    """The choice among the tools of these names.

    Raises:
        ValidationFailed: it forces a call, and there is no such tool.
    """
    if kind == "required" and not names:
        raise ValidationFailed(f"`{place}` forces a call, and there are no tools: send `tools`", param=place)
    if name is not None and name not in names:
        raise ValidationFailed(f"`{place}` names a tool that is not in `tools`", param=place)
    return ToolChoice(kind, name, is_parallel)
