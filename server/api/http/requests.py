"""From what a client sent to what the engine takes: what the two dialects share.

Invariant: whatever a request wants of experts and cannot have is refused here or by `Engine.submit`, before the
response begins; a masking belongs to one request alone, since it follows that request's tokens.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from server.api.http.errors import ValidationFailed
from server.api.http.fields import MaskFields
from server.engine.request import FinishedEvent, GenerationRequest, SamplingParams, TokenEvent
from server.masks.profiles import ProfileError
from server.serving.service import LoadedModel

COLDEST = 1e-4
"""Below this temperature the most likely token is taken anyway, and the division would overflow."""
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
        masks: what the client said of experts.
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


def split(batch: Sequence[TokenEvent | FinishedEvent]) -> tuple[list[TokenEvent], FinishedEvent | None]:
    """The tokens of a batch, and the end if it is there."""
    end = batch[-1] if isinstance(batch[-1], FinishedEvent) else None
    return [item for item in batch if isinstance(item, TokenEvent)], end
