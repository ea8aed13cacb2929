"""Routing to replay, and what a cache can make of it: recorded and synthetic traces, Belady's optimum, a policy's hits.

A trace is int32 [steps, L, K], the distinct experts of each step; hit rates count distinct experts wanted. The
synthetic trace: popularity p(rank) ~ 1 / rank^skew over a random order of each layer's experts, without replacement;
with probability `stickiness` a step keeps each of the previous step's choices.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

Trace = npt.NDArray[np.int32]
DATA = Path(__file__).resolve().parents[1] / "data" / "routing-deepseek-v2-lite.npz"


def recorded(task: str) -> Trace:
    """The recorded choices of one task ("intent", "summary")."""
    with np.load(DATA) as arrays:
        return arrays[task].astype(np.int32)


def synthetic(steps: int, layers: int, experts: int, top_k: int, skew: float, stickiness: float, seed: int) -> Trace:
    """A trace with the given skew and stickiness."""
    random = np.random.default_rng(seed)
    log_p = np.stack([-skew * np.log1p(random.permutation(experts)) for _ in range(layers)])
    trace = np.empty((steps, layers, top_k), np.int32)
    for step in range(steps):
        score = log_p + random.gumbel(size=(layers, experts))
        if step:
            kept = random.random((layers, top_k)) < stickiness
            rows = np.repeat(np.arange(layers)[:, None], top_k, axis=1)
            score[rows[kept], trace[step - 1][kept]] = np.inf
        trace[step] = np.argsort(-score, axis=1)[:, :top_k]
    return trace


def belady_hit_rate(trace: Trace, num_slots: int, num_experts: int, first: int) -> float:
    """Hit rate from step `first` on of the policy that evicts what is wanted again last; slots start with experts 0,
    1, …
    """
    hits = wanted = 0
    steps, layers, _ = trace.shape
    for layer in range(layers):
        uses: list[list[int]] = [[] for _ in range(num_experts)]
        for step in range(steps):
            for expert in trace[step, layer]:
                uses[expert].append(step)
        following = [list(reversed(at)) for at in uses]
        resident = set(range(num_slots))
        for step in range(steps):
            now = {int(expert) for expert in trace[step, layer]}
            for expert in now:
                following[expert].pop()
            if step >= first:
                hits += len(now & resident)
                wanted += len(now)
            absent = now - resident
            if not absent:
                continue
            ranked = sorted(
                resident - now, key=lambda expert: -(following[expert][-1] if following[expert] else 1 << 30)
            )
            resident -= set(ranked[: len(absent)])
            resident |= absent
    return hits / max(wanted, 1)


def most_used(trace: Trace, num: int, num_experts: int) -> npt.NDArray[np.int64]:
    """[L, num] the experts of each layer that a trace wants most, best first: what usage would pin."""
    layers = trace.shape[1]
    counts = np.stack([np.bincount(trace[:, layer].ravel(), minlength=num_experts) for layer in range(layers)])
    return np.argsort(-counts, axis=1, kind="stable")[:, :num]
