"""Arithmetic whose results for a row do not depend on the other rows of the batch.

Invariant: a row's bits equal those of the row alone. Attention kernels sum over keys in an order that depends on the
longest row, and matrix products may choose another order for another number of rows. So attention runs row by row over
the row's own keys; prompts attend in blocks of queries at fixed positions; products get a fixed number of rows if the
kernels of this device need it. Attention is registered with transformers (`AttentionInterface`).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

QUERY_BLOCK = 64
"""Queries of a prompt that attend in one call: those at positions [64 n, 64 n + 64)."""
BLOCK_ROWS = {"cpu": 1, "cuda": 8}
"""Fixed number of rows of a decode step's product whose bits depend on it; on a GPU eight rows take as long as one."""
PROBED_ROWS = (2, 3, 5, 8)
"""Numbers of rows for which a product's bits are compared with those of one row."""


@dataclass(frozen=True)
class StepRows:
    """The rows of the current step.

    Attributes:
        lengths: number of keys of each row, including the step's own token; empty for a chunk of one prompt.
        start: position of the chunk's first token.
        apart: tensors that stand for the keys or values of all rows, and the rows' own, [1, KV heads, length, D] each,
            by the id of the former.
    """

    lengths: Sequence[int] = ()
    start: int = 0
    apart: Mapping[int, tuple[Tensor, Sequence[Tensor]]] = field(default_factory=dict)


_step: ContextVar[StepRows | None] = ContextVar("step_rows", default=None)


@contextmanager
def rows_of_step(rows: StepRows | None) -> Iterator[None]:
    """Set the rows for a forward inside, which attention, products and experts read. None: attention is unchanged."""
    token = _step.set(rows)
    try:
        yield
    finally:
        _step.reset(token)


def is_decode(num_tokens: int) -> bool:
    """Whether each of the step's tokens belongs to another row; outside `rows_of_step`, whether there is only one."""
    rows = _step.get()
    return num_tokens == 1 if rows is None else bool(rows.lengths)


# -- attention ---------------------------------------------------------------------------------------------------------

_Base = Callable[..., tuple[Tensor, Any]]


