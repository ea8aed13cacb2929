"""Reads experts' spans from the store, several at a time.

A span has the compute dtype, so a fetch copies bytes. Invariant: the memory of an expert that could not be read is
undefined, and the error is returned, not raised, so that one bad file does not hide the others.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from expert_store.errors import StoreError
from expert_store.rows import TORCH_DTYPES
from expert_store.store import Store
from server.model.device.capture import need

log = logging.getLogger(__name__)

READ_THREADS = 8
"""Reads in flight for steps that wait, and as many for the background."""
Expert = tuple[int, int]
"""(MoE layer, expert)."""
Failures = dict[Expert, StoreError]


class SpanReader:
    """Reads spans of a store into memory of the compute dtype, or of words of four bytes if experts are packed, several
    at a time.

    Args:
        transposed: plain matrices are [N, O] in the store; in memory they are [O, N], as the kernels read them.

    Attributes:
        dtype, elements: of a span in memory.

    Raises:
        NotCapturableError: experts of mixed dtypes.
    """

    def __init__(self, store: Store, dtype: torch.dtype, *, transposed: bool = False) -> None:
        layers, tensors = store.manifest.layers, store.manifest.layers[0].tensors
        self._store = store
        self._shapes: list[tuple[int, ...]] = []
        """Of the tensors of a span in the store, if their order of elements changes."""
        if any(layer.is_encoded for layer in layers):
            self.dtype, self._stored, self.elements = torch.int32, torch.int32, layers[0].span_bytes // 4
        else:
            stored = {TORCH_DTYPES[tensor.dtype] for spec in layers for tensor in spec.tensors}
            need(len(stored) == 1, f"experts of mixed dtypes: {sorted(str(one) for one in stored)}")
            self.dtype, self._stored = dtype, stored.pop()
            self.elements = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
            self._shapes = [tensor.shape for tensor in tensors] if transposed else []
        self.span_bytes = self.elements * self.dtype.itemsize
        self._readers = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="span-read")

    def submit(
        self, expert: Expert, out: Tensor, wait: Callable[[], object] | None = None
    ) -> Future[StoreError | None]:
        """Reads an expert into out [elements] on another thread, which first calls `wait`."""

        def read() -> StoreError | None:
            if wait is not None:
                wait()
            return self._read_one(expert, out)

        return self._readers.submit(read)

    def read(
        self,
        experts: Sequence[Expert],
        into: Sequence[Tensor] | Tensor,
        readers: ThreadPoolExecutor | None = None,
    ) -> Failures:
        """Fills into [n, elements] (or n tensors [elements]) with the spans of `experts`, in their order.

        Args:
            readers: threads to read on; None are those that steps wait for.

        Returns the experts that could not be read, with their errors; their memory is undefined.
        """
        read = (readers or self._readers).map(self._read_one, experts, into)
        return {expert: error for expert, error in zip(experts, read, strict=False) if error is not None}

    def close(self) -> None:
        """Stops the threads."""
        self._readers.shutdown()

    def _read_one(self, expert: Expert, out: Tensor) -> StoreError | None:
        try:
            if self._stored == self.dtype and not self._shapes:
                self._store.read_expert(*expert, out.view(torch.uint8))
            else:
                raw = torch.empty(self.elements * self._stored.itemsize, dtype=torch.uint8)
                self._store.read_expert(*expert, raw)
                with torch.inference_mode():  # a setting of this thread; `out` may come from another one
                    self._place(raw.view(self._stored), out)
        except StoreError as error:
            return error
        return None

    def _place(self, span: Tensor, out: Tensor) -> None:
        """Copies a span of the store into memory, in the order of the kernels."""
        if not self._shapes:
            out.copy_(span)
            return
        at = 0
        for shape in self._shapes:
            part = span[at : at + math.prod(shape)].view(shape).t()  # a bias is its own transpose
            out[at : at + part.numel()].view(part.shape).copy_(part)
            at += part.numel()


def log_failures(failures: Failures) -> None:
    """Log one line for each expert that could not be read ahead of its use."""
    for (layer, expert), error in failures.items():
        log.error("expert %d of layer %d is read again when a token needs it: %s", expert, layer, error)
