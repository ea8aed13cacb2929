"""A chat as token ids, by the checkpoint's own chat template and no other.

Invariant: no text is lost. A template that does not show the text of a message is tried in the other forms (content as
text or as a list of parts, arguments of calls as an object or as text); if it shows it in none, the chat is refused.
Text of special tokens in a message or a tool stays text: it never becomes the template's own markers. Where a template
knows no tools, the system prompt tells the model of them (`FALLBACK`).
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import json
import re
import secrets
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from server.api.chat.formats import HERMES, AnswerFormat, format_of
from server.api.chat.messages import Call, Chat, Message, Tool
from server.api.chat.parameters import can_force
from server.api.chat.parser import AnswerParser
from server.api.http.engine_requests import sampling_within
from server.api.http.errors import ValidationFailed
from server.api.http.fields import SamplingFields, is_text
from server.engine.request import SamplingParams
from server.serving.service import LoadedModel

RenderedMessage = dict[str, Any]
Apply = Callable[[Sequence[RenderedMessage]], str]

FALLBACK = """\
# Tools

You may call one or more functions to help with the user's request. Their signatures are within <tools></tools>:
<tools>
{tools}
</tools>

For each call, write a JSON object with the function's name and its arguments within <tool_call></tool_call>:
<tool_call>
{{"name": <name>, "arguments": <arguments as a JSON object>}}
</tool_call>"""
"""The end of the system prompt where the chat template knows no tools; the format is `formats.HERMES`."""


_SWITCHES = ("enable_thinking", "thinking")
"""Variables of templates that switch thinking: most have the first, DeepSeek V3.1 the second."""


@dataclass(frozen=True)
class Prompt:
    """A chat that is ready to be answered.

    Attributes:
        ids: token ids, up to where the assistant's answer begins.
        answer_format: the way in which the model writes its answer.
        is_thinking: whether the prompt ends inside the thinking.
        keeps_special_tokens: whether special tokens tell the parts of the answer apart, so that its text needs them.
        chat: which was asked.
    """

    ids: list[int]
    answer_format: AnswerFormat
    is_thinking: bool
    keeps_special_tokens: bool
    chat: Chat

    def parser(self) -> AnswerParser:
        """A new parser for one answer."""
        return AnswerParser(
            self.answer_format,
            self.chat.shown_tools,
            is_thinking=self.is_thinking,
            is_parallel=self.chat.choice.is_parallel,
        )

    def sampling(
        self,
        model: LoadedModel,
        asked: SamplingFields,
        *,
        max_tokens: int | None,
        temperature: float | None,
        seed: int | None = None,
    ) -> SamplingParams:
        """Sampling of the answer, which may take the room that the context has; see `sampling_within`.

        Raises:
            ContextTooLongError, ValidationFailed: as there.
        """
        sampling = sampling_within(
            model,
            asked,
            len(self.ids),
            wanted=max_tokens,
            default=model.max_context_tokens,
            temperature=temperature,
            seed=seed,
        )
        return replace(sampling, skip_special_tokens=False) if self.keeps_special_tokens else sampling


def prompt_of(tokenizer: Any, chat: Chat) -> Prompt:
    """The prompt of a chat, ready for the assistant's answer.

    Raises:
        ValidationFailed: there is no chat template, the template refuses the messages or loses one, or there is text of
            a special token where it cannot stay text (`_plain_where_marked`).
    """
    template = _template_of(tokenizer, has_tools=bool(chat.shown_tools))
    answer_format = format_of(template)
    if chat.choice.kind == "required" and not can_force(answer_format.calls, chat.tools):
        answer_format = replace(answer_format, calls=HERMES)
    variables = _variables(chat, template)
    _check_variables(tokenizer, variables)
    reserved = special_texts(tokenizer)
    _check_texts(chat, variables, reserved, keeps=getattr(tokenizer, "is_fast", False))
    messages = chat.messages if answer_format.shows_tools else _without_tools(chat)
    if answer_format.shows_tools and chat.shown_tools:
        variables["tools"] = [_for_template(tool) for tool in chat.shown_tools]
    rendering = _render(tokenizer, template, answer_format, messages, variables, reserved)
    text, marks = rendering.replace(MARK, ""), answer_format.thinking
    if MARK in rendering:
        ids = _plain_where_marked(tokenizer, rendering, reserved)
    else:
        ids = [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    return Prompt(
        ids,
        answer_format,
        is_thinking=marks is not None and text.rstrip().endswith(marks[0]),
        keeps_special_tokens=bool(answer_format.marks & reserved),
        chat=chat,
    )


def special_texts(tokenizer: Any) -> frozenset[str]:
    """Texts that the tokenizer turns into special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if getattr(token, "special", False)}
    return frozenset(text for text in special | set(tokenizer.all_special_tokens) if text)


