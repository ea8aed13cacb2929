"""The wait policy of OpenMP's threads. It must be set before torch is imported, because torch reads it once.

By default waiting threads spin for milliseconds: this is fast on an idle machine, and several times slower when another
process needs the cores. Threads that sleep at once (`OMP_WAIT_POLICY=PASSIVE`) make a model of small experts up to a
quarter slower. Spinning for some 10 µs avoids most of both costs: `benchmarks/cpu/wait_policy.py`.
"""

from __future__ import annotations

import os

SPINS = "10000"


def spin_briefly() -> None:
    """Set GNU OpenMP's number of spins for this process and its children, unless the user has set a wait policy."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def wait_policy() -> str | None:
    """The wait policy that the user has set, None if there is none."""
    return os.environ.get("OMP_WAIT_POLICY")
