"""Profiles: named masks that were made beforehand, each from a plan file.

Invariant: a profile is the same mask for every request; the server serves of it what is available at that moment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from extractor.planning.plan import Plan, read_plan
from extractor.planning.planner import allowed_by
from router.errors import MaskError
from router.mask import ExpertMask
from server.errors import ServerError

MAX_PROFILES = 256
_PROFILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ProfileError(ServerError):
    """A profile or a pool that does not exist, or that does not fit the model."""


def mask_of_plan(plan: Plan, num_layers: int, num_experts: int) -> ExpertMask:
    """The experts that a plan's deep experts consist of.

    Raises:
        ProfileError: the plan is for another shape.
    """
    if (plan.num_layers, plan.num_experts) != (num_layers, num_experts):
        raise ProfileError(
            f"the plan is for {plan.num_layers} layers of {plan.num_experts} experts, the model has {num_layers} of "
            f"{num_experts}: make a plan for this checkpoint"
        )
    return ExpertMask(allowed_by(np.array([deep.experts for deep in plan.deep_experts]), num_experts))


def profile_files(text: str) -> list[Path]:
    """Plan files from a list such as ``code.json,plans/``: a folder stands for its files that end in .json.

    Raises:
        ProfileError: a path that does not exist.
    """
    files: list[Path] = []
    for part in (Path(part.strip()) for part in text.split(",") if part.strip()):
        if not part.exists():
            raise ProfileError(
                f"profiles: {part} does not exist; name plan files, or folders of them, joined by commas"
            )
        files += sorted(part.glob("*.json")) if part.is_dir() else [part]
    return files


def load_profiles(files: Iterable[Path], available: ExpertMask) -> Mapping[str, ExpertMask]:
    """Masks from plan files, by the names of the files. Experts of them that are not available may become so later.

    Raises:
        ProfileError: a plan for another shape, a file name that cannot name a profile, one name twice, or too many.
        SelectionError: a file that is not a plan.
        MaskError: no expert of some layer is available.
    """
    profiles: dict[str, ExpertMask] = {}
    num_layers, num_experts = available.allowed.shape
    for file in files:
        if not _PROFILE_NAME.fullmatch(file.stem):
            raise ProfileError(
                f"{file}: a profile's name has 1 to 64 letters, digits, '.', '_' and '-': rename the file"
            )
        if file.stem in profiles:
            raise ProfileError(f"two profiles are called {file.stem!r}: rename {file}")
        if len(profiles) >= MAX_PROFILES:
            raise ProfileError(f"there are more than {MAX_PROFILES} profiles: leave some out")
        mask = mask_of_plan(read_plan(file), num_layers, num_experts)
        try:
            mask & available
        except MaskError as error:
            raise MaskError(f"the profile {file}: {error}") from error
        profiles[file.stem] = mask
    return profiles


def find_profile(profiles: Mapping[str, ExpertMask], name: str) -> ExpertMask:
    """The profile of that name. Raises `ProfileError`."""
    if name not in profiles:
        raise ProfileError(f"there is no such profile: this server has {', '.join(sorted(profiles)) or 'none'}")
    return profiles[name]
