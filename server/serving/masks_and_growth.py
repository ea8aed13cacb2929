"""Masks for requests and growth of the store, made from the settings.

Invariant: profiles are read before the model is loaded, so that a wrong path is reported at once. Masks and growth are
bound to the engine once it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from expert_store.store import Store
from extractor.statistics.statistics import ExpertStatistics, StatisticsError
from router.mask import ExpertMask
from server.growth.ranking import deep_expert_bytes
from server.masks.domain_prior import DomainPrior
from server.masks.masking import RequestMasks
from server.masks.profiles import load_profiles, profile_files
from server.settings.schema import Settings

if TYPE_CHECKING:
    from server.engine.engine import Engine
    from server.growth.grower import Grower

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MasksAndGrowth:
    """The masks and the statistics that the settings name.

    Attributes:
        profiles: masks by name.
        statistics: of calibration; None where nothing was calibrated.
        served: the mask that the server was started with; None is all of the store.
    """

    profiles: Mapping[str, ExpertMask]
    statistics: ExpertStatistics | None
    served: ExpertMask | None

    @classmethod
    def read(
        cls, settings: Settings, store: Store, served: ExpertMask | None, statistics: ExpertStatistics | None
    ) -> MasksAndGrowth:
        """Read the profiles that the settings name.

        Raises:
            ProfileError, SelectionError, MaskError: see `load_profiles`.
        """
        files = profile_files(settings.masks.profiles) if settings.masks.profiles else []
        available = ExpertMask.of(store.available)
        return cls(load_profiles(files, available if served is None else served), statistics, served)

    def masks(self, engine: Engine) -> RequestMasks:
        """Masks for requests of a running engine."""
        spec, routing = engine.runner.model.store.manifest.model, engine.runner.model.routing
        has_usage = self.statistics is not None and bool(self.statistics.domains)
        prior = DomainPrior.of(self.statistics) if self.statistics is not None and has_usage else None
        return RequestMasks(self.profiles, spec.num_layers, spec.num_experts, prior, available=lambda: routing.mask)

    def grower(self, engine: Engine, settings: Settings) -> Grower:
        """The object that changes the store of a running engine."""
        from extractor.checkpoint.source import attach_source
        from server.growth.demand import RecentDemand
        from server.growth.grower import Grower
        from server.growth.store import adopt

        store, growth = engine.runner.model.store, settings.growth
        everything = deep_expert_bytes(store.manifest) * store.manifest.model.num_experts

        def find_source() -> None:
            if not store.has_source:
                engine.runner.model.source_problem = attach_source(store, growth.grow_from)

        recent = RecentDemand(lambda: np.array(engine.ledger.demand_mass), growth.grow_interval_seconds)
        grower = Grower(
            store,
            growth.grow_from or store.manifest.source.location,
            recent.snapshot,
            lambda action: engine.between_steps(action).result(),
            lambda: adopt(engine.runner, self.served),
            budget_bytes=None if growth.grow_budget is None else growth.grow_budget.resolve(everything),
            statistics=_sizes_of_outputs(self.statistics, store),
            served=self.served,
            profiles=self.profiles,
            find_source=find_source,
        )
        recent.start(grower.stopping)
        return grower

    def start_growing(self, grower: Grower, settings: Settings) -> None:
        """Start the growth without commands, if the settings give a budget."""
        growth = settings.growth
        if growth.grow_budget is None:
            return
        from server.growth.automatic import AutoGrower

        AutoGrower(
            grower,
            interval_seconds=growth.grow_interval_seconds,
            min_share=growth.grow_min_share,
            step=growth.grow_step,
            replace=growth.grow_replace,
        ).start()


def _sizes_of_outputs(calibrated: ExpertStatistics | None, store: Store) -> ExpertStatistics | None:
    """Statistics of the experts' outputs: from calibration, else from what was served before this start."""
    if calibrated is not None:
        return calibrated
    from server.engine.snapshots import served_statistics

    try:
        return served_statistics(store.path, store.manifest.source.fingerprint)
    except (StatisticsError, OSError) as error:  # the collector sets such a file aside
        log.warning("growth goes by what is wanted alone: %s", error)
        return None