def answer_format_of(tokenizer: Any) -> AnswerFormat | None:
    """The way in which the model answers a chat that has tools; None where it has no chat template."""
    template = _named_template(tokenizer, has_tools=True)
    return format_of(template) if template else None


def _named_template(tokenizer: Any, *, has_tools: bool) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several by name; transformers takes this one for tools
        template = (template.get("tool_use") if has_tools else None) or template.get("default")
    return template or ""


def _template_of(tokenizer: Any, *, has_tools: bool) -> str:
    template = _named_template(tokenizer, has_tools=has_tools)
    if not template:
        raise ValidationFailed("this checkpoint has no chat template; use /v1/completions", param="messages")
    return template


def _for_template(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _variables(chat: Chat, template: str) -> dict[str, Any]:
    variables = dict(chat.variables)
    switch = next((name for name in _SWITCHES if f"{name} is defined" in template or f"not {name}" in template), None)
    is_kept = chat.effort == "none" and (switch is not None or format_of(template).thinking is None)
    if chat.effort is not None and "reasoning_effort" in template:
        variables["reasoning_effort"] = chat.effort
    elif chat.effort is not None and not chat.is_wish and not is_kept:
        raise ValidationFailed(
            "`reasoning_effort` is not supported by this model's chat template; leave it out", param="reasoning_effort"
        )
    if chat.thinks is not None and switch is not None:
        variables.setdefault(switch, chat.thinks)
    return variables


def _without_tools(chat: Chat) -> tuple[Message, ...]:
    """The messages for a template that knows no tools: calls and results are texts, and the system prompt ends with
    the tools."""
    messages: tuple[Message, ...] = ()
    for message in map(_as_plain, chat.messages):
        if messages and message.call_id is not None and messages[-1].call_id is not None:  # templates want turns
            messages = *messages[:-1], replace(message, content=f"{messages[-1].content}\n{message.content}")
        else:
            messages = *messages, message
    if not chat.shown_tools:
        return messages
    tools = "\n".join(json.dumps(_for_template(tool), ensure_ascii=False) for tool in chat.shown_tools)
    text = FALLBACK.format(tools=tools)
    first = messages[0]
    if first.role in ("system", "developer"):
        return replace(first, content=f"{first.content}\n\n{text}"), *messages[1:]
    return Message("system", text, chat.tools_place), *messages


def _as_plain(message: Message) -> Message:
    if message.role == "tool":
        return replace(message, role="user", content=f"<tool_response>\n{message.content}\n</tool_response>")
    if not message.calls:
        return message
    calls = [
        f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments or "{}"}}}\n</tool_call>'
        for call in message.calls
    ]
    return replace(message, content="\n".join([*filter(None, [message.content]), *calls]), calls=())


def _check_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    ours = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map}
    if not all(name.isidentifier() and name.isascii() for name in variables) or ours & set(variables):
        raise ValidationFailed(
            "`chat_template_kwargs` has a name that is not a variable of a chat template, or that the server itself "
            "sets: leave it out",
            param="chat_template_kwargs",
        )


