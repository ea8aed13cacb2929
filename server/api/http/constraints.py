"""The fields by which a client constrains the text: `response_format` of OpenAI's dialect, `grammar` of TGI's.

A schema stays as the client sent it until it is compiled; the compiler alone decides whether it can be enforced.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from server.api.http.fields import NO_NUL, OBJECT, WORD, Strict, Text, by_type, of_type, or_object
from server.constraints.grammar import Constraint, Json, Regex

MAX_PATTERN = 8192
FOR_PLAIN_TEXT = "leave it out for plain text"
JsonSchema = Annotated[
    Annotated[dict[str, Any], OBJECT] | Annotated[bool, WORD],
    or_object(bool),
    Field(description="JSON Schema; what cannot be enforced is refused"),
]
SchemaName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PATTERN, pattern=NO_NUL)]


class TextFormat(Strict):
    """Plain text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Strict):
    """A JSON Schema with a name."""

    name: SchemaName | None = Field(None, description="not kept")
    schema_: JsonSchema | None = Field(None, alias="schema", description="default: any object")
    description: Text | None = Field(None, description="not kept")
    strict: bool | None = Field(None, description="not kept: a schema is always enforced")


class JsonSchemaFormat(Strict):
    """A JSON value that is valid under a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class JsonGrammar(Strict):
    """A JSON value that is valid under a schema."""

    type: Literal["json"]
    value: JsonSchema


class NamedJsonGrammar(Strict):
    """The same, with a name."""

    type: Literal["json_schema"]
    value: NamedSchema


class RegexGrammar(Strict):
    """A text that a regular expression matches whole."""

    type: Literal["regex"]
    value: Pattern


ResponseFormat = Annotated[
    Annotated[TextFormat, of_type("text")]
    | Annotated[JsonObjectFormat, of_type("json_object")]
    | Annotated[JsonSchemaFormat, of_type("json_schema")],
    by_type("text", "json_object", "json_schema", advice=FOR_PLAIN_TEXT),
]
Grammar = Annotated[
    Annotated[JsonGrammar, of_type("json")]
    | Annotated[NamedJsonGrammar, of_type("json_schema")]
    | Annotated[RegexGrammar, of_type("regex")],
    by_type("json", "json_schema", "regex", advice=FOR_PLAIN_TEXT),
]


def constraint_of(asked: ResponseFormat | Grammar | None) -> Constraint | None:
    """The constraint that a field asks for; None for plain text."""
    match asked:
        case JsonObjectFormat():
            return Json({"type": "object"})
        case JsonSchemaFormat(json_schema=named) | NamedJsonGrammar(value=named):
            return Json({"type": "object"} if named.schema_ is None else named.schema_)
        case JsonGrammar(value=schema):
            return Json(schema)
        case RegexGrammar(value=pattern):
            return Regex(pattern)
        case _:
            return None
