"""A store small enough to write out by hand: 2 MoE layers of 4 experts, spans of 36 bytes, two deep experts."""

import hashlib
from dataclasses import replace
from pathlib import Path

import xxhash

from expert_store.manifest import (
    Alignment,
    DeepExpert,
    LayerSpec,
    Manifest,
    ModelSpec,
    Source,
    TensorSpec,
    TrunkFile,
    write_manifest,
)
from expert_store.shard import ShardLayout, shard_name

COLUMNS = ((0, 3), (2, 1))
CONFIG = b'{"model_type": "qwen3_moe"}\n'
TENSORS = (TensorSpec("gate_up_proj", "BF16", (4, 3), 0, 24), TensorSpec("down_proj", "BF16", (3, 2), 24, 12))
LAYERS = tuple(LayerSpec(layer, layer + 1, f"model.layers.{layer + 1}.mlp.experts", 36, TENSORS) for layer in range(2))
MODEL = ModelSpec("qwen3_moe", "Qwen3MoeForCausalLM", 2, 4, 2, "BF16")


def span(layer: int, expert: int) -> bytes:
    """The 36 bytes of an expert: they count up from a number that is its own."""
    return bytes(range(100 * layer + 40 * expert % 120, 100 * layer + 40 * expert % 120 + 36))


def add_shard(root: Path, index: int, experts: tuple[int, ...], layers: tuple[LayerSpec, ...] = LAYERS) -> DeepExpert:
    """Write the shard of a deep expert and return its entry."""
    layout = ShardLayout(layers, index, experts)
    spans = [span(layer, expert) for layer, expert in enumerate(experts)]
    content = layout.header + b"".join(spans)
    (root / shard_name(index)).write_bytes(content)
    return DeepExpert(
        index=index,
        file=shard_name(index),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        data_offset=layout.data_offset,
        experts=experts,
        span_hashes=tuple(xxhash.xxh3_64_hexdigest(data) for data in spans),
    )


def write_store(root: Path, columns: tuple[tuple[int, ...], ...] = COLUMNS) -> Manifest:
    """Write a whole store below `root` and return its manifest."""
    for folder in ("experts", "trunk"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "trunk/config.json").write_bytes(CONFIG)
    manifest = Manifest(
        source=Source("tiny", "ab" * 32, "tiny"),
        model=MODEL,
        layers=LAYERS,
        alignment=Alignment("index", {}),
        deep_experts=tuple(add_shard(root, index, experts) for index, experts in enumerate(columns)),
        trunk=(TrunkFile("trunk/config.json", len(CONFIG), hashlib.sha256(CONFIG).hexdigest()),),
    )
    write_manifest(root, manifest)
    return manifest


def grow_store(root: Path, manifest: Manifest, experts: tuple[int, ...]) -> Manifest:
    """Add a deep expert to a store on disk and return the new manifest."""
    deep = add_shard(root, len(manifest.deep_experts), experts)
    grown = replace(manifest, deep_experts=(*manifest.deep_experts, deep))
    write_manifest(root, grown)
    return grown
