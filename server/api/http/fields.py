"""Field types of the request schemas of all dialects: texts and numbers with limits, and unsupported parameters.

Invariant: a limit that a validator checks is also in the JSON Schema, if JSON Schema can express it. So the OpenAPI
document tells a client what is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
    Tag,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

MAX_TEXT = 2**22
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_TOP_TOKENS = 20
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**64 - 1
MAX_POOL = 65536
MAX_PARTS = 4096
NO_NUL = r"^[^\x00]*$"
PROFILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
WRONG_TYPE = "type"
"""The kind of error where no member of a union has the `type` of an object."""
KIND = "type="
"""Begins the tag of a union's member, which is no part of a place in the body."""


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
_STOP_SCHEMA = {"type": "string", "maxLength": MAX_STOP_LENGTH, "pattern": NO_NUL}


def is_text(value: Any, longest: int = MAX_TEXT) -> bool:
    """Whether `value` is a text of at most `longest` characters, without NUL and lone surrogates."""
    if not isinstance(value, str) or len(value) > longest or "\0" in value:
        return False
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if isinstance(stops, list) and len(stops) <= MAX_STOPS and all(is_text(item, MAX_STOP_LENGTH) for item in stops):
        return [stop for stop in stops if stop]
    raise PydanticCustomError(
        "stop", f"must be a text or a list of at most {MAX_STOPS} texts of at most {MAX_STOP_LENGTH} characters"
    )


StopTexts = Annotated[
    list[str],
    BeforeValidator(_stops),
    WithJsonSchema(
        {"anyOf": [{"type": "null"}, _STOP_SCHEMA, {"type": "array", "maxItems": MAX_STOPS, "items": _STOP_SCHEMA}]}
    ),
]
TokenCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
ModelName = Annotated[str, StringConstraints(max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]
Bookkeeping = Annotated[str, StringConstraints(max_length=MAX_STOP_LENGTH)]
"""A text that cannot change the answer; it is taken and not kept."""
NotKept = dict[str, Any] | None
"""An object of the same kind."""


def of_type(kind: str) -> Tag:
    """Marks the member of a union that `by_type` chooses for a type."""
    return Tag(KIND + kind)


def by_type(
    *kinds: str,
    default: str | None = None,
    advice: str = "images, files and what a server runs are not supported",
) -> Discriminator:
    """Tells objects of a union apart by `type`; the refusal of another type does not repeat it.

    Args:
        kinds: the types that there are.
        default: of an object without one; None refuses it.
        advice: the end of the refusal.
    """

    def type_of(value: Any) -> str | None:
        if not isinstance(value, dict | BaseModel):
            return KIND + kinds[0]  # which says that it must be an object
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        kind = default if kind is None else kind
        return KIND + kind if isinstance(kind, str) else None

    text = f"must be {'one of ' if len(kinds) > 1 else ''}{', '.join(kinds)}; {advice}"
    return Discriminator(type_of, custom_error_type=WRONG_TYPE, custom_error_message=text)


WORD, OBJECT = Tag(f"{KIND}word"), Tag(f"{KIND}object")


def or_object(word: type[str] | type[bool]) -> Discriminator:
    """Tells the member of a union that is a text or a boolean (`WORD`) from the one that is an object (`OBJECT`)."""
    return Discriminator(lambda value: (WORD if isinstance(value, word) else OBJECT).tag)


class OrText:
    """Metadata of a list of objects that may be a text instead, which stands for the one that `as_object` makes."""

    def __init__(self, as_object: Callable[[str], dict[str, Any]]) -> None:
        self._as_object = as_object

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def as_list(value: Any) -> Any:
            return [self._as_object(value)] if isinstance(value, str) else value

        return core_schema.no_info_before_validator_function(as_list, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "maxLength": MAX_TEXT, "pattern": NO_NUL}, handler(schema)]}


def unsupported(*neutral: Any, advice: str = "is not supported by this server; leave it out") -> Any:
    """A parameter that is not supported: null and the `neutral` values are taken, all others refused with `advice`."""

    def validate(value: Any) -> Any:
        if value is None or any(value == item and type(value) is type(item) for item in neutral):
            return None
        raise PydanticCustomError("unsupported", advice)

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
    """The experts that a request may use; parameters of our own, in all dialects."""

    profile: Annotated[str, Field(pattern=PROFILE_NAME)] | None = Field(
        None, description="name of a mask of this server, see GET /experts/profiles"
    )
    pool: Pool = Field(
        None,
        description="experts of every layer, or a share of them, chosen from the prompt and anew as the text goes on",
    )
    adapter: Annotated[str, Field(pattern=PROFILE_NAME)] | None = Field(
        None,
        description="adapter of the masked tokens: auto (default) is the one that was made for the mask, none is none, "
        "or a name of GET /experts/profiles; tokens without a mask never have one",
    )
    on_missing: Literal["mask", "fetch", "refuse"] | None = Field(
        None,
        description="where a demanded expert is missing: do without (default), fetch it from the checkpoint, fail",
    )
    router_temperature: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        None, description="divides the routers' logits; 1 is the model as it is"
    )


class SamplingFields(MaskFields):
    """Parameters that decide which tokens are chosen. Null leaves them to the generation config.

    The fields after `stop` exist in other servers and are not supported here; only their neutral values are accepted.
    """

    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = Field(
        None, description="sample from the k most likely tokens; 0 and -1 are off"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="sample from the most likely tokens whose probability reaches this; 1 is off"
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="sample from tokens at least this share as likely as the most likely one; 0 is off"
    )
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="sample from the tokens nearest to the entropy until they reach this probability; 1 is off"
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="divides positive and multiplies negative logits of tokens seen before; 1 is off"
    )
    presence_penalty: Penalty | None = Field(None, description="taken off the logits of generated tokens; 0 is off")
    frequency_penalty: Penalty | None = Field(
        None, description="taken off the logits of generated tokens, once for each time; 0 is off"
    )
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = (
        Field(None, description="token id → value added to its logit")
    )
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = Field(
        None, description="no end of sequence and no stop string before so many tokens"
    )
    ignore_eos: bool | None = Field(None, description="generate on past the end-of-sequence token")
    skip_special_tokens: bool | None = Field(
        None, description="leave special tokens out of the text; default true, unless the model's format needs them"
    )
    include_stop_str_in_output: bool | None = Field(
        None, description="keep the stop string in the text; default true for /generate, false under /v1"
    )
    stop: StopTexts = Field(default_factory=list, description="generation ends at one of these")
    stop_token_ids: unsupported([]) = None  # type: ignore[valid-type]
    bad_words: unsupported([]) = None  # type: ignore[valid-type]
    allowed_token_ids: unsupported() = None  # type: ignore[valid-type]
    use_beam_search: unsupported(False) = None  # type: ignore[valid-type]
    length_penalty: unsupported(1, 1.0) = None  # type: ignore[valid-type]
    early_stopping: unsupported(False) = None  # type: ignore[valid-type]
    spaces_between_special_tokens: unsupported(True) = None  # type: ignore[valid-type]
    guided_json: unsupported() = None  # type: ignore[valid-type]
    guided_regex: unsupported() = None  # type: ignore[valid-type]
    guided_choice: unsupported() = None  # type: ignore[valid-type]
    guided_grammar: unsupported() = None  # type: ignore[valid-type]
    structured_outputs: unsupported() = None  # type: ignore[valid-type]
