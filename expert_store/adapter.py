"""Adapters: small changes to a trunk, for rows that are masked; their files, and those that a store names.

Owns the format "deepfew-adapter", version 1: one safetensors file, whose metadata says for which masks the adapter was
made. Its tensors are named `module.part`, and the names of the parts are those of `PARTS`. Invariant: an `Adapter` that
was read has finite parts of fitting shapes, and either a mask or a range of shares.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from expert_store.errors import AdapterError, ShardCorruptError
from expert_store.files import open_checked, read_fully, replacing
from expert_store.manifest import ADAPTER_NAME, AdapterFile, Manifest, format_ids, read_manifest, write_manifest

FORMAT, VERSION, METADATA = "deepfew-adapter", 1, "adapter"
PARTS = ("lora_A", "lora_B", "delta", "scale", "gain", "gate", "up", "down")
"""A linear layer y = x Wᵀ has `lora_A` [R, in] and `lora_B` [out, R], or `delta` [out, in]: y + x Aᵀ Bᵀ, or y + x Δᵀ. A
router has `delta` [E, H], added to its logits in the same way, and `gain` [E]: the weight of expert e is multiplied by
1 + gain[e] after the choice. A norm has `scale` [N]: its output is multiplied by 1 + scale. A layer's experts have
`gate` and `up` [W, H] and `down` [H, W], one more shared expert: y + (silu(x Gᵀ) · x Uᵀ) Dᵀ."""

Changes = Mapping[str, Mapping[str, Tensor]]
"""Module of the trunk → part → tensor."""


@dataclass(frozen=True)
class Adapter:
    """Changes to a trunk, and the masks that they were made for.

    Attributes:
        fingerprint: of the checkpoint whose trunk it changes.
        num_layers, num_experts: L and E.
        changes: float32 tensors by module and part.
        mask: bool [L, E], the only mask that it is for; None if it is for pools.
        shares: least and largest share of each layer's experts that it is for; None if it is for one mask.
        price: the cost of a deficit with it, as `extractor.statistics.price` writes it; empty if it was not measured.
        training: the texts, tokens and seconds of its training and the figures on held-out text; free-form JSON.
    """

    fingerprint: str
    num_layers: int
    num_experts: int
    changes: Changes
    mask: npt.NDArray[np.bool_] | None = None
    shares: tuple[float, float] | None = None
    price: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def is_for(self, allowed: npt.NDArray[np.bool_]) -> bool:
        """Whether it was made for rows that may choose among `allowed`, bool [L, E]; never for a full mask."""
        if allowed.all():
            return False
        if self.mask is not None:
            return bool(np.array_equal(allowed, self.mask))
        assert self.shares is not None
        share = float(allowed.mean())
        return self.shares[0] - 1e-6 <= share <= self.shares[1] + 1e-6

    @property
    def ratios(self) -> dict[str, float]:
        """Share of the experts → perplexity of held-out text under the mask ÷ that of the whole model, with it."""
        found = self.training.get("ratios") or [[0, {}]]
        return dict(found[-1][1])

    @property
    def ratios_before(self) -> dict[str, float]:
        """The same without it, for those shares that were measured."""
        return dict(self.training.get("ratios_before", {}))

    def told_ratio(self, share: str) -> str:
        """The ratio at a share of `ratios`, as text, beside that without the adapter if it was measured."""
        before = self.ratios_before.get(share)
        return f"× {self.ratios[share]:.3f}" + ("" if before is None else f" (without × {before:.3f})")

    @property
    def num_parameters(self) -> int:
        """Numbers in all of its tensors."""
        return sum(tensor.numel() for parts in self.changes.values() for tensor in parts.values())

    def to_bytes(self) -> bytes:
        """The bytes of its file; equal adapters give equal bytes."""
        about: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "num_layers": self.num_layers,
            "num_experts": self.num_experts,
            "price": self.price,
            "training": self.training,
        }
        if self.mask is not None:
            about["mask"] = [format_ids(np.flatnonzero(layer).tolist()) for layer in self.mask]
        if self.shares is not None:
            about["shares"] = list(self.shares)
        tensors = {
            f"{module}.{part}": tensor.detach().float().cpu().contiguous()
            for module, parts in self.changes.items()
            for part, tensor in parts.items()
        }
        return save(tensors, {METADATA: json.dumps(about, sort_keys=True)})

    def write(self, path: Path) -> None:
        """Write it to `path`, which is replaced as a whole. Raises OSError."""
        with replacing(path) as file:
            file.write(self.to_bytes())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the adapter at `path`.

        Raises:
            AdapterError: it cannot be read, or it is no adapter of a known version.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise AdapterError(f"{path} cannot be read: {error.strerror}; check the path") from None
        return cls.of_bytes(content, path)

    @classmethod
    def of_bytes(cls, content: bytes, path: Path) -> Self:
        """The adapter in the bytes of a file; `path` is for messages. Raises AdapterError."""
        try:
            tensors = load(content)
            size = int.from_bytes(content[:8], "little")
            about = json.loads(json.loads(content[8 : 8 + size]).get("__metadata__", {}).get(METADATA, "{}"))
        except (SafetensorError, ValueError) as error:
            raise AdapterError(f"{path} cannot be read as an adapter: {error}; make one with `deepfew adapt`") from None
        if about.get("format") != FORMAT:
            raise AdapterError(f"{path} is no adapter of deepfew: make one with `deepfew adapt`")
        if about.get("version") != VERSION:
            raise AdapterError(
                f"{path} has version {about.get('version')}, this program reads {VERSION}: use the deepfew that wrote "
                "it, or run `deepfew adapt` again"
            )
        try:
            return cls._parsed(about, tensors)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise AdapterError(f"{path} is damaged ({error}): run `deepfew adapt` again") from None

    @classmethod
    def _parsed(cls, about: dict[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        num_layers, num_experts = int(about["num_layers"]), int(about["num_experts"])
        changes: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            module, _, part = name.rpartition(".")
            if part not in PARTS or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"tensor {name} has no known part, or is not finite")
            changes.setdefault(module, {})[part] = tensor.float()
        mask, shares = None, None
        if "mask" in about:
            mask = np.zeros((num_layers, num_experts), dtype=np.bool_)
            for layer, ids in enumerate(about["mask"]):
                mask[layer, _ids(ids)] = True
        else:
            low, high = (float(share) for share in about["shares"])
            shares = (low, high)
        price, training = dict(about["price"]), dict(about["training"])
        return cls(str(about["fingerprint"]), num_layers, num_experts, changes, mask, shares, price, training)


def store_adapters(root: Path, manifest: Manifest) -> dict[str, Adapter]:
    """The adapters of the store at `root` by name.

    Raises:
        ShardCorruptError: a file is missing, or not the one that was attached. AdapterError: see `Adapter.read`.
    """
    found = {}
    for entry in manifest.adapters:
        content = bytearray(entry.bytes)
        descriptor = open_checked(root.resolve(), entry.file, entry.bytes)
        try:
            read_fully(descriptor, memoryview(content), 0, str(root / entry.file))
        finally:
            os.close(descriptor)
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise ShardCorruptError(
                f"{root / entry.file} is not the adapter that was attached: restore it, or attach {entry.name} again"
            )
        found[entry.name] = Adapter.of_bytes(bytes(content), root / entry.file)
    return found


def find_adapter(root: Path, manifest: Manifest, name: str) -> Adapter:
    """The adapter `name` of the store at `root`, else the one in the file of that path. Raises AdapterError."""
    found = store_adapters(root, manifest)
    if name in found:
        return found[name]
    if not Path(name).exists():
        have = ", ".join(found) or "none"
        raise AdapterError(f"{name} is no adapter of the store, which has {have}, and no file: name one of them")
    return Adapter.read(Path(name))


def made_for(adapters: Mapping[str, Adapter], allowed: npt.NDArray[np.bool_]) -> str | None:
    """The name of the adapter for rows that may choose among `allowed`, bool [L, E]; None if none was made for them.

    One that was made for this mask alone comes first, then the one for the narrowest range of sizes.
    """
    fitting = [(name, adapter) for name, adapter in adapters.items() if adapter.is_for(allowed)]

    def width(item: tuple[str, Adapter]) -> float:
        shares = item[1].shares
        return 0.0 if shares is None else 1.0 + shares[1] - shares[0]

    return min(fitting, key=width)[0] if fitting else None


def attach(root: Path, name: str, adapter: Adapter) -> None:
    """Write an adapter into the store at `root` and name it in the manifest; it replaces one of the same name.

    Raises:
        AdapterError: a name that is none, or an adapter of another checkpoint. ManifestError. OSError.
    """
    manifest = read_manifest(root)
    if not re.fullmatch(ADAPTER_NAME, name) or name == "none":
        raise AdapterError(
            f"{name!r} names no adapter: wanted 1 to 64 letters, digits, '.', '_' and '-', and not none, by which "
            "requests say that they want no adapter"
        )
    shape = (manifest.model.num_layers, manifest.model.num_experts)
    if (adapter.fingerprint, adapter.num_layers, adapter.num_experts) != (manifest.source.fingerprint, *shape):
        raise AdapterError(
            f"adapter {name} is of checkpoint {adapter.fingerprint[:12]}, the store of "
            f"{manifest.source.fingerprint[:12]}: train one with `deepfew adapt` on this checkpoint"
        )
    entry = write_adapter(root, name, adapter)
    others = [other for other in manifest.adapters if other.name != name]
    write_manifest(root, replace(manifest, adapters=tuple(sorted([*others, entry], key=lambda one: one.name))))
    remove_unnamed(root)


def write_adapter(root: Path, name: str, adapter: Adapter) -> AdapterFile:
    """Write the file of an adapter below the store at `root`; returns its entry for the manifest. Raises OSError."""
    content = adapter.to_bytes()
    digest = hashlib.sha256(content).hexdigest()
    entry = AdapterFile(name, f"adapters/{name}-{digest[:12]}.safetensors", len(content), digest)
    with replacing(root / entry.file) as file:
        file.write(content)
    return entry


def detach(root: Path, name: str) -> None:
    """Remove an adapter from the store at `root`. Raises AdapterError if it has none of this name, ManifestError."""
    manifest = read_manifest(root)
    kept = tuple(entry for entry in manifest.adapters if entry.name != name)
    if len(kept) == len(manifest.adapters):
        have = ", ".join(entry.name for entry in manifest.adapters) or "none"
        raise AdapterError(f"the store has no adapter {name}: it has {have}")
    write_manifest(root, replace(manifest, adapters=kept))
    remove_unnamed(root)


def remove_unnamed(root: Path) -> None:
    """Delete files of adapters that were replaced or detached; a server has read them at its start."""
    named = {entry.file for entry in read_manifest(root).adapters}
    for file in (root / "adapters").iterdir():
        if f"adapters/{file.name}" not in named:
            file.unlink()


def _ids(text: str) -> list[int]:
    """The ids of ranges such as `0-2,12`."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
