"""Constraints without a model: texts that are drawn token by token among the allowed ones, and refusals."""

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.constraints import compiler as compiler_module
from server.constraints.compiler import MAX_GRAMMAR_BYTES, MAX_KEPT, CompiledConstraint, ConstraintCompiler
from server.constraints.grammar import (
    AnyText,
    Chain,
    Constraint,
    ConstraintError,
    Json,
    OneOf,
    Regex,
    Repeat,
    Text,
    Until,
)

VOCAB, EOS, END = 8192, 0, 4
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "size": {"type": "number", "minimum": 0, "maximum": 3},
        "role": {"enum": ["admin", "Köchin", "🦊"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "none": {"type": "null"}},
            "required": ["zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "size", "role", "tags", "home"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerBase) -> ConstraintCompiler:
    return ConstraintCompiler(tokenizer, VOCAB, {EOS, END})


def drawn(compiled: CompiledConstraint, seed: int, most: int = 400) -> list[int] | None:
    """Tokens drawn among the allowed ones, up to the end, which is taken as soon as it is allowed; None: it is far."""
    state, tokens, rng = compiled.begin(), [], random.Random(seed)
    while len(tokens) < most:
        if state.is_complete:
            return tokens
        allowed = state.allowed_flags().nonzero()[0].tolist()
        assert state.error is None
        if EOS in allowed:
            return tokens
        tokens.append(rng.choice(allowed))
        state.take(tokens[-1])
    return None


def takes(compiler: ConstraintCompiler, tokenizer: Any, constraint: Constraint, text: str) -> bool:
    """Whether the text matches the constraint whole."""
    state = compiler.compile(constraint).begin()
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not state.allowed_flags()[token]:
            return False
        state.take(token)
    return bool(state.allowed_flags()[EOS])


def test_every_text_drawn_under_a_schema_is_valid_under_it(compiler: ConstraintCompiler, tokenizer: Any) -> None:
    compiled = compiler.compile(Json(PERSON))
    texts = [tokenizer.decode(tokens) for seed in range(40) if (tokens := drawn(compiled, seed)) is not None]
    assert len(texts) > 30
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(texts)) > 30


DATA = st.recursive(
    st.text(max_size=3) | st.booleans() | st.integers(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
LEAVES = st.one_of(
    st.builds(lambda low: {"type": "integer", "minimum": low, "maximum": low + 5}, st.integers(-999, 999)),
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 5)),
    st.builds(lambda values: {"enum": values}, st.lists(DATA | st.none(), min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, DATA),
    st.sampled_from([{"type": "boolean"}, {"type": ["null", "boolean"]}, {"type": "string", "format": "date"}]),
)


def _containers(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def record(properties: dict[str, Any], num_required: int, extra: bool) -> dict[str, Any]:
        required = list(properties)[:num_required]
        rest = {"type": "boolean"} if extra else False
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": rest}

    def array(items: dict[str, Any], least: int) -> dict[str, Any]:
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + 1}

    return st.one_of(
        st.builds(record, st.dictionaries(st.text(max_size=4), inner, max_size=3), st.integers(0, 3), st.booleans()),
        st.builds(array, inner, st.integers(0, 2)),
        st.builds(lambda first, second: {"anyOf": [first, second]}, inner, inner),
    )


@settings(max_examples=20)
@given(schema=st.recursive(LEAVES, _containers, max_leaves=5), seed=st.integers(0, 999))
def test_texts_are_valid_under_schemas_that_nobody_wrote(
    compiler: ConstraintCompiler, tokenizer: Any, schema: dict[str, Any], seed: int
) -> None:
    tokens = drawn(compiler.compile(Json(schema)), seed)
    if tokens is not None:
        text = tokenizer.decode(tokens)
        jsonschema.validate(json.loads(text), schema)


CALL = Chain((Text('<call>{"a": '), Json({"type": "integer"}), Text("}</call>")))


@pytest.mark.parametrize(
    ("constraint", "matching", "others"),
    [
        (Text("a\nb"), ["a\nb"], ["a", "a\nbc", ""]),
        (Text("<|user|>é"), ["<|user|>é"], ["é", "<|pad|>é"]),
        (Regex(r"\d{2}(-|/)x"), ["12-x", "34/x"], ["12x", "1-x", "12-xx"]),
        (Json(True), ['"é"', "[1, {}]", "null"], ["nul", "", "1 2"]),
        (Json({"type": "object"}), ["{}", '{ "a": [1] }'], ["[]", '{"a":  1}', '{\n}']),
        (AnyText(), ["", "any text\n", "🦊"], ["a<|user|>"]),
        (Until("</t>"), ["</t>", "some <b </t>"], ["some", "a</t>b", "a</t></t>"]),
        (Until("<|user|>"), ["<|user|>", "some<|user|>"], ["some", "<|pad|>"]),
        (OneOf((Text("yes"), Text("no"))), ["yes", "no"], ["yesno", "maybe"]),
        (Repeat(CALL, 1, 2), ['<call>{"a": 1}</call>', '<call>{"a": 1}</call><call>{"a": -2}</call>'],
         ["", '<call>{"a": 1}</call>' * 3, '<call>{"a": true}</call>']),
        (Chain((Repeat(Chain((Until("<call>"), Text('{"a": '), Json({"type": "integer"})))), AnyText())),
         ["no call at all", 'first <call>{"a": 1, then more', ""], ["first <call>then"]),
        (Chain((Until("</think>"), Text("\n"), Json({"type": "boolean"}))),
         ["I think</think>\ntrue"], ["true", "</think>true"]),
    ],
)  # fmt: skip
def test_a_constraint_takes_the_texts_that_match_it_whole(
    compiler: ConstraintCompiler, tokenizer: Any, constraint: Constraint, matching: list[str], others: list[str]
) -> None:
    assert [text for text in matching if not takes(compiler, tokenizer, constraint, text)] == []
    assert [text for text in others if takes(compiler, tokenizer, constraint, text)] == []


REFUSED = [
    (Json({"type": "object", "properties": {"a": {"items": {"not": {}}}}}), "schema at `properties.a.items`.*not"),
    (Json({"$defs": {"x": {"if": {}, "then": {}}}, "items": {"$ref": "#/$defs/x"}}), "schema at `.*x`.*if"),
    (Json({"type": "strin"}), "the schema: Invalid type"),
    (Json({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "use anyOf"),
    (Json({"$ref": "https://example.com/schema.json"}), "outside the schema"),
    (Json({"type": "string", "minLength": 3, "maxLength": 2}), "minLength"),
    (Json({"anyOf": 5}), "anyOf must be an array"),
    (Json({"properties": {"a": 5}}), "`properties.a`: schema must be an object or boolean"),
    (Json(False), "false"),
    (Json({"enum": [float("nan")]}), "not one that can be read"),
    (Json({"enum": ["x" * MAX_GRAMMAR_BYTES]}), f"longer than {MAX_GRAMMAR_BYTES} bytes"),
    (Regex("(a"), "the regular expression: .*unclosed group"),
    (Regex("(?<=a)b"), "look-around"),
    (Regex(r"[^\x00-\U0010FFFF]"), "no text can match"),
    (Regex(""), "empty"),
    (Text("bye<|end|>"), r"end-of-sequence token '<\|end\|>'"),
    (OneOf(()), "no alternatives"),
    (Repeat(Text("a"), 2, 1), "2 to 1 times"),
    (Until(""), "empty"),
    (Until("a<|user|>"), "begin it with the token"),
]


@pytest.mark.parametrize(("constraint", "reason"), REFUSED)
def test_what_cannot_be_enforced_is_refused_with_its_place(
    compiler: ConstraintCompiler, constraint: Constraint, reason: str
) -> None:
    with pytest.raises(ConstraintError, match=f"(?s){reason}"):
        compiler.compile(constraint)


def test_a_schema_that_takes_too_long_to_read_is_given_up_and_the_next_one_is_read(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler_module, "SECONDS", 0.5)
    compiler = ConstraintCompiler(tokenizer, VOCAB, {EOS})
    hostile = {"type": "string", "allOf": [{"pattern": f"(a|b)*a(a|b){{{number}}}"} for number in range(20)]}
    with pytest.raises(ConstraintError, match="the schema: it takes more than"):
        compiler.compile(Json({"properties": {"a": hostile}}))
    monkeypatch.undo()
    assert takes(compiler, tokenizer, Text("a"), "a")


def test_the_process_that_reads_grammars_begins_anew_where_it_was_ended(tokenizer: Any) -> None:
    compiler = ConstraintCompiler(tokenizer, VOCAB, {EOS})
    assert takes(compiler, tokenizer, Text("a"), "a")
    process = compiler._trial._process
    assert process is not None
    process.kill()
    process.wait()
    assert takes(compiler, tokenizer, Text("b"), "b")


def test_a_schema_that_nests_without_end_is_refused(compiler: ConstraintCompiler) -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(ConstraintError, match="nested more than"):
        compiler.compile(Json(deep))
    part: Constraint = Text("a")
    for _ in range(100):
        part = Chain((part,))
    with pytest.raises(ConstraintError, match="nests its parts"):
        compiler.compile(part)


def test_an_unknown_format_is_an_annotation_and_data_stays_as_it_is(
    compiler: ConstraintCompiler, tokenizer: Any
) -> None:
    schema = {"properties": {"format": {"const": {"format": "x"}}, "b": {"format": "int32", "type": "integer"}}}
    wanted = {"type": "object", **schema, "required": ["format", "b"], "additionalProperties": False}
    assert takes(compiler, tokenizer, Json(wanted), '{"format": {"format": "x"}, "b": 7}')
    assert not takes(compiler, tokenizer, Json(wanted), '{"format": {}, "b": 7}')


def test_compiled_constraints_are_kept_within_a_bound(compiler: ConstraintCompiler) -> None:
    first = compiler.compile(Text("first"))
    assert compiler.compile(Text("first")) is first
    for number in range(MAX_KEPT):
        compiler.compile(Text(f"another {number}"))
    assert compiler.compile(Text("first")) is not first


def test_the_end_waits_for_the_tokens_that_have_to_come(compiler: ConstraintCompiler) -> None:
    state = compiler.compile(Regex("a*")).begin(num_kept_on=1)
    assert not state.allowed_flags()[[EOS, END]].any()
    state.take(int(state.allowed_flags().nonzero()[0][0]))
    assert state.allowed_flags()[[EOS, END]].all()


def test_the_end_comes_where_nothing_else_can(compiler: ConstraintCompiler, tokenizer: Any) -> None:
    state = compiler.compile(Text("a")).begin(num_kept_on=5)
    state.take(tokenizer("a")["input_ids"][0])
    assert state.is_complete
    assert state.allowed_flags().nonzero()[0].tolist() == [EOS, END]


def test_a_vocabulary_with_more_rows_than_the_tokenizer_never_allows_them(tokenizer: Any) -> None:
    state = ConstraintCompiler(tokenizer, VOCAB + 37, {EOS}).compile(AnyText()).begin()
    assert len(state.allowed_flags()) == VOCAB + 37
    assert not state.allowed_flags()[VOCAB:].any()
    assert state.allowed().shape == (257 + 1,)


def test_a_pattern_that_takes_too_much_work_ends_its_own_text_alone(
    compiler: ConstraintCompiler, tokenizer: Any
) -> None:
    compiled = compiler.compile(Regex("((a{100}){100}){100}"))
    state, token = compiled.begin(), tokenizer("a")["input_ids"][0]
    while state.error is None:
        assert state.allowed_flags()[token] or state.error
        state.take(token)
    assert state.allowed_flags().nonzero()[0].tolist() == [EOS, END]
    assert compiler.compile(Regex("((a{100}){100}){100}")) is not compiled
    assert takes(compiler, tokenizer, Regex("a+"), "aa")


def test_any_text_may_leave_one_out(compiler: ConstraintCompiler, tokenizer: PreTrainedTokenizerBase) -> None:
    without = Chain((Text("a"), AnyText(without="<call>")))
    for text, is_taken in (("a", True), ("a <cal l> b\n</call>", True), ("a<call>", False), ("a b <call> c", False)):
        assert takes(compiler, tokenizer, without, text) == is_taken, text
    special = AnyText(without="<|user|>")
    assert takes(compiler, tokenizer, special, "Hello")
