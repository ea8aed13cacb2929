"""Admission: the bounds on requests, and the checks of one request against them.

Invariant: a request that can never be served is refused before it is queued; the error names a value that would work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from router.errors import MaskError
from server.engine.request import (
    ContextTooLongError,
    GenerationRequest,
    InvalidRequestError,
    OnMissing,
    QueueFullError,
)
from server.model.runner import Runner


@dataclass(frozen=True)
class EngineLimits:
    """Bounds on the memory and the queue that clients can use.

    Attributes:
        max_waiting_requests, max_waiting_tokens: bounds of the queue; a request beyond them is refused at once.
        prefill_chunk_tokens: prompt tokens processed in one step.
        max_logprobs: alternatives reported with a token.
    """

    max_waiting_requests: int = 64
    max_waiting_tokens: int = 65536
    prefill_chunk_tokens: int = 256
    max_logprobs: int = 20


def check_request(request: GenerationRequest, limits: EngineLimits, *, vocab_size: int, max_tokens: int) -> None:
    """Refuse a request that no state of the engine could serve.

    Args:
        vocab_size: V; prompt ids must be below it.
        max_tokens: most tokens of a row.

    Raises:
        InvalidRequestError, ContextTooLongError.
    """
    sampling = request.sampling
    if not request.prompt_ids:
        raise InvalidRequestError("the prompt has no tokens; at least one is needed")
    if not all(0 <= token < vocab_size for token in request.prompt_ids):
        raise InvalidRequestError(f"a token id of the prompt is outside 0 to {vocab_size - 1}")
    if not all(0 <= token < vocab_size for token in sampling.logit_bias or ()):
        raise InvalidRequestError(f"a token id of logit_bias is outside 0 to {vocab_size - 1}")
    if not 0 <= request.num_logprobs <= limits.max_logprobs:
        raise InvalidRequestError(f"{request.num_logprobs} alternatives a token; 0 to {limits.max_logprobs} are served")
    if request.on_missing not in get_args(OnMissing):
        wanted = ", ".join(get_args(OnMissing))
        raise InvalidRequestError(f"on_missing is {request.on_missing!r}, wanted one of {wanted}")
    if not (math.isfinite(request.router_temperature) and request.router_temperature > 0.0):
        raise InvalidRequestError(f"router_temperature is {request.router_temperature}, wanted a number above 0")
    prompt_tokens = len(request.prompt_ids)
    needed = prompt_tokens + sampling.max_new_tokens
    if needed > max_tokens:
        room = max_tokens - prompt_tokens
        advice = f"max_new_tokens may be at most {room}" if room >= 1 else "shorten the prompt"
        raise ContextTooLongError(
            f"the prompt's {prompt_tokens} tokens and max_new_tokens {sampling.max_new_tokens} make {needed}; "
            f"a sequence holds {max_tokens}: {advice}"
        )


def check_ability(request: GenerationRequest, runner: Runner) -> None:
    """Refuse a request that this model or its decode path cannot serve.

    Raises:
        InvalidRequestError.
    """
    if request.router_temperature != 1.0:
        refusal = runner.model.routing.temperature_refusal()
        if refusal is not None:
            raise InvalidRequestError(f"router_temperature is not possible for this model: {refusal}; leave it out")
    if request.masking is not None:
        refusal = runner.model.routing.mask_refusal(request.masking.mask)
        if refusal is not None:
            raise InvalidRequestError(f"the request asks for a profile or a pool: {refusal}; leave both out")
    if request.on_missing == "fetch":
        refusal = runner.fetch_refusal()
        if refusal is not None:
            raise InvalidRequestError(f'on_missing "fetch" is not possible: {refusal}; or use "mask"')
        store = runner.model.store
        if not (store.has_source or store.available.all()):
            raise InvalidRequestError(
                f'on_missing "fetch" needs the checkpoint that the store was extracted from: '
                f'{runner.model.source_problem}; use "mask"'
            )
    if request.adapter not in ("auto", "none"):
        _check_adapter(request, runner)
    if request.on_missing != "fetch" and request.masking is not None and request.masking.mask is not None:
        try:
            request.masking.mask & runner.model.routing.mask
        except MaskError as error:
            raise InvalidRequestError(
                f"the request's mask and what is served have too little in common: {error}"
            ) from error


def _check_adapter(request: GenerationRequest, runner: Runner) -> None:
    adapters = runner.model.adapters
    if request.adapter not in adapters:
        have = ", ".join(sorted(adapters)) or "none"
        raise InvalidRequestError(f"there is no adapter {request.adapter!r}: this server has {have}")
    if request.masking is None and (request.on_missing == "fetch" or runner.model.routing.mask.is_full):
        raise InvalidRequestError(
            f"adapter {request.adapter!r} is for masked tokens, and this request has no mask: give a profile or a "
            "pool, or leave adapter out"
        )


def check_queue(request: GenerationRequest, limits: EngineLimits, waiting: Sequence[int]) -> None:
    """Refuse when the queue is full.

    Args:
        waiting: prompt tokens of each waiting request. An empty queue accepts one request of any length.

    Raises:
        QueueFullError.
    """
    if len(waiting) >= limits.max_waiting_requests:
        raise QueueFullError(f"{len(waiting)} requests are waiting, which is the most; try again later")
    if waiting and sum(waiting) + len(request.prompt_ids) > limits.max_waiting_tokens:
        raise QueueFullError(
            f"{sum(waiting)} prompt tokens are waiting, with this request's {len(request.prompt_ids)} more than the "
            f"{limits.max_waiting_tokens} that may wait; try again later"
        )
