"""One captured step: weights, state, kernels in order, graph."""
