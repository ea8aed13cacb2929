"""The constraint on an answer: forced calls, calls of strict tools, and content in an enforced form.

Invariant: the thinking stays free, and what is forced begins where the model would have begun it. A forced call is
written in the format of the checkpoint's own template where that can say the schema, else in `formats.HERMES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from server.api.chat.formats import HARMONY, CallFormat, CallText
from server.api.chat.messages import Tool
from server.api.chat.parameters import arguments_of, can_force
from server.api.chat.template import Prompt
from server.constraints.grammar import AnyText, Chain, Constraint, OneOf, Regex, Repeat, Text, Until

MOST_FORCED = 8
"""Calls of one forced answer: a weak model would never end it."""


def answer_constraint(prompt: Prompt, content: Constraint | None) -> tuple[Constraint | None, str]:
    """The constraint on the answer to a prompt, None where there is none, and the field that asks for it.

    Args:
        content: the form of the content, if the request wants one. Beside tools, the model chooses between the content
            and calls.
    """
    chat, calls = prompt.chat, prompt.answer_format.calls
    most = MOST_FORCED if chat.choice.is_parallel and chat.choice.name is None and calls is not HARMONY else 1
    if chat.choice.kind == "required":
        assert calls is not None, "a forced call has a format"
        named = [tool for tool in chat.tools if chat.choice.name in (None, tool.name)]
        return _after_thinking(prompt, _calls(calls, calls.literal, named, most)), "tools"
    tools = [_as_asked(tool, calls) for tool in chat.shown_tools]
    can_call = calls is not None and bool(tools) and can_force(calls, tools)
    if content is not None:
        content = Chain((Text("<|channel|>final<|message|>"), content)) if calls is HARMONY else content
        if can_call and calls is not None:
            content = OneOf((content, _calls(calls, calls.literal, tools, most)))
        return _after_thinking(prompt, content), "response_format"
    if calls is None or not can_call or not any(tool.is_strict for tool in tools):
        return None, "tools"
    if calls is HARMONY:
        final = Chain((Text("<|channel|>final<|message|>"), AnyText()))
        return _after_thinking(prompt, OneOf((final, _calls(calls, calls.literal, tools, 1)))), "tools"
    return _after_thinking(prompt, _free_until_calls(calls, tools)), "tools"


def _as_asked(tool: Tool, calls: CallFormat | None) -> Tool:
    """The tool, with any object for arguments where they need not keep to its schema and the format can say so."""
    if tool.is_strict or calls is None or calls.parameter is not None:
        return tool
    return replace(tool, parameters={"type": "object"})


def _calls(calls: CallFormat, literal: CallText | None, tools: Sequence[Tool], most: int) -> Constraint:
    """One call or several in the texts of `literal`, and nothing else."""
    assert literal is not None, "`can_force` has said so"
    call = OneOf(tuple(Chain(tuple(_call(calls, literal, tool))) for tool in tools))
    parts: list[Constraint] = [Text(literal.first), call]
    if most > 1:
        parts.append(Repeat(Chain((Text(literal.between), call)), 0, most - 1))
    return Chain((*parts, Text(literal.last)))


def _call(calls: CallFormat, literal: CallText, tool: Tool) -> Iterator[Constraint]:
    before, *after = [text.replace("NAME", tool.name) for text in literal.before.split("COUNT")]
    yield Text(before)
    for text in after:
        yield Regex("[0-9]{1,3}")
        yield Text(text)
    arguments = arguments_of(calls, tool)
    assert arguments is not None, "`can_force` has said so"
    yield arguments
    yield Text(literal.after)


def _free_until_calls(calls: CallFormat, tools: Sequence[Tool]) -> Constraint:
    """Any text in which all that follows the mark of calls is calls whose arguments keep to their schemas."""
    literal = calls.literal
    assert literal is not None, "`can_force` has said so"
    assert (literal.first or literal.before).startswith(calls.begin), "calls begin with their mark"
    if literal.first:
        cut = replace(literal, first=literal.first.removeprefix(calls.begin))
    else:
        cut = replace(literal, before=literal.before.removeprefix(calls.begin))
    has_own_mark = calls.begin in literal.between or not literal.first  # then `Until` finds the next call
    called = _calls(calls, cut, tools, 1 if has_own_mark else MOST_FORCED)
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
