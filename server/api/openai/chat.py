"""A chat's messages as token ids, by the checkpoint's own chat template and no other.

Invariant: a message cannot pretend to be more than one: text of special tokens in it is refused, since the template's
own tokens are recognised by their text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.api.http.context import TextEncoder
from server.api.http.errors import ValidationFailed
from server.api.openai.schemas import Message


async def chat_ids(encoder: TextEncoder, messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages, ready for the assistant's answer.

    Raises:
        ValidationFailed: no chat template, special tokens in a message, or messages that the template refuses.
    """
    return await encoder.run(_render, [message.model_dump(include={"role", "content"}) for message in messages])


def special_texts(tokenizer: Any) -> frozenset[str]:
    """Texts that the tokenizer turns into special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in added if getattr(token, "special", False)}
    return frozenset(text for text in special | set(tokenizer.all_special_tokens) if text)


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValidationFailed("this checkpoint has no chat template; use /v1/completions", param="messages")
    reserved = special_texts(tokenizer)
    for number, message in enumerate(messages):
        if any(text in message["content"] for text in reserved):
            name = f"messages[{number}].content"
            raise ValidationFailed(f"`{name}` contains the text of a special token, which is not taken", param=name)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may raise whatever its author wrote
        raise ValidationFailed(
            "the checkpoint's chat template does not take these messages (their roles or their order)", param="messages"
        ) from error
    return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
