"""A summary of a store, for people and for programs.

Invariant: reads the manifest and the sizes of the files it names, nothing else; needs neither torch nor transformers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from expert_store.manifest import DTYPE_BYTES, Manifest, expert_bits, expert_encodings, format_ids, read_manifest
from extractor.planning.sizes import format_size


def store_summary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The store at `path` as a JSON object. Raises ManifestError."""
    root = Path(path)
    manifest = read_manifest(root)
    model = manifest.model
    shard_bytes = sum(deep.bytes for deep in manifest.deep_experts)
    trunk_bytes = sum(file.bytes for file in manifest.trunk)
    return {
        "store": str(root),
        "source": {
            "name": manifest.source.name,
            "fingerprint": manifest.source.fingerprint,
            "location": manifest.source.location,
        },
        "family": model.family,
        "architecture": model.architecture,
        "num_layers": model.num_layers,
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "dtype": model.dtype,
        "span_bytes": [spec.span_bytes for spec in manifest.layers],
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "encoding": None if tensor.encoding is None else asdict(tensor.encoding),
                "bits": tensor.bits,
            }
            for tensor in manifest.layers[0].tensors
        ],
        "encodings": expert_encodings(manifest.layers),
        "made": None if manifest.made is None else asdict(manifest.made),
        "trained": None if manifest.trained is None else asdict(manifest.trained),
        "expert_bits": expert_bits(manifest.layers),
        "trunk_bits": 8 * DTYPE_BYTES[model.dtype],
        "trunk_dtype": manifest.trunk_dtype,
        "alignment": manifest.alignment.kind,
        "num_deep_experts": len(manifest.deep_experts),
        "deep_experts": [
            {"index": deep.index, "file": deep.file, "bytes": deep.bytes, "experts": list(deep.experts)}
            for deep in manifest.deep_experts
        ],
        "absent_experts": [list(ids) for ids in manifest.absent_experts],
        "shard_bytes": shard_bytes,
        "trunk_bytes": trunk_bytes,
        "total_bytes": shard_bytes + trunk_bytes,
        "adapters": [{"name": one.name, "file": one.file, "bytes": one.bytes} for one in manifest.adapters],
        "damaged_files": _damaged(root, manifest),
    }


def print_summary(summary: dict[str, Any]) -> None:
    """Print a summary, a line for each thing. A terminal may wrap them; nothing else does."""
    layers, held, every = summary["num_layers"], summary["num_deep_experts"], summary["num_experts"]
    span = max(summary["span_bytes"])
    tensors = ", ".join(
        f"{item['name']} {item['shape']} {summary['encodings'].get(item['name'], item['dtype'])}"
        for item in summary["tensors"]
    )
    rows = [
        ("store", summary["store"]),
        ("checkpoint", f"{summary['source']['name']} ({summary['source']['fingerprint'][:12]})"),
        ("model", f"{summary['architecture']}, {layers} MoE layers of {every} experts, top-{summary['top_k']}"),
        ("one expert", f"{format_size(span)} a layer: {tensors}"),
        ("bits a weight", f"{summary['expert_bits']:.4g} of the experts, {_trunk_bits(summary)} of the trunk"),
        *([] if summary["made"] is None else [("made", _made(summary["made"]))]),
        *([] if summary["trained"] is None else [("trained", _trained(summary["trained"]))]),
        ("deep experts", f"{held} of {every}, {format_size(summary['shard_bytes'] / held)} each"),
        ("alignment", summary["alignment"]),
        ("experts", _per_layer(summary)),
        ("on disk", f"{format_size(summary['total_bytes'])}, of it {format_size(summary['trunk_bytes'])} trunk"),
        *([("adapters", ", ".join(one["name"] for one in summary["adapters"]))] if summary["adapters"] else []),
        ("files", _files(summary["damaged_files"])),
    ]
    console = Console(highlight=False, soft_wrap=True)
    for name, value in rows:
        for number, line in enumerate(value.split("\n")):
            console.print(Text(("" if number else name).ljust(15), style="bold") + Text(line, style="not bold"))


def _made(made: dict[str, Any]) -> str:
    weights = "weighted by statistics" if made["statistics"] else "by weight error alone"
    return f"{made['experts_dtype']} by deepfew, errors {weights}"


def _trunk_bits(summary: dict[str, Any]) -> str:
    bits = str(summary["trunk_bits"])
    return bits if summary["trunk_dtype"] is None else f"8 (linear layers in FP8) or {bits}"


def _trained(trained: dict[str, Any]) -> str:
    return (
        f"the experts, on {trained['tokens']:,} tokens, with the adapter {trained['adapter']}; they were those of "
        f"checkpoint {trained['fingerprint'][:12]}"
    )


def _per_layer(summary: dict[str, Any]) -> str:
    """The ids that the store holds: once if all layers have the same, else for every layer."""
    every = set(range(summary["num_experts"]))
    held = [format_ids(sorted(every - set(absent))) for absent in summary["absent_experts"]]
    if len(set(held)) == 1:
        return f"{held[0]} in every layer"
    return "\n".join(f"layer {layer}: {ids}" for layer, ids in enumerate(held))


def _files(damaged: list[str]) -> str:
    if not damaged:
        return "all there, with their sizes (deepfew verify reads them)"
    return (
        f"missing or of the wrong size: {', '.join(damaged[:5])}{', …' * (len(damaged) > 5)}; extract again to repair"
    )


def _damaged(root: Path, manifest: Manifest) -> list[str]:
    sizes: Iterable[tuple[str, int]] = [
        *((deep.file, deep.bytes) for deep in manifest.deep_experts),
        *((file.name, file.bytes) for file in manifest.trunk),
        *((adapter.file, adapter.bytes) for adapter in manifest.adapters),
    ]
    return [name for name, size in sizes if not (root / name).is_file() or (root / name).stat().st_size != size]
