"""Options and tile sizes of a captured step; each of them changes the captured code.

Tile sizes change only the speed of a step and the order of its sums. They do not depend on the batch size. Source:
docs/performance.md, with the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, field


def pow2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def divisor(n: int, most: int) -> int:
    """The largest power of two that divides n, at most `most`."""
    return min(n & -n, most)


@dataclass(frozen=True)
class Tuning:
    """Tile sizes; the defaults are the fastest on an H100, those named packed for experts in 4 bits, the others for
    weights of 2 bytes (docs/performance.md)."""

    qkv_rows: int = 8
    output_rows: int = 4
    head_rows: int = 8
    gate_rows: int = 2
    up_rows: int = 4
    down_rows: int = 4
    down_columns: int = 2048
    packed_up_rows: int = 2
    packed_down_rows: int = 1
    tile_tokens: int = 8
    tile_stages: int = 2
    tile_up_rows: int = 8
    tile_up_words: int = 32
    tile_up_splits: int = 4
    tile_up_programs: int = 2112
    tile_down_rows: int = 16
    tile_down_words: int = 32
    tile_down_splits: int = 1
    tile_down_warps: int = 1
    tile_down_programs: int = 4224
    product_warps: int = 4
    tiled_rows: int = 32
    tiled_bytes: int = 512
    tiled_stages: int = 4
    up_warps: int = 4
    down_warps: int = 4
    route_warps: int = 2
    delta_values: int = 32
    delta_warps: int = 4
    attention_splits: int = 16
    attention_tile: int = 64
    latent_columns: int = 64
    latent_rows: int = 32
    latent_splits: int = 32
    latent_tile: int = 32
    latent_warps: int = 4
    fetchers: int = 64
    packed_fetchers: int = 256
    copy_elements: int = 16384
    down_fetches: bool = True


@dataclass(frozen=True)
class StepOptions:
    """Options of a captured step.

    Attributes:
        pdl: kernels are launched while the kernels before them still run (see `kernels`).
        masked: each row's mask and temperature are read.
        adapted: each row's adapter is read; only masked steps may be.
        resident_bias: lambda of cache-aware routing, 0: off.
        batch_invariant: a row's bits do not depend on the batch. Otherwise steps of several rows use tensor cores, and
            those of one row do not.
    """

    pdl: bool = False
    masked: bool = False
    adapted: bool = False
    resident_bias: float = 0.0
    batch_invariant: bool = True
    tuning: Tuning = field(default_factory=Tuning)
