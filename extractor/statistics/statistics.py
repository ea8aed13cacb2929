"""Statistics of the experts on known texts, additive per domain, layer and expert, and the cost of a missing share.

Invariant: every total is a sum over tokens and every sample is a bottom-k sample, so the statistics of two runs merge
into those of one run over both texts. A *domain* is a named group of texts. Totals are measured without a mask, since a
mask changes hidden states and so biases demand. The totals follow REAP (router-weighted expert activation pruning).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from extractor.errors import ExtractError
from extractor.statistics.channels import ChannelSquares
from extractor.statistics.sample import KeyedSample

WINDOW_TOKENS = 32
"""Tokens in one window of the usage profiles."""
WINDOWS_PER_DOMAIN = 256
TOKENS_PER_DOMAIN = 2048
MAX_DOMAINS = 1024

TOTALS = (
    "picks",  # times the expert was computed
    "gate_mass",  # Σ g, gates normalised over the token's picks
    "output_norm",  # Σ ‖E(h)‖
    "output_norm_squared",  # Σ ‖E(h)‖²
    "gate_output_norm",  # Σ g ‖E(h)‖
    "residual_change",  # Σ g ‖E(h)‖ (1 − cos(h, h + out)): EASY-EP
    "demand",  # times among the unmasked top-k
    "demand_mass",  # Σ g of those
    "missing",  # times demanded and unavailable
    "missing_mass",  # Σ g of those
)

Float = npt.NDArray[np.float64]


class StatisticsError(ExtractError):
    """The statistics cannot be read, or belong to another checkpoint or shape."""


@dataclass
class PricePoint:
    """The measured cost of a mask on known text.

    Attributes:
        domain: name; deficit: missing share of the router mass; loss_change: nats a token above the unmasked loss.
        num_tokens: number of measured tokens; kept_share: share of the experts that the mask allows.
        part: the measured part of the domain's text (every second sequence), so that one part can be predicted from
            the other; 0 in older files.
        per_layer: deficit of each layer; empty in older files.
        is_wrong: the mask replaced some of the domain's best experts by wrong ones.
    """

    domain: str
    deficit: float
    loss_change: float
    num_tokens: int
    kept_share: float
    part: int = 0
    per_layer: tuple[float, ...] = ()
    is_wrong: bool = False


@dataclass(frozen=True)
class EncodingPoint:
    """The measured cost of an encoding of all experts on known text.

    Attributes:
        domain: name; experts_dtype: see `extractor.encoding.names.MADE`; expert_bytes: size of a deep expert in it.
        loss_change: nats a token above the loss of the experts that were calibrated; num_tokens: measured ones.
    """

    domain: str
    experts_dtype: str
    expert_bytes: int
    loss_change: float
    num_tokens: int


@dataclass
class ExpertStatistics:
    """Statistics of one checkpoint.

    Attributes:
        fingerprint: identifies the source checkpoint; statistics of different checkpoints cannot be merged.
        num_layers, num_experts, top_k: L, E and K.
        expert_bytes: size of a deep expert (one expert of every layer); 0 if unknown.
        trunk_bytes: size of everything else in a store; 0 if unknown.
        domains: names, in the order of the first axis of the totals.
        num_tokens: int64 [D].
        totals: each of `TOTALS`, float64 [D, L, E].
        coactivation: float64 [L-1, E, E], tokens that picked i in layer l and j in layer l+1.
        windows: sample of windows of `WINDOW_TOKENS` tokens; its array "mass" is [W, L, E], gate mass.
        tokens: sample of tokens; "experts" [N, L, K], "gates" and "contributions" (g ‖E(h)‖) [N, L, K].
        price: masked measurements.
        encodings: measurements of encodings.
        weight_flatness: float64 [L, E], mean |w| / rms(w) of the expert's weights, or None (AIMER).
        channels: squares of the experts' inputs by channel, of all domains together; None in older files and where a
            server collected.
    """

    fingerprint: str
    num_layers: int
    num_experts: int
    top_k: int
    expert_bytes: int = 0
    trunk_bytes: int = 0
    domains: list[str] = field(default_factory=list)
    num_tokens: npt.NDArray[np.int64] = field(init=False)
    totals: dict[str, Float] = field(init=False)
    coactivation: Float = field(init=False)
    windows: KeyedSample = field(init=False)
    tokens: KeyedSample = field(init=False)
    price: list[PricePoint] = field(default_factory=list)
    encodings: list[EncodingPoint] = field(default_factory=list)
    weight_flatness: Float | None = None
    channels: ChannelSquares | None = None

    def __post_init__(self) -> None:
        num_domains, num_layers, num_experts = len(self.domains), self.num_layers, self.num_experts
        picks = (num_layers, self.top_k)
        self.num_tokens = np.zeros(num_domains, dtype=np.int64)
        self.totals = {name: np.zeros((num_domains, num_layers, num_experts)) for name in TOTALS}
        self.coactivation = np.zeros((max(num_layers - 1, 0), num_experts, num_experts))
        self.windows = KeyedSample(WINDOWS_PER_DOMAIN, {"mass": ((num_layers, num_experts), np.float16)})
        self.tokens = KeyedSample(
            TOKENS_PER_DOMAIN,
            {"experts": (picks, np.uint16), "gates": (picks, np.float16), "contributions": (picks, np.float16)},
        )

    def domain_index(self, name: str) -> int:
        """The index of a domain; a new domain is added (this lengthens the first axis of the arrays).

        Raises:
            StatisticsError: more domains than `MAX_DOMAINS`.
        """
        if name not in self.domains:
            if len(self.domains) >= MAX_DOMAINS:
                raise StatisticsError(f"there are more than {MAX_DOMAINS} domains: group the texts into fewer")
            self.domains.append(name)
            self.num_tokens = np.append(self.num_tokens, np.int64(0))
            empty = np.zeros((1, self.num_layers, self.num_experts))
            self.totals = {key: np.concatenate([value, empty]) for key, value in self.totals.items()}
        return self.domains.index(name)

    def indices(self, domains: Sequence[str] | None = None) -> list[int]:
        """Indices of the named domains, all of them by default. Raises `StatisticsError` for an unknown name."""
        if domains is None:
            return list(range(len(self.domains)))
        for name in domains:
            if name not in self.domains:
                known = ", ".join(self.domains) or "none"
                raise StatisticsError(f"domain {name!r} is not in the statistics, which have: {known}")
        return [self.domains.index(name) for name in domains]

    def total(self, name: str, domains: Sequence[str] | None = None) -> Float:
        """One total summed over domains (all of them by default), float64 [L, E]. Raises `StatisticsError`."""
        return np.asarray(self.totals[name][self.indices(domains)].sum(axis=0))

    def demand_shares(self, domain: str) -> Float:
        """Each expert's share of its layer's demanded mass in a domain, float64 [L, E]; rows of zeros without text."""
        mass = self.total("demand_mass", [domain])
        sums = mass.sum(axis=1, keepdims=True)
        return np.asarray(np.divide(mass, sums, out=np.zeros_like(mass), where=sums > 0))

    def merge(self, other: ExpertStatistics) -> None:
        """Add other statistics of the same checkpoint to these; domains with the same name are merged.

        Raises:
            StatisticsError: they are of another checkpoint or shape.
        """
        mine = (self.fingerprint, self.num_layers, self.num_experts, self.top_k)
        theirs = (other.fingerprint, other.num_layers, other.num_experts, other.top_k)
        if mine != theirs:
            raise StatisticsError(
                f"statistics of {theirs} cannot be added to statistics of {mine} (checkpoint, layers, experts, top-k): "
                "calibrate both on one checkpoint"
            )
        where = np.array([self.domain_index(name) for name in other.domains], dtype=np.int64)
        if len(where):
            self.num_tokens[where] += other.num_tokens
            for name in TOTALS:
                self.totals[name][where] += other.totals[name]
            for sample, theirs_sample in ((self.windows, other.windows), (self.tokens, other.tokens)):
                sample.offer(theirs_sample.keys, where[theirs_sample.domains], theirs_sample.arrays)
        self.coactivation += other.coactivation
        self.price.extend(other.price)
        self.encodings.extend(other.encodings)
        self.expert_bytes = self.expert_bytes or other.expert_bytes
        self.trunk_bytes = self.trunk_bytes or other.trunk_bytes
        if self.weight_flatness is None:
            self.weight_flatness = other.weight_flatness
        if other.channels is not None:
            self.channels = self.channels or ChannelSquares(self.num_layers, self.num_experts)
            self.channels.add(other.channels)


def merge_all(parts: Iterable[ExpertStatistics]) -> ExpertStatistics:
    """The sum of several statistics of one checkpoint; does not change the parts. Raises `StatisticsError`."""
    merged: ExpertStatistics | None = None
    for part in parts:
        if merged is None:
            merged = ExpertStatistics(part.fingerprint, part.num_layers, part.num_experts, part.top_k)
        merged.merge(part)
    if merged is None:
        raise StatisticsError("there are no statistics to merge: name at least one file")
    return merged
