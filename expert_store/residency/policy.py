"""Eviction policies: the order in which resident experts are evicted, one small object for each layer.

Invariant: a policy contains exactly the resident experts of its layer; `ExpertCache.check_integrity` compares them.
A new policy is one class with these four methods and an entry in `POLICIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Protocol


class EvictionPolicy(Protocol):
    """Order of eviction among the resident experts of one layer."""

    def admit(self, expert: int) -> None:
        """`expert` became resident."""

    def touch(self, expert: int) -> None:
        """Resident `expert` was used."""

    def evict(self, is_leased: Callable[[int], bool]) -> int:
        """Choose a victim that is not leased, forget it and return it. The caller guarantees that one exists."""

    def resident(self) -> Iterable[int]:
        """The experts known, next victim first."""


class LRU:
    """Least recently used first: a dict in order of last use, so every operation except a scan over leases is O(1)."""

    def __init__(self) -> None:
        self._order: dict[int, None] = {}

    def admit(self, expert: int) -> None:
        """See `EvictionPolicy.admit`."""
        self._order[expert] = None

    def touch(self, expert: int) -> None:
        """See `EvictionPolicy.touch`."""
        del self._order[expert]
        self._order[expert] = None

    def evict(self, is_leased: Callable[[int], bool]) -> int:
        """See `EvictionPolicy.evict`."""
        victim = next(expert for expert in self._order if not is_leased(expert))
        del self._order[victim]
        return victim

    def resident(self) -> Iterable[int]:
        """See `EvictionPolicy.resident`."""
        return self._order.keys()


class LFU:
    """Least frequently used first, ties by last use. Eviction does not reset an expert's count of uses."""

    def __init__(self) -> None:
        self._uses: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._clock = 0

    def admit(self, expert: int) -> None:
        """See `EvictionPolicy.admit`."""
        self._record(expert)

    def touch(self, expert: int) -> None:
        """See `EvictionPolicy.touch`."""
        self._record(expert)

    def evict(self, is_leased: Callable[[int], bool]) -> int:
        """See `EvictionPolicy.evict`."""
        candidates = (expert for expert in self._last if not is_leased(expert))
        victim = min(candidates, key=lambda expert: (self._uses[expert], self._last[expert]))
        del self._last[victim]
        return victim

    def resident(self) -> Iterable[int]:
        """See `EvictionPolicy.resident`."""
        return sorted(self._last, key=lambda expert: (self._uses[expert], self._last[expert]))

    def _record(self, expert: int) -> None:
        self._clock += 1
        self._uses[expert] = self._uses.get(expert, 0) + 1
        self._last[expert] = self._clock


class KeepSome:
    """Another policy's order, with some experts kept: they are evicted only if every other expert is leased.

    Args:
        policy: orders the others, and the kept ones among themselves.
        experts: the experts to keep after they become resident.
    """

    def __init__(self, policy: EvictionPolicy, experts: Collection[int]) -> None:
        self._policy = policy
        self._kept = frozenset(experts)

    def admit(self, expert: int) -> None:
        """See `EvictionPolicy.admit`."""
        self._policy.admit(expert)

    def touch(self, expert: int) -> None:
        """See `EvictionPolicy.touch`."""
        self._policy.touch(expert)

    def evict(self, is_leased: Callable[[int], bool]) -> int:
        """See `EvictionPolicy.evict`."""
        if all(expert in self._kept or is_leased(expert) for expert in self._policy.resident()):
            return self._policy.evict(is_leased)
        return self._policy.evict(lambda expert: expert in self._kept or is_leased(expert))

    def resident(self) -> Iterable[int]:
        """The experts known: the others, next victim first, then the kept ones."""
        known = list(self._policy.resident())
        return [e for e in known if e not in self._kept] + [e for e in known if e in self._kept]


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRU, "lfu": LFU}
