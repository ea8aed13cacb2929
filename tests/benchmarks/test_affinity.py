"""The simulation of many replicas: whose slots a prompt fills, and the savings of each seed."""

import numpy as np
import pytest

from benchmarks.affinity import Kinds, Machine, Simulation, Traffic, Turn, saves

ALTERNATING = Kinds.of([np.array([0, 1, 0, 1], dtype=np.uint8)[:, None, None]], 8)
"""A text of four tokens, which want the experts 0 and 1 of one layer in turn."""


@pytest.mark.parametrize(("streams", "fetched"), [(True, 4), (False, 2)])
def test_a_prompt_leaves_the_slots_of_a_gpu_as_they_were_and_fills_those_of_a_cpu(streams: bool, fetched: int) -> None:
    machine = Machine(4, 1, base_seconds=1.0, token_seconds=0.0, bytes_per_second=1.0, streams=streams)
    simulation = Simulation(ALTERNATING, machine, Traffic(1.0), 1, "two choices", 0.0)
    simulation.queue[0].append(Turn(0, 0, 0, history=0, prompt=2, answer=2, is_known=False, think_seconds=0.0))
    for now in (0.0, 10.0, 20.0):  # the prompt, and a token each
        simulation._step(np.array([0]), now)
    assert (simulation.counts.generated, simulation.counts.fetched) == (2, fetched)


def test_a_seed_is_compared_with_itself() -> None:
    by_policy = {
        "two choices": {"fetched_bytes_per_token": [100.0, 10.0]},
        "affinity": {"fetched_bytes_per_token": [50.0, 9.0]},
    }
    assert saves(by_policy, "affinity") == pytest.approx([0.5, 0.1])
