"""Whether a prompt's bits depend on how it is cut into chunks: they do where a product's depend on its number of rows.

Attention does not, because its queries run in blocks at fixed positions. Invariant: `cuts_anywhere` is measured on this
machine's kernels for the shapes of this model, and False where it was not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from server.model.host.assembly import ROUTER_NAMES, HostModel
from server.model.seam.rows import attends_by_rows
from server.model.seam.trunk import is_experts_module

PROBED = 256
"""Rows of the product that others are compared with."""
PROBED_PARTS = ((0, 1), (0, 2), (0, 7), (0, 32), (0, 33), (32, 100), (64, 224), (96, 256), (1, 256))
"""Rows [start, end) of it whose bits must be the same in a product of their own."""

_known: dict[Hashable, bool] = {}


@torch.inference_mode()
def cuts_anywhere(model: HostModel) -> bool:
    """Whether the bits of a prompt's tokens are the same however it is cut. Runs each kind of product a few times."""
    if model.device.type != "cpu" or not attends_by_rows(model.model) or any(p.encodings for p in model.cache.pools):
        return False
    return not any(_depends(*probe, model.dtype) for probe in _products(model))


def _products(model: HostModel) -> Iterator[tuple[Hashable, int, Callable[[Tensor], Any]]]:
    """The kind of each product of a prompt, its columns, and the product."""
    for name, module in model.model.named_modules():
        kind = name.rpartition(".")[2]
        weight = getattr(module, "weight", None)
        if kind == "lm_head" or not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        if isinstance(module, nn.Linear) or kind in ROUTER_NAMES:
            product = type(module).forward.__get__(module)  # without the fixed rows of a decode step
            yield (type(module), tuple(weight.shape), weight.dtype), int(weight.shape[1]), product
    for shape, transposed in _expert_shapes(model):
        weight = torch.randn(*shape).to(model.dtype)
        weight = weight.t() if transposed else weight
        yield (shape, transposed, model.dtype), weight.shape[1], partial(functional.linear, weight=weight)


def _expert_shapes(model: HostModel) -> set[tuple[tuple[int, int], bool]]:
    """The shapes of the experts' matrices in memory, and whether they are multiplied as they are or transposed."""
    transposed = {bool(module.is_transposed) for module in model.model.modules() if is_experts_module(module)}
    weights = [weights[0] for pool in model.cache.pools for weights in pool.rows.values()]
    return {((int(w.shape[0]), int(w.shape[1])), way) for w in weights if w.dim() == 2 for way in transposed}


def _depends(kind: Hashable, columns: int, product: Callable[[Tensor], Any], dtype: torch.dtype) -> bool:
    if kind not in _known:
        x = torch.randn(PROBED, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
        whole = _tensors(product(x))
        _known[kind] = not all(
            torch.equal(part, all_rows[start:end])
            for start, end in PROBED_PARTS
            for part, all_rows in zip(_tensors(product(x[start:end])), whole, strict=True)
        )
    return _known[kind]


def _tensors(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)
