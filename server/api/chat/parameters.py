"""Arguments as one text for each parameter, as XML-like formats have them, in the form of a constraint.

Invariant: the parser reads what matches back as arguments that are valid under the schema. A schema of which that
cannot be promised has no such form; a forced call is then written in another format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.api.chat.formats import CallFormat, types_of
from server.api.chat.messages import Tool
from server.constraints.grammar import Chain, Constraint, Json, OneOf, Repeat, Text, Until

_PLAIN = frozenset({"type", "properties", "required", "additionalProperties", "$defs", "definitions"})
_NOTES = frozenset({"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated"})


def can_force(calls: CallFormat | None, tools: Sequence[Tool]) -> bool:
    """Whether calls of all tools can be forced in this format."""
    if calls is None or calls.literal is None:
        return False
    return all(arguments_of(calls, tool) is not None for tool in tools)


def arguments_of(calls: CallFormat, tool: Tool) -> Constraint | None:
    """The arguments of a call of the tool, as the format writes them; None where that cannot be said."""
    schema = dict(tool.parameters)
    if calls.parameter is None:
        return Json(schema)
    assert calls.parameter_text is not None, "a format of parameters says how one is written"
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if set(schema) - _PLAIN - _NOTES or not isinstance(properties, Mapping) or not isinstance(required, list):
        return None
    if not all(key in list(properties) for key in required):
        return None
    before, after = calls.parameter_text
    parts: list[Constraint] = []
    for key, each in properties.items():
        value = _value(each, schema, after)
        if value is None or "<" in key or ">" in key or '"' in key:
            return None
        parameter = Chain((Text(before.replace("KEY", key)), *value))
        parts.append(parameter if key in required else Repeat(parameter, 0, 1))
    return Chain(tuple(parts))


def _value(schema: Any, root: Mapping[str, Any], after: str) -> tuple[Constraint, ...] | None:
    """The text of a value and what follows it."""
    types = types_of(schema, root)
    if not types or not isinstance(schema, Mapping):
        return None
    if "string" not in types:
        definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
        return Json({**definitions, **schema}), Text(after)
    if types != {"string"} or set(schema) - _NOTES - {"type", "enum", "const"}:
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values is None:
        return (Until(after),)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return None
    return OneOf(tuple(Text(value) for value in values)), Text(after)
