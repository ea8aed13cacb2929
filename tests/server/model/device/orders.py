"""Compares the floating-point operations of steps with adapters and of steps without, in the compiler's output.

A step with adapters must give entries without one the bits of a step without: it does if its kernels have all
operations of the others, in their order, and add some. Run as a program, as `ahead_of_time`; prints a line for each
kernel, and ends with 1 if one has another order.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from expert_store.paging.pages import DevicePages, PagesShape
from server.model.device.step.parts import AttentionKind, DeltaKind, LatentKind
from server.model.device.step.state import RowState
from server.model.device.step.step import DecodeStep
from server.model.device.step.tuning import StepOptions
from server.model.device.step.weights import DecodeShape
from tests.server.model.device import ahead_of_time
from tests.server.model.device.ahead_of_time import BUNDLED, Ahead, trunk

OPERATION = re.compile(
    r"^\s*(?:@\S+\s+)?((?:fma|mul|add|sub|neg|div|rsqrt|ex2|cvt|shfl|mma|wgmma)\.\S*(?:f16|f32|b32)\S*)", re.M
)
SHAPE = replace(
    BUNDLED, max_rows=8, shared_intermediate=128, dense_layers=frozenset({0}), dense_intermediate=256, qk_norm="head"
)
SHAPES = (
    SHAPE,
    replace(SHAPE, attentions=(LatentKind(4, 128, 64, 32, 64, 128),) * 8),
    replace(SHAPE, attentions=(DeltaKind(4, 4, 64, 64, 4), AttentionKind(4, 2, 64, 64, 64)) * 4),
)


class Recorded(DecodeStep):
    """A step that keeps what its kernels are compiled to."""

    compiled: list[tuple[str, list[str]]]

    def _run(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        made = kernel.warmup(*args, grid=grid, PDL=False, **constants)
        self.compiled.append((kernel.fn.__name__, OPERATION.findall(made.asm["ptx"])))


def compiled(shape: DecodeShape, adapted: bool) -> list[tuple[str, list[str]]]:
    """(kernel, its operations) of a masked step of eight rows, without the kernels that only adapters have.

    In a step of one row, that one has the adapter.
    """
    sizes = PagesShape(
        shape.num_moe_layers,
        shape.num_experts,
        shape.top_k,
        shape.num_experts,
        shape.span_elements,
        8,
        shape.span_dtype,
    )
    pages = DevicePages(sizes, None, device="meta")
    options = StepOptions(masked=True, adapted=adapted)
    step = Recorded(shape, trunk(shape, 16 if adapted else 0), pages, RowState(shape, "meta"), 8, options)
    step.compiled = []
    step.compile()
    return [(name, operations) for name, operations in step.compiled if name != "shrink"]


def keeps(wanted: list[str], found: Iterator[str]) -> bool:
    """Whether all of `wanted` are in `found`, in their order."""
    return all(one in found for one in wanted)


def main() -> int:
    ahead: Any = Ahead(90)
    ahead_of_time.driver.set_active(ahead)
    failed = 0
    for shape in SHAPES:
        for (name, plain), (_, adapted) in zip(compiled(shape, False), compiled(shape, True), strict=True):
            is_kept = keeps(plain, iter(adapted))
            failed += not is_kept
            print(f"{name}: {len(plain)} operations {'kept' if is_kept else 'IN ANOTHER ORDER'}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