def _check_texts(chat: Chat, variables: Mapping[str, Any], reserved: frozenset[str], *, keeps: bool) -> None:
    """Refuse texts that are none, and those of special tokens: in the variables, and where the tokenizer has no offsets
    (`keeps`) anywhere."""
    places: list[tuple[str, Any]] = [("chat_template_kwargs", variables)]
    for message in chat.messages:
        texts = {"content": message.content, "name": message.name, "reasoning_content": message.thinking}
        places += [(f"{message.place}.{key}", text) for key, text in texts.items() if text]
        places += [(f"{message.place}.tool_calls", [call.name, call.arguments]) for call in message.calls]
    places += [(chat.tools_place, _for_template(tool)) for tool in chat.shown_tools]
    for name, value in places:
        for text in _texts_in(value):
            if not is_text(text):
                raise ValidationFailed(f"`{name}` contains a text that is not valid", param=name)
            if not (keeps and value is not variables) and any(special in text for special in reserved):
                raise ValidationFailed(f"`{name}` contains the text of a special token, which is not taken", param=name)


MARK = f"{secrets.randbelow(10**20):020}"
"""Stands within the text of a special token that a client wrote, from before the template until tokens are made. No
client knows it, and digits are themselves in JSON, in Python's notation and in either case."""


def _marked(value: Any, reserved: re.Pattern[str]) -> Any:
    """The same texts, lists and mappings with a mark after the first character of each text of a special token."""
    if isinstance(value, str):
        return reserved.sub(lambda found: found[0][0] + MARK + found[0][1:], value)
    if isinstance(value, Mapping):
        return {_marked(key, reserved): _marked(item, reserved) for key, item in value.items()}
    return [_marked(item, reserved) for item in value] if isinstance(value, list | tuple) else value


def _plain_where_marked(tokenizer: Any, rendering: str, reserved: frozenset[str]) -> list[int]:
    """Token ids of a rendering without its marks, in which texts of special tokens that had a mark are plain text.

    Raises:
        ValidationFailed: the tokenizer has no offsets, or plain text with these characters is no sequence of tokens.
    """
    refusal = ValidationFailed("a message contains the text of a special token, which is not taken", param="messages")
    if not getattr(tokenizer, "is_fast", False):
        raise refusal
    pieces = rendering.split(MARK)
    text = "".join(pieces)
    places = [end - 1 for end in itertools.accumulate(map(len, pieces[:-1]))]  # of the characters before the marks
    encode: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    found = tokenizer(text, return_offsets_mapping=True, **encode)
    special = set(tokenizer.convert_tokens_to_ids(list(reserved)))
    plain: dict[str, list[int]] = {}
    ids: list[int] = []
    for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
        if token not in special or bisect_left(places, start) == bisect_left(places, end):
            ids.append(int(token))
            continue
        part = text[start:end]
        if part not in plain:
            plain[part] = [int(each) for each in tokenizer(part, split_special_tokens=True, **encode)["input_ids"]]
            if special.intersection(plain[part]) or tokenizer.decode(plain[part]).strip() != part.strip():
                raise refusal
        ids += plain[part]
    return ids


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts_in(key)
            yield from _texts_in(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts_in(item)


@dataclass(frozen=True)
class _Form:
    """A way to hand messages to a template.

    Attributes:
        has_parts: content is a list of parts, not a text.
        has_objects: arguments of calls are objects, not JSON texts.
        has_none: content that is missing beside calls is None, not an empty text.
    """

    template: str
    nine_ids: bool
    has_parts: bool
    has_objects: bool = True
    has_none: bool = False

    def __call__(self, message: Message) -> RenderedMessage:
        content: Any = message.content or ""
        if self.has_none and message.calls and not content:
            content = None
        elif self.has_parts:
            content = [{"type": "text", "text": content}]
        is_unknown = message.role == "developer" and "developer" not in self.template
        shown: RenderedMessage = {"role": "system" if is_unknown else message.role, "content": content}
        if message.name:
            shown["name"] = message.name
        if message.thinking:
            shown["thinking" if "message.thinking" in self.template else "reasoning_content"] = message.thinking
        if message.calls:
            shown["tool_calls"] = [self._call(call) for call in message.calls]
        if message.call_id is not None:
            shown["tool_call_id"] = self._id(message.call_id)
        return shown

    def _call(self, call: Call) -> dict[str, Any]:
        arguments: Any = call.arguments or "{}"
        if self.has_objects:
            with contextlib.suppress(ValueError, RecursionError):  # it broke off; the template gets what there is
                parsed = json.loads(arguments)
                json.dumps(parsed, ensure_ascii=False).encode()  # fails where an escape is half a character
                arguments = parsed
        return {
            "id": self._id(call.call_id),
            "type": "function",
            "function": {"name": call.name, "arguments": arguments},
        }

    def _id(self, call_id: str) -> str:
        if not self.nine_ids or (len(call_id) == 9 and call_id.isalnum()):
            return call_id
        return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _render(
    tokenizer: Any,
    template: str,
    answer_format: AnswerFormat,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    reserved: frozenset[str],
) -> str:
    """The messages in the first form that the template shows whole, with a mark in each text of a special token.

    Raises:
        ValidationFailed: there is none.
    """

    longest_first = sorted(reserved, key=len, reverse=True)
    texts = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
    variables = {**variables, "tools": _marked(variables["tools"], texts)} if "tools" in variables else variables

    def apply(shown: Sequence[RenderedMessage]) -> str:
        shown = _marked(shown, texts)
        try:
            return str(tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True, **variables))
        except Exception as error:  # a template raises what its author wrote, or fails in any way
            raise _refused_by_template(error, template) from error

    has_calls = any(message.calls for message in messages)
    choices = itertools.product((False, True), (True, False), (False, True)) if has_calls else [(False,), (True,)]
    nine_ids = answer_format.calls is not None and answer_format.calls.ids == "nine"
    failures: list[ValidationFailed] = []
    for choice in choices:
        form = _Form(template, nine_ids, *choice)
        try:
            text = apply([form(message) for message in messages])
            lost = _lost_message(apply, messages, form, text)
        except ValidationFailed as refusal:
            failures.append(refusal)
            continue
        if lost is None:
            return text
        failures.append(
            ValidationFailed(
                f"`{lost}`: the checkpoint's chat template does not show the text of this message (its role or its "
                "place): leave it out, or put its text into another message",
                param=lost,
            )
        )
    raise failures[0]


