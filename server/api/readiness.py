"""The proof that a loaded model can answer a completion and a chat, made before the server says that it is ready.

Invariant: a model that passes makes tokens of a text, and its chat template, if it has one, shows a message's text in a
prompt that leaves room for an answer. The computation itself is not tried: that would count as use of the experts.
"""

from __future__ import annotations

import logging

from server.api.chat.messages import Chat, Message
from server.api.chat.template import answer_format_of, prompt_of
from server.api.http.errors import ValidationFailed
from server.errors import ServerError, SettingsError
from server.serving.service import LoadedModel

log = logging.getLogger(__name__)
TEXT = "Hello"


class UnservableModelError(ServerError):
    """The files of the model do not allow it to answer a request."""


def checked(model: LoadedModel) -> LoadedModel:
    """The same model. If it cannot serve, its engine is stopped.

    Raises:
        UnservableModelError: its tokenizer makes no tokens, or tokens that the model does not have, or its chat
            template cannot show a message.
        SettingsError: the context has no room for a short prompt and an answer.
    """
    try:
        _check(model)
    except BaseException:
        model.engine.stop(0.0)
        raise
    return model


def _check(model: LoadedModel) -> None:
    prompts = [[int(token) for token in model.tokenizer(TEXT, verbose=False)["input_ids"]]]
    answers = answer_format_of(model.tokenizer)
    if answers is not None:
        if answers.calls is None:
            log.warning(
                "the chat template shows tools in a format that is not known here: calls of tools in answers stay "
                "text, unless a request forces a call"
            )
        try:
            prompts.append(prompt_of(model.tokenizer, Chat((Message("user", TEXT, "messages[0]"),))).ids)
        except ValidationFailed as error:
            raise UnservableModelError(
                f"no chat could be served: {error}. Put the model's own chat_template.jinja beside the checkpoint's "
                "weights, or remove it to serve completions alone, and extract into an empty directory"
            ) from error
    if not all(prompts):
        raise UnservableModelError(
            f"the tokenizer makes no tokens of {TEXT!r}: put the tokenizer's files of the model beside the "
            "checkpoint's weights and extract into an empty directory"
        )
    largest = max(map(max, prompts))
    if largest >= model.vocab_size:
        raise UnservableModelError(
            f"the tokenizer makes token {largest} of {TEXT!r}, and the model has {model.vocab_size}: put the "
            "tokenizer's files of this model beside the checkpoint's weights and extract into an empty directory"
        )
    longest = max(map(len, prompts))
    if longest >= model.max_context_tokens:
        raise SettingsError(
            f"max_context_tokens is {model.max_context_tokens}, and the prompt of a chat of one word has {longest} "
            f"tokens: set at least {longest + 1} (--max-context-tokens)"
        )
