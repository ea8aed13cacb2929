"""The time of a decode step and of a prompt, as a sum over the parts of a machine's work.

A step = the bytes of the trunk and of the rows' keys and values at the read rate + the experts (bytes in slots at that
rate or codes at the code rate, together with missed bytes at the copy rate) + a fixed time a layer + steps that run
again for the disk. The constants below were read off single measurements of `benchmarks/results` once, and hold for all
settings; docs/fit.md has the table of predictions against measurements that `benchmarks/fit.py` writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from server.fit.facts import ModelFacts
from server.machine.rates import H100_CODE_RATE, MachineRates

# The captured path. Batch 1 of decode_gpu.json and packed_gpu.json, by the stages of its split, on an H100.
PRODUCT_SHARE = 0.85
"""Of the read rate that the products of one row reach: bytes need / adds in docs/performance.md, 0.75 to 1."""
LAYER_SECONDS = 14e-6
"""Of a layer beside its bytes: the latencies of attention (7.2 - 0.7 µs), router (6.1 - 0.2) and the products."""
HEAD_SECONDS = 78e-6
"""Of choosing the token."""
ROW_RATE = 7.7e12
"""Bytes of the trunk a second that products by rows multiply for each further row; they are L1's, not the memory's."""
ROWS_BY_ROWS = 8
"""Most rows of a server whose products go by rows; beyond, tensor cores read weights once for all rows."""
KERNEL_SHARE = 0.945
"""Of the copy engine's rate that a kernel reads page-locked memory with: 51.2 of 54.2 GB/s."""
FETCH_SECONDS = 15e-6
"""Until the first piece of a layer's missing experts has arrived."""
CODES_OF_4_BITS = {"int4": 1.0, "fp4": 0.87, "fp8": 0.77, "int8": 0.77}
"""Rate of converting codes, as a share of that of int4."""
SHARED_CODES = 0.85
"""Time of converting an expert's codes for each further row that it serves in a step, as a share of the first one's."""

# The disk under the captured path, disk_gpu.json: a step without an expert runs again.
AGAIN_SECONDS = 17e-3
"""Of the report, the wait and the launch of a step that runs again, beside the step."""

# The host-driven path on a GPU, decode_gpu.json and serve_gpu.json: the host launches every operation.
HOST_LAYER_OPERATIONS = 1300
"""Time of one layer of a decode step beside its products, in small operations of torch: most of it is Python's."""
HOST_ROW_OPERATIONS = 200
"""The same of each further row, whose attention and experts are computed by themselves."""
GPU_LAYER_OPERATIONS = 45
"""Launches of one layer; each takes as long as the host needs for it."""
HOST_MISS_SECONDS = 1e-3
"""That the host adds for each expert that it copies to a GPU."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of the parts of a step or of a prompt; their sum is its time."""

    trunk: float
    attention: float
    experts: float
    copies: float
    layers: float
    disk: float

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return self.trunk + self.attention + self.experts + self.copies + self.layers + self.disk


@dataclass(frozen=True)
class Misses:
    """Experts of a step: `distinct` and `picks` of a layer that it needs, shares of the distinct ones found in `slots`,
    and read from the disk."""

    distinct: float
    picks: float
    in_slots: float
    on_disk: float


def captured_step(
    model: ModelFacts, rates: MachineRates, misses: Misses, num_rows: int, max_rows: int, depth: int
) -> StepTime:
    """A decode step of `num_rows` rows of `depth` tokens on the captured path of a server for `max_rows`."""
    num_moe, span = len(model.layers), model.span_bytes
    rate = PRODUCT_SHARE * rates.read_rate
    trunk = model.step_bytes / rate
    if max_rows <= ROWS_BY_ROWS:
        trunk += (num_rows - 1) * model.step_bytes / (ROW_RATE * _processors(rates))
    attention = num_rows * depth * model.kv_bytes / rate
    experts = num_moe * misses.distinct * span / rate
    if model.codes is not None:
        conversions = misses.distinct + SHARED_CODES * (misses.picks - misses.distinct)
        codes = num_moe * conversions * model.expert_values
        experts = max(experts, codes / (rates.code_rate * CODES_OF_4_BITS[model.codes]))
    missed = misses.distinct * (1.0 - misses.in_slots)
    none_missed = math.exp(-missed)
    copied = num_moe * missed * span / (KERNEL_SHARE * rates.copy_rate)
    copies = max(copied + num_moe * (1 - none_missed) * FETCH_SECONDS - experts * (1 - none_missed), 0.0)
    layers = model.num_layers * LAYER_SECONDS + HEAD_SECONDS
    seconds = trunk + attention + experts + copies + layers
    reads = num_moe * misses.distinct * misses.on_disk
    return StepTime(trunk, attention, experts, copies, layers, disk_seconds(reads, span, rates, seconds))


