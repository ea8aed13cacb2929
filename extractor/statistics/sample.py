"""A bounded sample of windows or tokens; two samples merge exactly, in any order.

Every item has a key, a hash of its text and its position. Invariant (bottom-k sampling): the sample keeps the items
with the smallest keys of each domain, so merging the samples of two runs gives the sample of one run over both texts.
An item that is added twice is kept once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[np.generic]


class KeyedSample:
    """Items of N arrays that share their first axis.

    Args:
        limit: most items of each domain.
        arrays: name → (shape of one item, dtype).

    Attributes:
        keys: uint64 [N]; domains: int32 [N], sorted by domain, then key; arrays: each [N, …].
    """

    def __init__(self, limit: int, arrays: Mapping[str, tuple[tuple[int, ...], type[np.generic]]]) -> None:
        self.limit = limit
        self.keys = np.zeros(0, dtype=np.uint64)
        self.domains = np.zeros(0, dtype=np.int32)
        self.arrays: dict[str, AnyArray] = {
            name: np.zeros((0, *shape), dtype) for name, (shape, dtype) in arrays.items()
        }

    def __len__(self) -> int:
        return len(self.keys)

    def offer(
        self, keys: npt.NDArray[np.uint64], domains: npt.NDArray[np.integer], arrays: Mapping[str, AnyArray]
    ) -> None:
        """Add items: keys [N], domains [N] and every array [N, …], cast to our dtypes; keep the smallest keys."""
        all_keys = np.concatenate([self.keys, keys])
        all_domains = np.concatenate([self.domains, domains.astype(np.int32)])
        order = np.lexsort((all_keys, all_domains))
        keys_in, domains_in = all_keys[order], all_domains[order]
        repeated = np.zeros(len(order), dtype=np.bool_)
        repeated[1:] = (keys_in[1:] == keys_in[:-1]) & (domains_in[1:] == domains_in[:-1])
        order, domains_in = order[~repeated], domains_in[~repeated]
        place = np.arange(len(order)) - np.searchsorted(domains_in, domains_in)  # rank within the domain
        kept = order[place < self.limit]
        self.keys, self.domains = all_keys[kept], all_domains[kept]
        for name, mine in self.arrays.items():
            self.arrays[name] = np.concatenate([mine, arrays[name].astype(mine.dtype)])[kept]

    def of(self, domains: list[int]) -> npt.NDArray[np.bool_]:
        """Whether each item belongs to one of the domains, bool [N]."""
        return np.isin(self.domains, domains)


def item_keys(text_key: int, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """Keys of the items at `positions` of the text with key `text_key` (its hash), uint64 [N]."""
    with np.errstate(over="ignore"):
        mixed = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(text_key)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return mixed ^ (mixed >> np.uint64(31))