def _lost_message(apply: Apply, messages: Sequence[Message], form: _Form, rendering: str) -> str | None:
    """The place of the first message whose text or calls are not in the rendering, if there is one.

    A short text may be there by chance, so the messages are rendered again with digits for texts, which must be there.
    Texts of users, systems and tools must be in the first rendering too; an assistant's may be cut, as thinking is.
    """
    probed = [_probe(message, place) for place, message in enumerate(messages)]
    shown = apply([form(message) for message in probed]).replace(MARK, "")
    dense = _without_spaces(rendering.replace(MARK, ""))
    for message, probe in zip(messages, probed, strict=True):
        text, digits = message.content or "", probe.content or ""
        is_there = any(_without_spaces(each) in dense for each in (text, json.dumps(text, ensure_ascii=False)[1:-1]))
        is_printed = f"'text': '{digits}'" in shown  # the list itself, by a template that takes texts
        if digits not in shown or is_printed or (message.role != "assistant" and not is_there):
            return f"{message.place}.content"
        if any(value not in shown for call in probe.calls for value in (call.name, call.arguments[7:-2])):
            return f"{message.place}.tool_calls"
    return None


def _probe(message: Message, place: int) -> Message:
    """The same message with digits for its text and the arguments of its calls."""
    calls = [
        replace(call, arguments=f'{{"a": "91{place:05d}{at:03d}57318264"}}') for at, call in enumerate(message.calls)
    ]
    return replace(message, content=f"90{place:05d}57318264" if message.content else "", calls=tuple(calls))


def _without_spaces(text: str) -> str:
    """Templates strip texts and break lines."""
    return "".join(text.split())


def _refused_by_template(error: Exception, template: str) -> ValidationFailed:
    """Says why in the template's own words, if they stand in it: other words may be the client's."""
    if isinstance(error, TemplateSyntaxError):
        reason = f"it has an error in line {error.lineno}, whatever the messages are"
    elif isinstance(error, TemplateError) and len(str(error)) > 3 and str(error) in template:
        reason = str(error)
    else:
        reason = "their roles or their order"
    return ValidationFailed(f"the checkpoint's chat template does not take these messages: {reason}", param="messages")
