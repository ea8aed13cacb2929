"""Draws docs/figures/decode_gpu.png from benchmarks/results/decode_gpu.json: step times against the machine's own
ceilings.

Left: resident steps, bytes read against time, with the line of the measured read rate. Middle: where a batch-1 step's
microseconds go, per layer, beside what each stage's bytes need at that rate. Right: paged steps, missed bytes against
time, with the line of the measured copy rate and 1.2 times it.
"""

from __future__ import annotations

import json
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.gpu.decode import QWEN
from benchmarks.harness.reporting import REPOSITORY, RESULTS


def main() -> None:
    result: dict[str, Any] = json.loads((RESULTS / "decode_gpu.json").read_text())
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    read_rate, copy_rate = result["machine"]["read_rate"], result["machine"]["copy_rate"]
    _resident(left, result["resident"], read_rate)
    _split(middle, result["split"]["batch 1"], read_rate)
    _paging(right, result["paging_recorded"] + result["paging_synthetic"], copy_rate)
    figure.suptitle(f"{result['environment']['device_name']}, bf16")
    path = REPOSITORY / "docs" / "figures" / "decode_gpu.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"drew {path.relative_to(REPOSITORY)}")


def _resident(axes: Any, rows: list[dict[str, Any]], read_rate: float) -> None:
    gigabytes = [row["floor_ms"] * read_rate / 1e12 for row in rows]
    span = np.array([0.0, 58.0])
    axes.plot(span, span / read_rate * 1e12, "k-", label=f"read rate, {read_rate / 1e12:.2f} TB/s")
    axes.plot(span, 1.5 * span / read_rate * 1e12, "k:", label="1.5 times that")
    axes.plot(gigabytes, [row["step_ms"] for row in rows], "o", label="measured")
    for row, x in zip(rows, gigabytes, strict=True):
        label = f"batch {row['batch']}: {row['step_ms']:.2f} ms"
        axes.annotate(label, (x, row["step_ms"]), textcoords="offset points", xytext=(8, -10))
    axes.set(xlabel="GB read in a step", ylabel="ms a step", title="every expert in a slot")
    axes.set_xlim(0.0, 75.0)
    axes.legend(loc="upper left")


def _split(axes: Any, split: dict[str, float], read_rate: float) -> None:
    expert = QWEN.hidden * QWEN.intermediate * 2 * QWEN.top_k
    width = QWEN.num_heads * QWEN.head_dim
    need = {
        "qkv": QWEN.qkv * QWEN.hidden * 2,
        "attention": 2 * 1024 * QWEN.num_kv_heads * QWEN.head_dim * 2,
        "output": QWEN.hidden * width * 2,
        "route": QWEN.num_experts * QWEN.hidden * 2,
        "gate_up": 2 * expert,
        "down": expert,
    }
    at = np.arange(len(need))
    axes.bar(at - 0.2, [1e3 * split[stage] / QWEN.num_layers for stage in need], 0.4, label="adds to the step")
    axes.bar(at + 0.2, [need[stage] / read_rate * 1e6 for stage in need], 0.4, label="its bytes at the read rate")
    axes.set_xticks(at, list(need))
    axes.set(ylabel="µs a layer", title=f"batch 1, {split['whole']:.2f} ms a token")
    axes.legend()


def _paging(axes: Any, rows: list[dict[str, Any]], copy_rate: float) -> None:
    most = max(row["missed_bytes"] for row in rows) / 1e9
    span = np.array([0.0, 1.05 * most])
    axes.plot(span, span / copy_rate * 1e12, "k-", label=f"copy rate, {copy_rate / 1e9:.1f} GB/s")
    axes.plot(span, 1.2 * span / copy_rate * 1e12, "k:", label="1.2 times that")
    for trace in dict.fromkeys(row["trace"] for row in rows):
        mine = [row for row in rows if row["trace"] == trace]
        axes.plot([row["missed_bytes"] / 1e9 for row in mine], [row["step_ms"] for row in mine], "o", label=trace)
    axes.set(xlabel="GB missed in a step", ylabel="ms a step", title="12.5, 25 and 50 % of the experts in slots")
    axes.legend()


if __name__ == "__main__":
    main()