def _attention(
    of_family: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [B, heads, Q, D], key and value [B, KV heads, KV, D], additive mask [B, 1, Q, KV] → [B, Q, heads, D]."""
    base: _Base = sys.modules[type(module).__module__].eager_attention_forward if of_family else sdpa_attention_forward
    rows = _step.get()
    if rows is None or attention_mask is None:
        return base(module, query, key, value, attention_mask, **options)[0], None
    if not rows.lengths:
        return _by_blocks(base, module, query, key, value, attention_mask, rows.start, options), None
    outputs = []
    keys, values = _of_rows(rows, key), _of_rows(rows, value)
    for at, length in enumerate(rows.lengths):
        one = slice(at, at + 1)
        own_mask = attention_mask[one, :, :, :length]
        outputs.append(base(module, query[one], keys[at], values[at], own_mask, **options)[0])
    return torch.cat(outputs), None


class NotApartError(Exception):
    """A model computes its keys or values from what its cache returned, so the cache must return numbers."""


def _of_rows(rows: StepRows, together: Tensor) -> Sequence[Tensor]:
    """The keys or values of each row, [1, KV heads, length, D]. Raises NotApartError."""
    if not rows.apart:
        return [together[at : at + 1, :, :length] for at, length in enumerate(rows.lengths)]
    if id(together) not in rows.apart:
        raise NotApartError
    return rows.apart[id(together)][1]


def _by_blocks(
    base: _Base, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, start: int, options: Any
) -> Tensor:
    """Attention of one row's queries from position `start` on, in blocks whose shape does not depend on the chunk: a
    block has all its queries, with zeros for absent ones, and all keys up to its end, with later ones masked."""
    end, outputs = start + query.shape[2], []
    for first in range(start - start % QUERY_BLOCK, end, QUERY_BLOCK):
        last = first + QUERY_BLOCK
        low, high = max(first, start), min(last, end)
        before, after, to_come = low - first, last - high, max(0, last - key.shape[2])
        own = mask[:, :, low - start : high - start, :last]
        output, _ = base(
            module,
            functional.pad(query[:, :, low - start : high - start], (0, 0, before, after)),
            functional.pad(key[:, :, :last], (0, 0, 0, to_come)),
            functional.pad(value[:, :, :last], (0, 0, 0, to_come)),
            functional.pad(functional.pad(own, (0, to_come), value=torch.finfo(mask.dtype).min), (0, 0, before, after)),
            **options,
        )
        outputs.append(output[:, before : QUERY_BLOCK - after])
    return torch.cat(outputs, dim=1)


_NAMES = {"sdpa": "deepfew_sdpa", "eager": "deepfew_eager"}
for _name, _mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
    AttentionInterface.register(_NAMES[_name], partial(_attention, _name == "eager"))
    AttentionMaskInterface.register(_NAMES[_name], _mask)


def attention_implementation(model_class: type[PreTrainedModel]) -> str:
    """The name under which a model's attention runs row by row; transformers' own name if the family does not use the
    interface, or changes its behaviour for unknown names."""
    name = "sdpa" if model_class._supports_sdpa else "eager"
    family = inspect.getsource(sys.modules[model_class.__module__])
    has_seam = model_class._supports_attention_backend and not re.search(r"_attn_implementation (in|==) ", family)
    return _NAMES[name] if has_seam else name


def attends_by_rows(model: PreTrainedModel) -> bool:
    """Whether the model's attention reads the keys of each row of a decode step by itself."""
    return model.config.get_text_config()._attn_implementation in _NAMES.values()


# -- products ----------------------------------------------------------------------------------------------------------

_depends: dict[Hashable, bool] = {}


def depends_on_rows(weight: Tensor) -> bool:
    """Whether this device's kernels give a row of x [M, in] · weight [out, in] other bits for M > 1 than for M = 1.

    Measured once for each shape, dtype and device.
    """
    kind = (tuple(weight.shape), weight.dtype, weight.device)
    if kind not in _depends:
        x = torch.randn(max(PROBED_ROWS), weight.shape[1], generator=torch.Generator().manual_seed(0))
        x = x.to(weight.device, weight.dtype)
        alone = [functional.linear(x[:1], weight)[0], torch.mv(weight, x[0])]
        beside = [functional.linear(x[:rows], weight)[0] for rows in PROBED_ROWS]
        _depends[kind] = any(not torch.equal(alone[0], other) for other in (alone[1], *beside))
    return _depends[kind]


@torch.inference_mode()
def fix_rows(model: nn.Module) -> int:
    """Give products of decode steps a fixed number of rows, padded with zeros, if their kernels depend on the number.

    Mutates the model: the forward of such linear layers and routers takes its rows in blocks of `BLOCK_ROWS`. On a CPU
    their weights are then read once for each row.

    Returns:
        The modules that were changed.
    """
    changed = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        is_product = isinstance(module, nn.Linear) or type(module).__name__.endswith(("Router", "Gate"))
        if is_product and isinstance(weight, Tensor) and weight.dim() == 2 and depends_on_rows(weight):
            object.__setattr__(module, "forward", partial(_in_blocks, module.forward, BLOCK_ROWS[weight.device.type]))
            changed += 1
    return changed


def _in_blocks(forward: Callable[..., Any], size: int, x: Tensor, *args: Any, **options: Any) -> Any:
    rows = _step.get()
    if rows is None or x.shape[0] != len(rows.lengths) or len(x) == size:
        return forward(x, *args, **options)
    outputs = []
    for block in torch.split(x, size):
        absent = size - len(block)
        output = forward(functional.pad(block, (0, 0) * (x.dim() - 1) + (0, absent)), *args, **options)
        parts = output if isinstance(output, tuple) else (output,)
        outputs.append([part[: len(block)] for part in parts])
    joined = tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*outputs, strict=True))
    return joined if isinstance(output, tuple) else joined[0]
