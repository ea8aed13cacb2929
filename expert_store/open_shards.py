"""The shard files that a store has open: at most so many, each checked when it is opened.

Invariant: a descriptor in use is never closed; one that was to be closed meanwhile is closed once nobody uses it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from expert_store.errors import ManifestError
from expert_store.manifest import DeepExpert
from expert_store.shard import ShardLayout, open_shard


class _OpenShard:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.users = 0


class OpenShards:
    """Descriptors of shards, by the deep expert's index. All methods may be called from any thread.

    Args:
        root: the store.
        max_open_files: most that stay open while nobody uses them.
    """

    def __init__(self, root: Path, max_open_files: int) -> None:
        self._root = root
        self._max_open_files = max_open_files
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._forgotten: set[int] = set()
        self._closed = False
        self._lock = threading.Lock()

    @contextmanager
    def opened(self, deep: DeepExpert, layout: ShardLayout) -> Iterator[int]:
        """The descriptor of a checked shard, not closed while in use; the least recently used idle ones are closed.

        Raises:
            ManifestError: `close` was called. ShardCorruptError: not the file that the manifest names.
        """
        with self._lock:
            if self._closed:
                raise ManifestError(f"{self._root}: the store was closed; open it again")
            shard = self._open.get(deep.index)
            if shard is None:
                shard = self._open[deep.index] = _OpenShard(open_shard(self._root, deep, layout))
            self._open.move_to_end(deep.index)
            shard.users += 1
            self._close_idle()
        try:
            yield shard.descriptor
        finally:
            with self._lock:
                shard.users -= 1
                self._close_idle()

    def forget(self, indices: Iterable[int]) -> None:
        """Close the shards of deep experts that are gone for good, those in use when they no longer are."""
        with self._lock:
            self._forgotten.update(index for index in indices if index in self._open)
            self._close_idle()

    def close(self) -> None:
        """Close everything; reads in flight finish first, later ones raise."""
        with self._lock:
            self._closed = True
            self._close_idle()

    def _close_idle(self) -> None:
        excess = len(self._open) if self._closed else max(0, len(self._open) - self._max_open_files)
        if not excess and not self._forgotten:
            return
        idle = [index for index, shard in self._open.items() if shard.users == 0]
        for index in dict.fromkeys([*idle[:excess], *(index for index in idle if index in self._forgotten)]):
            os.close(self._open.pop(index).descriptor)
            self._forgotten.discard(index)
