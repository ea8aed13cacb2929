"""The settings of a cluster: the table `[cluster]` of a settings file, beside the tables of `deepfew serve`.

Invariant: the same file without that table serves one replica with `deepfew serve --config FILE`.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from server.errors import SettingsError
from server.settings.load import load_settings
from server.settings.schema import HttpSettings, LogSettings, Seconds, Section, Settings

TABLE = "cluster"
GROWTH_KEYS = ("grow_interval_seconds", "grow_min_share", "grow_step", "grow_replace")
ONE_VALUE = {"http": HttpSettings.model_fields, "log": LogSettings.model_fields, "growth": GROWTH_KEYS}
"""The settings that a cluster has once, by section: fronts, logs and the process that grows the stores read them."""


class PartSettings(Section):
    """Replicas that serve the same part of a checkpoint."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$", description="name of the part")
    replicas: Annotated[int, Field(ge=1)] = Field(1, description="replicas of this part")
    profiles: tuple[str, ...] = Field((), description="profiles whose requests come here")
    settings: Mapping[str, Any] = Field(
        {}, description="settings that differ from the file's, such as store or experts"
    )


class ClusterSettings(Section):
    """Replicas, the resources of each, and the age of what is known of them."""

    replicas: Annotated[int, Field(ge=1)] = Field(2, description="replicas, where no parts are named")
    parts: tuple[PartSettings, ...] = Field(
        (), description="parts; requests without a profile go to the first with all experts, or with the most"
    )
    own_stores: Path | None = Field(
        None,
        description="folder in which each replica has a store of its own, at first a copy of its part's, so that the "
        "replicas' stores can grow apart",
    )
    fronts: Annotated[int, Field(ge=1)] = Field(1, description="processes that take requests and choose replicas")
    gpus_per_replica: Annotated[float, Field(ge=0)] = Field(0.0, description="GPUs of each replica, 1 on a GPU machine")
    cpus_per_replica: Annotated[float, Field(gt=0)] = Field(1.0, description="cores of each replica")
    statistics_seconds: Seconds = Field(2.0, description="interval of the statistics of a replica")
    wait_seconds: Seconds = Field(30.0, description="time a request waits for a replica to take it before 503")


class Part(Section):
    """A part with all of its settings."""

    name: str
    replicas: int
    profiles: tuple[str, ...]
    settings: Settings


def read_cluster(path: Path, environ: Mapping[str, str] | None = None) -> tuple[ClusterSettings, tuple[Part, ...]]:
    """The cluster's settings and its parts, at least one.

    Raises:
        SettingsError: the file cannot be read, or a key or a value is wrong.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get(TABLE, {})
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the cluster's settings from {path}: {error}") from error
    try:
        cluster = ClusterSettings.model_validate(table)
    except ValidationError as error:
        problems = [
            f"{'.'.join([TABLE, *map(str, problem['loc'])])}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_input=False, include_url=False)
        ]
        raise SettingsError(f"{path}: {'; '.join(problems)}") from error
    asked = cluster.parts or (PartSettings(name="all", replicas=cluster.replicas),)
    if len({part.name for part in asked}) < len(asked):
        raise SettingsError(f"{path}: two parts of {TABLE}.parts have one name; give each its own")
    profiles = Counter(profile for part in asked for profile in set(part.profiles))
    if shared := [profile for profile, count in profiles.items() if count > 1]:
        raise SettingsError(f"{path}: profile {shared[0]!r} is in two parts of {TABLE}.parts; name it in one")
    parts = []
    for part in asked:
        settings = load_settings(part.settings, config=path, environ=environ, other_tables={TABLE}).settings
        parts.append(Part(name=part.name, replicas=part.replicas, profiles=part.profiles, settings=settings))
    _check_one_value(path, parts)
    return cluster, tuple(parts)


def _check_one_value(path: Path, parts: Sequence[Part]) -> None:
    """Raise SettingsError for a setting that the cluster has once and its parts give differently."""
    for section, keys in ONE_VALUE.items():
        for key in keys:
            values = [getattr(getattr(part.settings, section), key) for part in parts]
            other = next((at for at, value in enumerate(values) if value != values[0]), None)
            if other is not None:
                raise SettingsError(
                    f"{path}: {section}.{key} is {values[0]} in the part {parts[0].name} and {values[other]} in "
                    f"{parts[other].name}, but a cluster has one: give it in the table [{section}], not in a part"
                )
