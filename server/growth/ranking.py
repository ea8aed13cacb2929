"""The deep experts that a store should get next, and those that it needs least, ranked by demand.

The router scores every expert, so the demand for experts that the store lacks is known exactly. Without statistics
their output norm is unknown; the layer's median replaces it. Invariant: a candidate is one deep expert, made of the
best missing expert of every layer, since a store holds only whole deep experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from expert_store.manifest import DeepExpert, Manifest, read_manifest
from extractor.statistics.statistics import ExpertStatistics
from router.ledger import UsageLedger
from router.mask import ExpertMask
from server.growth.status import Candidate, GrowthError, NothingToGrowError

Float = npt.NDArray[np.float64]

NOTHING_LEFT = (
    "there is no deep expert to add: the store has every expert, or its byte budget holds no more; raise the budget, "
    "or remove deep experts first"
)


def expected_norms(statistics: ExpertStatistics | None, available: npt.NDArray[np.bool_]) -> Float:
    """Mean output norm of each expert, float64 [L, E]: the measured one, else the layer's median, else 1."""
    if statistics is None:
        return np.ones(available.shape)
    picks, norms = statistics.total("picks"), statistics.total("output_norm")
    is_known = (picks > 0) & (norms > 0)  # statistics of captured graphs have picks alone
    means: Float = np.divide(norms, picks, out=np.full(picks.shape, np.nan), where=is_known)
    for row in means:
        row[np.isnan(row)] = np.nanmedian(row) if np.isfinite(row).any() else 1.0
    return means


def rank_missing(
    available: npt.NDArray[np.bool_],
    demand_mass: Float,
    num_bytes: int,
    statistics: ExpertStatistics | None = None,
) -> list[Candidate]:
    """Deep experts that the store lacks, best first; an empty list if it has all.

    Args:
        available, demand_mass: [L, E], the experts of the store, and the mass that the unmasked router demanded.
        num_bytes: size of a deep expert.
    """
    missing = np.where(available, 0.0, demand_mass)
    worth = np.where(available, -np.inf, missing * expected_norms(statistics, available))
    order = np.argsort(-worth, axis=1, kind="stable")
    layers = np.arange(len(available))
    demanded = max(float(demand_mass.sum()), np.finfo(np.float64).tiny)
    candidates = []
    for place in range(int((~available).sum(axis=1).min())):
        experts = order[:, place]
        candidates.append(
            Candidate(
                experts=tuple(int(expert) for expert in experts),
                score=float(worth[layers, experts].sum()) / max(num_bytes, 1),
                missing_share=float(missing[layers, experts].sum()) / demanded,
                num_bytes=num_bytes,
            )
        )
    return candidates


def score_held(
    manifest: Manifest, demand_mass: Float, statistics: ExpertStatistics | None = None
) -> list[tuple[float, DeepExpert]]:
    """The deep experts of a store, each with its score as if it were a candidate, lowest first."""
    worth = demand_mass * expected_norms(statistics, demand_mass > 0)
    layers, num_bytes = np.arange(len(worth)), max(deep_expert_bytes(manifest), 1)
    scored = [(float(worth[layers, list(deep.experts)].sum()) / num_bytes, deep) for deep in manifest.deep_experts]
    return sorted(scored, key=lambda one: (one[0], -one[1].index))


def rank_held(manifest: Manifest, demand_mass: Float, statistics: ExpertStatistics | None = None) -> list[DeepExpert]:
    """The deep experts of a store by demanded mass × expected output norm, lowest first."""
    return [deep for _, deep in score_held(manifest, demand_mass, statistics)]


def check_masks(
    left: Manifest,
    available: npt.NDArray[np.bool_],
    served: ExpertMask | None,
    profiles: Mapping[str, ExpertMask],
) -> None:
    """Check that the masks over a store still have enough experts after it has shrunk.

    Args:
        left: the manifest after it has shrunk.
        available: [L, E], the experts that the store has now.
        served: the mask of the server; None is all of the store.
        profiles: masks that requests may name.

    Raises:
        GrowthError: a layer would have fewer than top-k experts within `served`, or none within a profile.
    """
    model = left.model
    kept = np.zeros(available.shape, dtype=np.bool_)
    for deep in left.deep_experts:
        kept[np.arange(model.num_layers), list(deep.experts)] = True
    if served is not None:
        fewest, before = (int((held & served.allowed).sum(axis=1).min()) for held in (kept, available))
        if fewest < min(model.top_k, before):
            raise GrowthError(
                f"the server's mask would be left with {fewest} experts of a layer, and every token wants "
                f"{model.top_k}: remove others"
            )
    for name, profile in profiles.items():
        empty = np.flatnonzero(~(kept & profile.allowed).any(axis=1))
        if empty.size:
            raise GrowthError(
                f"the profile {name} would be left with no expert of layer {empty[0]}, wanted at least 1: remove others"
            )


def within_budget(ranked: list[Candidate], manifest: Manifest, budget_bytes: int | None) -> list[Candidate]:
    """The first candidates that fit into the budget beside the store's shards."""
    if budget_bytes is None or not ranked:
        return ranked
    held = sum(deep.bytes for deep in manifest.deep_experts)
    return ranked[: max(0, (budget_bytes - held) // max(ranked[0].num_bytes, 1))]


def deep_expert_bytes(manifest: Manifest) -> int:
    """Bytes of the experts of one shard, without its header."""
    return sum(spec.span_bytes for spec in manifest.layers)


def usage_of(manifest: Manifest, usage: Path) -> UsageLedger:
    """The demand that a usage file recorded for the checkpoint of a store.

    Raises:
        GrowthError: it records no demand, or is of another checkpoint. LedgerError, OSError: no usage file.
    """
    try:
        ledger = UsageLedger.load(usage)
    except FileNotFoundError:
        raise GrowthError(
            f"{usage} does not exist, so no demand is known: serve the store, which writes it, or name a usage file"
        ) from None
    if ledger.fingerprint != manifest.source.fingerprint:
        raise GrowthError(
            f"{usage} is of checkpoint {ledger.fingerprint}, the store of {manifest.source.fingerprint}: name "
            "the usage file of this store"
        )
    return ledger


def wanted_growth(
    store: Path, usage: Path, statistics: ExpertStatistics | None, budget_bytes: int | None, count: int
) -> tuple[list[Candidate], str]:
    """The `count` best candidates of a store on disk by its usage file, and the location of its checkpoint.

    Raises:
        GrowthError: there is no candidate, or the usage is of another checkpoint.
        LedgerError: no usage file. StoreError: no store.
    """
    manifest = read_manifest(store)
    ledger = usage_of(manifest, usage)
    available = np.zeros(ledger.demand_mass.shape, dtype=np.bool_)
    for deep in manifest.deep_experts:
        available[np.arange(len(deep.experts)), list(deep.experts)] = True
    ranked = rank_missing(available, ledger.demand_mass, deep_expert_bytes(manifest), statistics)
    chosen = within_budget(ranked, manifest, budget_bytes)[:count]
    if not chosen:
        raise NothingToGrowError(NOTHING_LEFT)
    return chosen, manifest.source.location
