"""`Store`: the reader of a store on disk.

Owns the current manifest. Invariants: it opens no file that the manifest does not name; a read either fills the
caller's memory with exactly the extracted bytes or raises; `reload` adds and removes whole deep experts and never
changes one, so running reads stay valid. All methods may be called from any thread. With a source attached, experts
that the store lacks are read from the source and not kept here.

The project's sets of experts, each bool [L, E]:

    available   in the store, with bytes that are trusted               `Store.available`
    excluded    in a shard, but damaged: not available any more         `Store.excluded`
    allowed     may be chosen by the routing of a request or a server   `router.mask.ExpertMask.allowed`
    servable    in a slot or in host memory: a captured step can use    `expert_store.paging.pages.DevicePages.servable`
    alone       in a slot for good, and not in host memory              `expert_store.paging.pages.DevicePages.alone`
    resident    in a slot now                                           `residency.cache.ExpertCache.resident`
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from expert_store.errors import ExpertUnavailableError, ManifestError, ShardCorruptError, StoreError
from expert_store.files import open_checked, read_fully
from expert_store.integrity import TrunkCheck, verify_files
from expert_store.manifest import DeepExpert, LayerSpec, Manifest, read_manifest
from expert_store.shard import OpenShards, ShardLayout, open_shard
from expert_store.shrink import ReaderLock, remove_unnamed_shards

MAX_OPEN_FILES = 256


@dataclass(frozen=True)
class StoreView:
    """One manifest and the tables that are derived from it.

    Attributes:
        layouts: layout of each shard, by the deep expert's index.
        deep_of: int32 [L, E], the position in `manifest.deep_experts` of the deep expert with the expert, -1: none.
        available: bool [L, E], read-only.
    """

    manifest: Manifest
    layouts: dict[int, ShardLayout]
    deep_of: npt.NDArray[np.int32]
    available: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, manifest: Manifest, excluded: frozenset[tuple[int, int]] = frozenset()) -> StoreView:
        """`excluded` are (layer, index of a deep expert) that count as not held."""
        deep_of = np.full((manifest.model.num_layers, manifest.model.num_experts), -1, dtype=np.int32)
        for place, deep in enumerate(manifest.deep_experts):
            kept = [layer for layer in range(len(deep.experts)) if (layer, deep.index) not in excluded]
            deep_of[kept, np.array(deep.experts)[kept]] = place
        available = deep_of >= 0
        available.setflags(write=False)
        layouts = {deep.index: ShardLayout.of(manifest.layers, deep) for deep in manifest.deep_experts}
        return cls(manifest, layouts, deep_of, available)

    def lacks(self, layer: int, expert: int) -> bool:
        """Whether (layer, expert) exists in the model and not in the store."""
        num_layers, num_experts = self.deep_of.shape
        return 0 <= layer < num_layers and 0 <= expert < num_experts and bool(self.deep_of[layer, expert] < 0)

    def locate(self, root: Path, layer: int, expert: int) -> DeepExpert:
        """The deep expert that holds (layer, expert); `root` is the store's directory, for messages.

        Raises:
            ExpertUnavailableError: the model has no such expert, or the store does not hold it.
        """
        model = self.manifest.model
        if not (0 <= layer < model.num_layers and 0 <= expert < model.num_experts):
            raise ExpertUnavailableError(
                f"there is no expert {expert} in MoE layer {layer}; this model has layers 0 to {model.num_layers - 1} "
                f"and experts 0 to {model.num_experts - 1}"
            )
        index = int(self.deep_of[layer, expert])
        if index < 0:
            raise ExpertUnavailableError(
                f"expert {expert} of MoE layer {layer} is not in {root}; mask it, or extract a larger selection into "
                "the same store"
            )
        return self.manifest.deep_experts[index]


class SourceReader(Protocol):
    """Reads experts from the source of the store; called from any thread."""

    def read_expert(self, layer: int, expert: int, out: memoryview) -> None:
        """Fill `out` with the span of (layer, expert), any expert of the model. Raises a StoreError."""


class Store:
    """A store on disk, opened for reading. Use `Store.open`; close with `close()` or as a context manager."""

    def __init__(self, path: Path, manifest: Manifest, max_open_files: int = MAX_OPEN_FILES) -> None:
        self.path = path
        self._view = StoreView.of(manifest)
        self._shards = OpenShards(path, max_open_files)
        self._lock = threading.Lock()
        self._readers = ReaderLock(path)
        self._source: SourceReader | None = None
        self._excluded: frozenset[tuple[int, int]] = frozenset()  # (layer, index of the deep expert)
        self._trunk_check: TrunkCheck | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        max_open_files: int = MAX_OPEN_FILES,
        trunk_check: TrunkCheck | None = None,
    ) -> Store:
        """Open the store at `path` after checking the manifest, all files' sizes and every shard's header.

        At most `max_open_files` shards are kept open. `trunk_check` is one of this store that was begun already. Raises
        ManifestError or ShardCorruptError.
        """
        root = Path(path).resolve()
        store = cls(root, read_manifest(root), max_open_files)
        store._trunk_check = trunk_check
        try:
            store._check_files(store._view)
        except BaseException:
            store.close()
            raise
        return store

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; running reads finish first, later ones raise."""
        with self._lock:
            self._shards.close()
            self._readers.close()

    @property
    def manifest(self) -> Manifest:
        """The current manifest."""
        return self._view.manifest

    @property
    def available(self) -> npt.NDArray[np.bool_]:
        """The experts that the store holds, bool [L, E], read-only; `reload` makes a new array and keeps this one."""
        return self._view.available

    @property
    def has_source(self) -> bool:
        """Whether a source is attached, so that `read_expert` can read every expert of the model."""
        return self._source is not None

    def attach_source(self, source: SourceReader) -> None:
        """From now on read experts that the store lacks from `source`. `available` does not change."""
        self._source = source

    def exclude(self, layer: int, expert: int) -> None:
        """From now on treat (layer, expert) as not available, also after `reload`, because its bytes are damaged.

        Raises ExpertUnavailableError if the store does not hold it.
        """
        with self._lock:
            deep = self._view.locate(self.path, layer, expert)
            self._excluded |= {(layer, deep.index)}
            self._view = StoreView.of(self._view.manifest, self._excluded)

    @property
    def excluded(self) -> npt.NDArray[np.bool_]:
        """The experts of the shards that `exclude` removed, bool [L, E], a copy."""
        found = np.zeros(self._view.available.shape, dtype=np.bool_)
        for deep in self._view.manifest.deep_experts:
            for layer, expert in enumerate(deep.experts):
                found[layer, expert] |= (layer, deep.index) in self._excluded
        return found

    @property
    def trunk_path(self) -> Path:
        """The directory that transformers loads the trunk from."""
        return self.path / "trunk"

    def begin_trunk_check(self) -> TrunkCheck:
        """The check of the trunk's files against the manifest. The first call starts it and checks the small files.

        Raises ShardCorruptError for a bad small file.
        """
        with self._lock:
            if self._trunk_check is None:
                self._trunk_check = TrunkCheck(self.path, self._view.manifest)
            return self._trunk_check

    @contextmanager
    def checking_trunk(self) -> Iterator[TrunkCheck]:
        """Check the trunk while the block loads it; exit after all files were checked.

        Raises ShardCorruptError, naming every bad file; it replaces an error of loading a bad file. The next block then
        checks again.
        """
        check = self.begin_trunk_check()
        try:
            try:
                yield check
            except Exception:
                check.wait()
                raise
            check.wait()
        except ShardCorruptError:
            with self._lock:
                self._trunk_check = None
            raise

    def layer_spec(self, layer: int) -> LayerSpec:
        """The span of MoE layer `layer` (0 to L-1)."""
        layers = self._view.manifest.layers
        if not 0 <= layer < len(layers):
            raise ExpertUnavailableError(f"there is no MoE layer {layer}; this model has 0 to {len(layers) - 1}")
        return layers[layer]

    def deep_expert(self, layer: int, expert: int) -> DeepExpert:
        """The deep expert that holds (layer, expert). Raises ExpertUnavailableError."""
        return self._view.locate(self.path, layer, expert)

    def read_expert(self, layer: int, expert: int, out: memoryview | torch.Tensor, verify: bool = True) -> None:
        """Fill `out` with the span of (layer, expert), read from disk straight into it.

        `out` is writable contiguous memory of exactly `layer_spec(layer).span_bytes` bytes: a memoryview, or a one
        dimensional uint8 tensor in host memory. With `verify` the bytes are compared with the manifest's XXH3-64. Other
        experts are read from the attached source. Raises ExpertUnavailableError, ShardCorruptError (`out` is then
        undefined), both with their `expert` set, ValueError for a wrong `out`.
        """
        try:
            self._read_expert(layer, expert, out, verify)
        except StoreError as error:
            error.expert = (layer, expert)
            raise

    def _read_expert(self, layer: int, expert: int, out: memoryview | torch.Tensor, verify: bool) -> None:
        view, source = self._view, self._source
        if source is not None and view.lacks(layer, expert):
            source.read_expert(layer, expert, _as_bytes(out, view.manifest.layers[layer].span_bytes))
            return
        deep = view.locate(self.path, layer, expert)
        memory = _as_bytes(out, view.manifest.layers[layer].span_bytes)
        where = f"{self.path}/{deep.file} (layer {layer}, expert {expert})"
        with self._shards.opened(deep, view.layouts[deep.index]) as descriptor:
            read_fully(descriptor, memory, view.layouts[deep.index].span_offsets[layer], where)
        if verify and xxhash.xxh3_64_hexdigest(memory) != deep.span_hashes[layer]:
            raise ShardCorruptError(
                f"{where}: the bytes hash to {xxhash.xxh3_64_hexdigest(memory)}, the manifest says "
                f"{deep.span_hashes[layer]}; the file was altered: restore it, or extract into an empty directory"
            )

    def reload(self) -> bool:
        """Read the manifest again, with deep experts added, removed or both; return whether it has changed.

        Raises ManifestError, keeping the current manifest, if the new one is of another model or changes a deep expert.
        """
        newer = read_manifest(self.path)
        with self._lock:
            older = self._view.manifest
            if newer == older:
                return False
            held = {deep.index: deep for deep in older.deep_experts}
            same = (newer.source, newer.model, newer.layers) == (older.source, older.model, older.layers)
            kept = {deep.index for deep in newer.deep_experts if deep.index < older.next_index}
            if not same or any(held.get(d.index) != d for d in newer.deep_experts if d.index in kept):
                raise ManifestError(
                    f"{self.path}: the manifest on disk does not follow from the one in use (another checkpoint, or "
                    "deep experts changed); restart to use it"
                )
            view = StoreView.of(newer, self._excluded)
            self._check_files(view)
            self._view = view
            self._shards.forget([index for index in held if index not in kept])
            return True

    def remove_unnamed(self) -> int | None:
        """Delete the shards that the manifest no longer names; return their bytes, or None if they must stay.

        They stay while another reader has the store open, and while the current manifest is not the one on disk.
        """
        with self._readers.alone() as is_alone:
            return remove_unnamed_shards(self.path, self._view.manifest) if is_alone else None

    def verify(self, progress: Callable[[int], None] | None = None) -> int:
        """Read every file that the manifest names and compare its sha256 and the hash of every span.

        `progress` is called with the number of bytes read since the last call. Returns the bytes read. Raises one
        ShardCorruptError that names every bad file, after all were read.
        """
        return verify_files(self.path, self._view.manifest, progress)

    def _check_files(self, view: StoreView) -> None:
        """Check that every named file exists with its size and header, and that the trunk has no other file."""
        for deep in view.manifest.deep_experts:
            os.close(open_shard(self.path, deep, view.layouts[deep.index]))
        named = {file.name: file.bytes for file in view.manifest.trunk}
        adapters = {adapter.file: adapter.bytes for adapter in view.manifest.adapters}
        for name, size in {**named, **adapters}.items():
            os.close(open_checked(self.path, name, size))
        for directory, _, files in os.walk(self.trunk_path):
            for file in files:
                name = (Path(directory) / file).relative_to(self.path).as_posix()
                if name not in named:
                    raise ManifestError(
                        f"{self.path / name} is not named by the manifest and would be read with the trunk; remove it"
                    )


def _as_bytes(out: memoryview | torch.Tensor, size: int) -> memoryview:
    if isinstance(out, torch.Tensor):
        if out.device.type != "cpu" or out.dtype != torch.uint8 or out.dim() != 1 or not out.is_contiguous():
            raise ValueError(
                f"out is a {out.dtype} tensor of shape {tuple(out.shape)} on {out.device}; wanted a contiguous "
                "one-dimensional torch.uint8 tensor in host memory"
            )
        memory = memoryview(out.numpy())  # type: ignore[arg-type]
    else:
        memory = out.cast("B") if out.format != "B" or out.ndim != 1 else out
    if memory.readonly or memory.nbytes != size:
        kind = "read-only" if memory.readonly else "writable"
        raise ValueError(f"out is {kind} memory of {memory.nbytes} bytes, wanted writable memory of {size} bytes")
    return memory
