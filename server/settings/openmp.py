"""How the threads of OpenMP wait for each other; to be decided before torch is imported, which reads it once.

By default they spin for milliseconds: fast on an idle machine, and several times slower as soon as anything else wants
the cores. Asleep at once (`OMP_WAIT_POLICY=PASSIVE`), they cost a model of small experts up to a quarter of its speed.
Spinning for some 10 µs keeps the first and bounds the second: `benchmarks/cpu/wait_policy.py`.
"""

from __future__ import annotations

import os

SPINS = "10000"


def spin_briefly() -> None:
    """Set GNU OpenMP's number of spins for this process and its children, unless the user has said how to wait."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
