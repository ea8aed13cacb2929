"""The constraint on an answer: forced calls, calls of strict tools, and content in an enforced form.

Invariant: the thinking stays free, and what is forced begins where the model would have begun it. A forced call is
written in the format of the checkpoint's own template where its arguments are JSON there, else in `formats.HERMES`.
"""

from __future__ import annotations

from collections.abc import Iterator

from server.api.chat.formats import HARMONY, CallFormat, CallText
from server.api.chat.messages import Tool
from server.api.chat.template import Prompt
from server.constraints.grammar import AnyText, Chain, Constraint, Json, OneOf, Regex, Repeat, Text, Until

MOST_FORCED = 8
"""Calls of one forced answer: a weak model would never end it."""


def answer_constraint(prompt: Prompt, content: Constraint | None) -> tuple[Constraint | None, str]:
    """The constraint on the answer to a prompt, None where there is none, and the field that asks for it.

    Args:
        content: the form of the content, if the request wants one. Beside tools, the model chooses between the content
            and calls.
    """
    chat, calls = prompt.chat, prompt.answer_format.calls
    tools = chat.shown_tools
    literal = None if calls is None else calls.literal
    if chat.choice.kind == "required":
        assert calls is not None, "a forced call has a format"
        assert literal is not None, "a forced call has a format with JSON arguments"
        named = [tool for tool in tools if chat.choice.name in (None, tool.name)]
        most = MOST_FORCED if chat.choice.is_parallel and chat.choice.name is None and calls is not HARMONY else 1
        return _after_thinking(prompt, _calls(literal, named, most)), "tools"
    if content is not None:
        if prompt.answer_format.calls is HARMONY:
            content = Chain((Text("<|channel|>final<|message|>"), content))
        if tools and literal is not None:
            content = OneOf((content, _calls(literal, tools, MOST_FORCED if calls is not HARMONY else 1)))
        return _after_thinking(prompt, content), "response_format"
    if literal is None or calls is None or not any(tool.is_strict for tool in tools):
        return None, "tools"
    if calls is HARMONY:
        final = Chain((Text("<|channel|>final<|message|>"), AnyText()))
        return _after_thinking(prompt, OneOf((final, _calls(literal, tools, 1)))), "tools"
    return _after_thinking(prompt, _free_until_calls(calls, literal, tools)), "tools"


def _calls(literal: CallText, tools: list[Tool] | tuple[Tool, ...], most: int) -> Constraint:
    """One call or several, and nothing else."""
    call = OneOf(tuple(Chain(tuple(_call(literal, tool))) for tool in tools))
    parts: list[Constraint] = [Text(literal.first), call]
    if most > 1:
        parts.append(Repeat(Chain((Text(literal.between), call)), 0, most - 1))
    return Chain((*parts, Text(literal.last)))


def _call(literal: CallText, tool: Tool) -> Iterator[Constraint]:
    before, *after = literal.before.replace("NAME", tool.name).split("COUNT")
    yield Text(before)
    for text in after:
        yield Regex("[0-9]{1,3}")
        yield Text(text)
    yield Json(dict(tool.parameters))
    yield Text(literal.after)


def _free_until_calls(calls: CallFormat, literal: CallText, tools: tuple[Tool, ...]) -> Constraint:
    """Any text in which all that follows the mark of calls is calls whose arguments keep to their schemas."""
    whole = literal.first or literal.before
    assert whole.startswith(calls.begin), "calls begin with their mark"
    cut = CallText(
        literal.first.removeprefix(calls.begin),
        literal.before if literal.first else literal.before.removeprefix(calls.begin),
        literal.after,
        literal.between,
        literal.last,
    )
    has_own_mark = calls.begin in literal.between or not literal.first  # then `Until` finds the next call
    called = _calls(cut, tools, 1 if has_own_mark else MOST_FORCED)
    return Chain((Repeat(Chain((Until(calls.begin), called))), AnyText(without=calls.begin)))


def _after_thinking(prompt: Prompt, constraint: Constraint) -> Constraint:
    """The constraint after a thinking that is free."""
    if prompt.answer_format.calls is HARMONY:
        thought = (Text("<|channel|>analysis<|message|>"), Until("<|end|>"), Text("<|start|>assistant"))
        return OneOf((constraint, Chain((*thought, constraint))))
    if prompt.answer_format.thinking is None:
        return constraint
    begin, end = prompt.answer_format.thinking
    thinking = Chain((Until(end), Regex(r"\s{0,4}"), constraint))
    return thinking if prompt.is_thinking else OneOf((constraint, Chain((Text(begin), thinking))))