def _processors(rates: MachineRates) -> float:
    """Of the GPU, as a share of an H100's, by its rate of converting codes."""
    return rates.code_rate / H100_CODE_RATE


def disk_seconds(reads: float, span_bytes: float, rates: MachineRates, step_seconds: float) -> float:
    """Seconds that a step of the captured path takes longer for so many experts that it reads from the disk: their
    bytes, and the steps that run again for them."""
    runs = 1.0 - math.exp(-reads) + 0.06 * reads
    return reads * span_bytes / rates.disk_rate + runs * (AGAIN_SECONDS + step_seconds)


def host_step(model: ModelFacts, rates: MachineRates, misses: Misses, num_rows: int, depth: int) -> StepTime:
    """A decode step of `num_rows` rows of `depth` tokens on the host-driven path."""
    num_moe, span = len(model.layers), model.span_bytes
    needed = num_moe * misses.distinct
    missed = needed * (1.0 - misses.in_slots)
    trunk = model.step_bytes / rates.read_rate
    attention = num_rows * depth * model.kv_bytes / rates.read_rate
    experts = needed * span / rates.expert_rate
    if model.codes is not None:
        experts = max(needed * span / rates.read_rate, num_moe * misses.picks * model.expert_values / rates.code_rate)
    copies = missed * span / rates.copy_rate
    operations = HOST_LAYER_OPERATIONS + (num_rows - 1) * HOST_ROW_OPERATIONS
    if rates.kind == "gpu":
        operations = GPU_LAYER_OPERATIONS
        copies += missed * HOST_MISS_SECONDS
    layers = model.num_layers * operations * rates.operation_seconds
    disk = needed * misses.on_disk * span / rates.disk_rate
    return StepTime(trunk, attention, experts, copies, layers, disk)


# Prompts. decode_gpu.json: 2,048 tokens at once take 134.6 ms with all in slots (48 layers), 820 ms for 43.5 GB missed;
# packed_gpu.json: 4,608 spans of 2.6 MB take 439 to 686 ms, where their bytes need 231.
PROMPT_LAYER_SECONDS = 2.8e-3
"""Of a layer of a prompt's chunk on a GPU, whose operations the host launches one by one at 60 µs each."""
PROMPT_LAYER_OPERATIONS = PROMPT_LAYER_SECONDS / 6e-5
SPAN_COPY_SECONDS = 95e-6
"""That the host needs to enqueue the copy of one span; hidden behind spans that take longer to copy."""
PROMPT_SHARE, CODES_PROMPT_SHARE = 0.65, 0.42
"""Of the product rate that a prompt reaches on a CPU with experts in 16 bits, and in codes, which become float32 in
blocks: 716 and 1,103 ms for 256 tokens of 46 GFLOP at 100 GFLOP a second (fit.json)."""
AHEAD_PICKS = 12
"""Picks for each expert from which a chunk on the captured path streams all missing experts, chosen or not."""


def prompt_seconds(
    model: ModelFacts, rates: MachineRates, slots: int, num_tokens: int, chunk: int, disk_share: float = 0.0
) -> float:
    """Seconds until a prompt of `num_tokens` is computed, in chunks of at most `chunk`, with `slots` in each layer.

    Of the experts that are not in slots, `disk_share` come from the disk, and the others from host memory.
    """
    total = 0.0
    for first in range(0, num_tokens, chunk):
        total += _chunk_seconds(model, rates, slots, min(chunk, num_tokens - first), disk_share)
    return total


def _chunk_seconds(model: ModelFacts, rates: MachineRates, slots: int, num_tokens: int, disk_share: float) -> float:
    num_moe, available = len(model.layers), model.num_available
    streams = rates.kind == "gpu" and num_tokens * model.top_k >= AHEAD_PICKS * model.num_experts
    distinct = float(available) if streams else min(float(available), model.demand.distinct(num_tokens))
    missed = num_moe * distinct * (1.0 - min(1.0, slots / available))
    operations = (
        2 * num_tokens * (model.step_bytes / model.dtype.itemsize + num_moe * model.top_k * model.expert_values)
    )
    compute = operations / rates.product_rate
    read = (model.step_bytes + num_moe * distinct * model.span_bytes) / rates.read_rate
    copies = missed * model.span_bytes / rates.copy_rate
    disk = disk_share * missed * model.span_bytes / rates.disk_rate
    if rates.kind == "gpu":
        launches = model.num_layers * PROMPT_LAYER_OPERATIONS * rates.operation_seconds
        return max(launches, compute, read, copies, disk, missed * SPAN_COPY_SECONDS)
    compute /= PROMPT_SHARE if model.codes is None else CODES_PROMPT_SHARE
    return max(compute, read) + copies + disk + model.num_layers * HOST_LAYER_OPERATIONS * rates.operation_seconds
