"""Statistics made up for the tests of selection: two domains that use different experts, which the test knows."""

import numpy as np

from extractor.statistics.statistics import ExpertStatistics, PricePoint

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 8, 2
DOMAINS = ("code", "chat")


def expert_of(domain: str, layer: int, rank: int) -> int:
    """The expert that has a rank in a domain: the two domains start at opposite ends, each layer is turned by one."""
    return (rank + (0 if domain == "code" else 4) + layer) % NUM_EXPERTS


def make_statistics(num_tokens: int = 256, seed: int = 0, domains: tuple[str, ...] = DOMAINS) -> ExpertStatistics:
    """Tokens of a domain pick its first four experts almost always, the better ranked the more often."""
    rng = np.random.default_rng(seed)
    statistics = ExpertStatistics("sha", NUM_LAYERS, NUM_EXPERTS, TOP_K, expert_bytes=3000, trunk_bytes=1000)
    for domain in domains:
        index = statistics.domain_index(domain)
        statistics.num_tokens[index] = num_tokens
        chances = np.array([8, 6, 4, 3, 0.2, 0.2, 0.2, 0.2])
        ranks = np.argsort(-(rng.random((num_tokens, NUM_LAYERS, NUM_EXPERTS)) ** (1 / chances)), axis=2)[:, :, :TOP_K]
        experts = np.zeros_like(ranks)
        for layer in range(NUM_LAYERS):
            order = np.array([expert_of(domain, layer, rank) for rank in range(NUM_EXPERTS)])
            experts[:, layer] = order[ranks[:, layer]]
        gates = np.tile([0.75, 0.25], (num_tokens, NUM_LAYERS, 1))
        dense = np.zeros((num_tokens, NUM_LAYERS, NUM_EXPERTS))
        np.put_along_axis(dense, experts, gates, axis=2)
        for name in ("gate_mass", "demand_mass", "gate_output_norm", "output_norm", "residual_change"):
            statistics.totals[name][index] = dense.sum(axis=0)
        for name in ("picks", "demand"):
            statistics.totals[name][index] = (dense > 0).sum(axis=0)
        keys = rng.integers(0, 2**63, size=num_tokens).astype(np.uint64)
        where = np.full(num_tokens, index)
        parts = {"experts": experts, "gates": gates, "contributions": gates}
        statistics.tokens.offer(keys, where, parts)
        windows = dense.reshape(-1, 32, NUM_LAYERS, NUM_EXPERTS).sum(axis=1)
        statistics.windows.offer(keys[: len(windows)], where[: len(windows)], {"mass": windows})
        for layer in range(NUM_LAYERS - 1):
            statistics.coactivation[layer] += (dense[:, layer] > 0).T.astype(float) @ (dense[:, layer + 1] > 0)
        statistics.price += [
            PricePoint(domain, 0.1, 0.01, num_tokens, 0.5),
            PricePoint(domain, 0.4, 0.2 if domain == "code" else 0.02, num_tokens, 0.25),
        ]
    return statistics
