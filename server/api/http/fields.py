"""Field types of the request schemas of both dialects: texts and numbers with limits, and unsupported parameters.

Invariant: a limit that a validator checks is also in the JSON Schema, if JSON Schema can express it. So the OpenAPI
document tells a client what is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_TEXT = 2**22
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_TOP_TOKENS = 20
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_POOL = 65536
NO_NUL = r"^[^\x00]*$"
PROFILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Strict(BaseModel):
    """A request object: immutable, unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("text", "must not contain a NUL character")
    return text


Text = Annotated[str, Field(max_length=MAX_TEXT, json_schema_extra={"pattern": NO_NUL}), AfterValidator(_no_nul)]
PromptText = Annotated[
    str, Field(min_length=1, max_length=MAX_TEXT, json_schema_extra={"pattern": NO_NUL}), AfterValidator(_no_nul)
]
StopText = Annotated[
    str,
    Field(min_length=1, max_length=MAX_STOP_LENGTH, json_schema_extra={"pattern": NO_NUL}),
    AfterValidator(_no_nul),
]
StopTexts = Annotated[list[StopText], Field(max_length=MAX_STOPS)]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


def unsupported(*neutral: bool | int | float | str | None) -> Any:
    """A parameter that is not supported: null and the `neutral` values are taken, all others are refused by name."""

    def validate(value: Any) -> Any:
        if value is None or any(value == item and type(value) is type(item) for item in neutral):
            return value
        raise PydanticCustomError("unsupported", "is not supported by this server; leave it out")

    allowed = [None, *neutral]
    return Annotated[Any, BeforeValidator(validate), WithJsonSchema({"enum": allowed})]


def _pool(value: Any) -> int | float | None:
    is_count = type(value) is int and 1 <= value <= MAX_POOL
    if value is None or is_count or (type(value) is float and 0 < value < 1):
        return value  # type: ignore[no-any-return]
    raise PydanticCustomError(
        "pool", f"must be a number of experts from 1 to {MAX_POOL}, or a share of them above 0 and below 1"
    )


Pool = Annotated[
    int | float | None,
    BeforeValidator(_pool),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "null"},
                {"type": "integer", "minimum": 1, "maximum": MAX_POOL},
                {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            ]
        }
    ),
]


class MaskFields(Strict):
    """The experts that a request may use; parameters of our own, in both dialects."""

    profile: Annotated[str, Field(pattern=PROFILE_NAME)] | None = Field(
        None, description="name of a mask of this server, see GET /experts/profiles"
    )
    pool: Pool = Field(
        None,
        description="experts of every layer, or a share of them, chosen from the prompt and anew as the text goes on",
    )
    on_missing: Literal["mask", "fetch", "refuse"] | None = Field(
        None,
        description="where a wanted expert is not available: do without (default), fetch it from the checkpoint, fail",
    )
    router_temperature: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        None, description="divides the routers' logits; 1 is the model as it is"
    )
