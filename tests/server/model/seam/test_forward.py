"""Failed allocations are told from other errors."""

import pytest
import torch

from server.model.seam.forward import memory_ended, ran_out


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_failed_allocation_is_known_whoever_made_it(error):
    assert ran_out(error)
    told = memory_ended(error, 7, 2)
    assert told.positions == (2,)
    assert "\n" not in str(told)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), ValueError("out of memory")])
def test_other_errors_are_none(error):
    assert not ran_out(error)
