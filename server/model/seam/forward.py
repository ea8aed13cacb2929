"""One call of transformers' forward as a step: its logits, its routing, and its two expected errors.

All runners share it. An unreadable expert raises `StepFault`; a failed allocation in host or device memory raises
`StepMemoryError`, so that only one request fails. Any other error is raised unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expert_store.errors import StoreError
from server.model.runner import SelectiveModel, StepFault, StepMemoryError, StepOutput
from server.model.seam.attention_mask import attention_masks

REMEDY = (
    "ask for fewer tokens, or again when fewer requests run; the operator can lower max_batch_size, "
    "prefill_chunk_tokens or slots_memory"
)


def run_forward(
    model: SelectiveModel,
    ids: Tensor,
    positions: Tensor,
    past: Any,
    *,
    kv_tokens: int | None,
    all_logits: bool = False,
    longest: int = 0,
    is_repeatable: bool = True,
) -> tuple[StepOutput, Any]:
    """Run the step that `model.routing.begin` began.

    Args:
        ids, positions: int64 [B, T].
        past: transformers' cache of the rows, which the forward writes; None makes a new one.
        kv_tokens: KV length of the step, for the attention mask; with None the model makes its own mask.
        all_logits: return the logits of all T tokens of the single row.
        longest: position of the row that must leave if memory does not suffice.
        is_repeatable: whether a step that lacked an expert may be run again.

    Returns:
        The step's output, and the cache that the model used.

    Raises:
        StepFault, StepMemoryError.
    """
    arguments: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "past_key_values": past}
    try:
        if kv_tokens is not None:
            arguments["attention_mask"] = attention_masks(model.model.config, positions, kv_tokens, model.dtype)
        result = model.model(**arguments, use_cache=True, logits_to_keep=0 if all_logits else 1)
        record, share = model.routing.finish()
        outputs = None if model.observer is None else model.observer.take()
    except StoreError as error:
        rows = model.routing.rows_served_by(*error.expert) if len(ids) > 1 and error.expert is not None else []
        model.routing.abandon()
        raise StepFault(error, rows if len(ids) > 1 else [0], is_repeatable) from error
    except BaseException as error:
        model.routing.abandon()
        if not ran_out(error):
            raise
        problem = memory_ended(error, ids.numel(), longest)
    else:
        logits = result.logits[0] if all_logits else result.logits[:, -1]
        return StepOutput(logits.float(), record, share, outputs), result.past_key_values
    raise problem  # raised outside the handler, so that it has no context


OUT_OF_MEMORY = (
    "DefaultCPUAllocator: ",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Parts of messages of failed allocations that have no type of their own: of torch, of launches, and of a library."""


def ran_out(error: BaseException) -> bool:
    """Whether `error` is a failed allocation of host or device memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in OUT_OF_MEMORY)


def memory_ended(error: BaseException, num_tokens: int, longest: int) -> StepMemoryError:
    """The error of a step of so many tokens after the failed allocation `error`; the row at `longest` must leave. Raise
    it outside the handler, so that it has no context."""
    said = " ".join(str(error).partition("\n")[0].split())[:200] or type(error).__name__
    return StepMemoryError(f"the memory for a step of {num_tokens} tokens ended ({said}): {REMEDY}", [longest])
