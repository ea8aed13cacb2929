"""Engine requests from checked HTTP bodies; both dialects use these functions.

Invariant: a request for experts that it cannot have is refused here or by `Engine.submit`, before the response begins.
Each engine request has its own masking, because a masking follows the tokens of its request.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from server.api.http.errors import ValidationFailed
from server.api.http.fields import MaskFields
from server.engine.request import GenerationRequest, SamplingParams
from server.masks.profiles import ProfileError
from server.serving.service import LoadedModel

COLDEST = 1e-4
"""Lowest temperature: below it the most likely token is always taken, and dividing by it would overflow."""
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


def sampling_of(
    model: LoadedModel,
    *,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    do_sample: bool,
    stop: Sequence[str],
    include_stop_str_in_output: bool,
) -> SamplingParams:
    """Sampling parameters within what the model can do."""
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=None if temperature is None else max(temperature, COLDEST),
        top_k=None if top_k is None else min(top_k, model.vocab_size),
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        do_sample=do_sample,
        stop=tuple(stop),
        include_stop_str_in_output=include_stop_str_in_output,
    )


def request_of(
    model: LoadedModel,
    prompt: Sequence[int],
    sampling: SamplingParams,
    masks: MaskFields,
    *,
    num_logprobs: int = 0,
    prompt_logprobs: bool = False,
    path: str = "",
) -> GenerationRequest:
    """One request for the engine.

    Args:
        masks: the client's mask parameters.
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
        on_missing=masks.on_missing or "mask",
        router_temperature=1.0 if masks.router_temperature is None else float(masks.router_temperature),
    )
