"""A chat's messages as token ids, by the checkpoint's own chat template and no other.

Invariant: no text is lost. A template that does not show the text of a message is tried in the other form of content
(text, or a list of parts); if it shows it in neither, the chat is refused. Text of special tokens in a message is
refused as well, because the tokenizer would turn it into the template's own markers.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from server.api.http.errors import ValidationFailed
from server.api.http.fields import is_text
from server.api.openai.schemas import ChatRequest, Message

RenderedMessage = dict[str, Any]
_OPTIONAL_KEYS = ("name", "reasoning_content")


def chat_ids(tokenizer: Any, body: ChatRequest) -> list[int]:
    """Token ids of the messages, ready for the assistant's answer.

    Raises:
        ValidationFailed: there is no chat template, a message has text of a special token or none at all, or the
            template refuses the messages or loses one.
    """
    template = _template_of(tokenizer)
    messages = [_for_template(message, place, template) for place, message in enumerate(body.messages)]
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        if "reasoning_effort" not in template:
            raise ValidationFailed(
                "`reasoning_effort` is not supported by this model's chat template; leave it out",
                param="reasoning_effort",
            )
        variables["reasoning_effort"] = body.reasoning_effort
    _check_variables(tokenizer, variables)
    _check_special_texts(tokenizer, messages, variables)
    text = _render(tokenizer, template, messages, variables)
    return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]


def special_texts(tokenizer: Any) -> frozenset[str]:
    """Texts that the tokenizer turns into special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if getattr(token, "special", False)}
    return frozenset(text for text in special | set(tokenizer.all_special_tokens) if text)


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the checkpoint has a chat template; without one it completes text alone."""
    return bool(_default_template(tokenizer))


def _default_template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    return template or ""


def _template_of(tokenizer: Any) -> str:
    template = _default_template(tokenizer)
    if not template:
        raise ValidationFailed("this checkpoint has no chat template; use /v1/completions", param="messages")
    return template


def _for_template(message: Message, place: int, template: str) -> RenderedMessage:
    content = message.content
    if content is None and message.role != "assistant":
        name = f"messages[{place}].content"
        raise ValidationFailed(f"`{name}` is missing; only an assistant's may be", param=name)
    is_unknown = message.role == "developer" and "developer" not in template
    optional = {key: value for key in _OPTIONAL_KEYS if (value := getattr(message, key))}
    return {
        "role": "system" if is_unknown else message.role,
        "content": (message.refusal or "") if content is None else content,
        **optional,
    }


def _check_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    ours = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters, *tokenizer.special_tokens_map}
    if not all(name.isidentifier() and name.isascii() for name in variables) or ours & set(variables):
        raise ValidationFailed(
            "`chat_template_kwargs` has a name that is not a variable of a chat template, or that the server itself "
            "sets: leave it out",
            param="chat_template_kwargs",
        )


def _check_special_texts(tokenizer: Any, messages: Sequence[RenderedMessage], variables: Mapping[str, Any]) -> None:
    reserved = special_texts(tokenizer)
    places = [
        (f"messages[{place}].{key}", value) for place, message in enumerate(messages) for key, value in message.items()
    ]
    for name, value in [*places, ("chat_template_kwargs", variables)]:
        for text in _texts_in(value):
            if not is_text(text):
                raise ValidationFailed(f"`{name}` contains a text that is not valid", param=name)
            if any(special in text for special in reserved):
                raise ValidationFailed(f"`{name}` contains the text of a special token, which is not taken", param=name)


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


def _render(tokenizer: Any, template: str, messages: Sequence[RenderedMessage], variables: Mapping[str, Any]) -> str:
    """The messages in the first form of content that the template shows whole.

    Raises:
        ValidationFailed: there is none.
    """

    def apply(shown: Sequence[RenderedMessage]) -> str:
        return str(tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True, **variables))

    failures: list[ValidationFailed] = []
    for form in (_as_text, _as_parts):
        try:
            text = apply([form(message) for message in messages])
            lost = _lost_message(apply, messages, form, text)
        except Exception as error:  # a template raises what its author wrote, or fails in any way
            failures.append(_refused_by_template(error, template))
            continue
        if lost is None:
            return text
        name = f"messages[{lost}].content"
        failures.append(
            ValidationFailed(
                f"`{name}`: the checkpoint's chat template does not show the text of this message (its role or its "
                "place): leave it out, or put its text into another message",
                param=name,
            )
        )
    raise failures[0]


def _as_text(message: RenderedMessage) -> RenderedMessage:
    return message


def _as_parts(message: RenderedMessage) -> RenderedMessage:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _lost_message(
    apply: Callable[[Sequence[RenderedMessage]], str],
    messages: Sequence[RenderedMessage],
    form: Callable[[RenderedMessage], RenderedMessage],
    rendering: str,
) -> int | None:
    """Place of the first message whose text is not in the rendering, if there is one.

    A short text may be there by chance, so the messages are rendered again with digits for texts, which must be there.
    Texts of users and systems must be in the first rendering too; an assistant's may be cut, as thinking is.
    """
    probes = [f"90{place:05d}57318264" if message["content"] else "" for place, message in enumerate(messages)]
    shown = apply([form({**message, "content": probe}) for message, probe in zip(messages, probes, strict=True)])
    dense = _without_spaces(rendering)
    for place, (message, probe) in enumerate(zip(messages, probes, strict=True)):
        text = message["content"]
        is_there = any(_without_spaces(each) in dense for each in (text, json.dumps(text, ensure_ascii=False)[1:-1]))
        is_printed = f"'text': '{probe}'" in shown  # the list itself, by a template that takes texts
        if probe not in shown or is_printed or (message["role"] != "assistant" and not is_there):
            return place
    return None


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
    refusal = ValidationFailed(
        f"the checkpoint's chat template does not take these messages: {reason}", param="messages"
    )
    refusal.__cause__ = error
    return refusal
