"""Compiling many kernels at once: a step has a dozen for each batch size, and one after the other they take a minute.

Triton keeps what was compiled in its cache on disk, so only the first start of a model's shape pays.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

log = logging.getLogger(__name__)

MOST_THREADS = 16


@contextmanager
def in_parallel() -> Iterator[None]:
    """Within it `kernel.warmup` only asks for a kernel; all are compiled when it ends. Nothing may be launched in it. A
    Triton without this ability compiles at once instead."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:
        log.info("this Triton compiles one kernel at a time")
        yield
        return
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads, AsyncCompileMode(threads):
        yield
