"""Engine requests from checked HTTP bodies; all dialects use these functions.

Invariant: a request for experts that it cannot have is refused here or by `Engine.submit`, before the response begins.
Each engine request has its own masking, because a masking follows the tokens of its request.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from server.api.http.errors import ValidationFailed
from server.api.http.fields import MaskFields, SamplingFields
from server.engine.request import ContextTooLongError, GenerationRequest, SamplingParams
from server.masks.profiles import ProfileError
from server.serving.service import LoadedModel

if TYPE_CHECKING:
    from server.constraints.compiler import CompiledConstraint

COLDEST = 1e-4
"""Lowest temperature: below it the most likely token is always taken, and dividing by it would overflow."""
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


def sampling_of(
    model: LoadedModel,
    asked: SamplingFields,
    *,
    temperature: float | None,
    do_sample: bool | None,
    max_new_tokens: int,
    seed: int | None,
    keep_stop: bool,
    path: str = "",
) -> SamplingParams:
    """Sampling parameters: the request's, and the model's generation config where the request says nothing.

    Args:
        temperature: the request's, in its dialect's range; 0 is greedy.
        do_sample: the request's. A value that is for sampling turns sampling on too; where this is None, so does the
            generation config.
        keep_stop: whether the text keeps a stop string, where the request says nothing.
        path: of the fields in the body, for messages.

    Raises:
        ValidationFailed: a value that the model cannot take.
    """
    defaults = model.generation_defaults
    values = {name: getattr(asked, name) for name in ("top_k", "top_p", "min_p", "typical_p")}
    values["temperature"] = temperature
    if not _sampling_values(values, model).is_greedy or (do_sample is None and defaults.get("do_sample")):
        do_sample = True
    values = {name: defaults.get(name) if value is None else value for name, value in values.items()}
    if values["temperature"] == 0 or not do_sample:
        values, seed, do_sample = {}, None, False
    repetition_penalty = asked.repetition_penalty
    if repetition_penalty is None:
        repetition_penalty = defaults.get("repetition_penalty")
    if (asked.min_tokens or 0) > max_new_tokens:
        raise ValidationFailed(
            f"`{path}min_tokens` is more than the {max_new_tokens} tokens that the answer may have",
            param=f"{path}min_tokens",
        )
    return replace(
        _sampling_values(values, model),
        do_sample=do_sample,
        seed=seed,
        max_new_tokens=max_new_tokens,
        min_tokens=asked.min_tokens or 0,
        repetition_penalty=repetition_penalty,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logit_bias=_logit_bias(model, asked, path),
        stop=tuple(asked.stop),
        include_stop_str_in_output=keep_stop
        if asked.include_stop_str_in_output is None
        else asked.include_stop_str_in_output,
        skip_special_tokens=asked.skip_special_tokens,
        ignore_eos=bool(asked.ignore_eos),
    )


def sampling_within(
    model: LoadedModel,
    asked: SamplingFields,
    num_prompt_tokens: int,
    *,
    wanted: int | None,
    default: int,
    temperature: float | None,
    seed: int | None,
) -> SamplingParams:
    """Sampling under `/v1`: drawn unless the temperature is 0, of at most as many tokens as the prompt leaves room for.

    Args:
        num_prompt_tokens: of the longest prompt.
        wanted: the most new tokens; where it is None, the generation config says, and at last `default`.

    Raises:
        ContextTooLongError: the prompt leaves no room. ValidationFailed: a value that the model cannot take.
    """
    room = model.max_context_tokens - num_prompt_tokens
    if room < 1:
        # Agents shorten their history when they read "prompt is too long" or "maximum context length is N tokens".
        raise ContextTooLongError(
            f"prompt is too long: {num_prompt_tokens} tokens > {model.max_context_tokens - 1} maximum. This model's "
            f"maximum context length is {model.max_context_tokens} tokens, prompt and answer together: shorten the "
            f"prompt by at least {1 - room}"
        )
    if wanted is None:
        wanted = model.generation_defaults.get("max_new_tokens", default)
    return sampling_of(
        model,
        asked,
        temperature=model.generation_defaults.get("temperature", 1.0) if temperature is None else temperature,
        do_sample=True,
        max_new_tokens=max(1, min(wanted, room)),
        seed=seed,
        keep_stop=False,
    )


def _logit_bias(model: LoadedModel, asked: SamplingFields, path: str) -> dict[int, float] | None:
    bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
    if any(token >= model.vocab_size for token in bias):
        raise ValidationFailed(
            f"`{path}logit_bias` names a token id that is not below {model.vocab_size}, the size of the vocabulary",
            param=f"{path}logit_bias",
        )
    return bias or None


def _sampling_values(values: Mapping[str, Any], model: LoadedModel) -> SamplingParams:
    """The values that decide whether tokens are drawn; those that change nothing are left out."""
    temperature, top_k = values.get("temperature"), values.get("top_k")
    return SamplingParams(
        temperature=None if not temperature else max(temperature, COLDEST),
        top_k=min(top_k, model.vocab_size) if top_k is not None and top_k > 0 else None,
        top_p=values.get("top_p"),
        min_p=values.get("min_p"),
        typical_p=values.get("typical_p"),
    )


def request_of(
    model: LoadedModel,
    prompt: Sequence[int],
    sampling: SamplingParams,
    masks: MaskFields,
    *,
    num_logprobs: int = 0,
    prompt_logprobs: bool = False,
    constraint: CompiledConstraint | None = None,
    path: str = "",
) -> GenerationRequest:
    """One request for the engine.

    Args:
        masks: the client's mask parameters.
        constraint: from `ApiContext.compiled`.
        path: of these fields in the body, for messages.

    Raises:
        ValidationFailed: no such profile, a pool that is too large, or both of them.
    """
    may_fetch = masks.on_missing == "fetch"
    name = f"{path}profile" if masks.profile is not None else f"{path}pool"
    if model.masks is None:
        if masks.profile is not None or masks.pool is not None:
            raise ValidationFailed(f"`{name}`: what is served here takes no masks", param=name)
        masking = None
    else:
        try:
            masking = model.masks.masking(len(prompt), profile=masks.profile, pool=masks.pool, may_fetch=may_fetch)
        except ProfileError as error:
            raise ValidationFailed(f"`{name}`: {error}", param=name) from error
    return GenerationRequest(
        request_id=uuid.uuid4().hex,
        prompt_ids=tuple(prompt),
        sampling=sampling,
        num_logprobs=num_logprobs,
        prompt_logprobs=prompt_logprobs,
        masking=masking,
        adapter=masks.adapter or "auto",
        on_missing=masks.on_missing or "mask",
        constraint=constraint,
        router_temperature=1.0 if masks.router_temperature is None else float(masks.router_temperature),
    )
