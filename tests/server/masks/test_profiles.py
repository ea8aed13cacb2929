from pathlib import Path

import pytest

from extractor.planning.plan import Plan, PlannedExpert, write_plan
from server.masks.masking import FixedMasking
from server.masks.profiles import ProfileError, find_profile, load_profiles
from tests.server.masks.small_masks import FULL, E, L, allowed


def write(path: Path, columns: list[tuple[int, ...]], num_experts: int = E) -> Path:
    deep = tuple(PlannedExpert(column) for column in columns)
    write_plan(path, Plan(L, num_experts, {"kind": "free"}, deep))
    return path


def test_profiles_are_plans_by_the_name_of_their_file(tmp_path: Path) -> None:
    profiles = load_profiles([write(tmp_path / "code.json", [(0, 3), (1, 2)])], FULL)
    code = find_profile(profiles, "code")
    assert (allowed(code, 0), allowed(code, 1)) == ({0, 1}, {2, 3})
    assert FixedMasking(code).mask is code
    with pytest.raises(ProfileError, match="no such profile: this server has code"):
        find_profile(profiles, "chat")


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="the plan is for 2 layers of 9 experts"):
        load_profiles([write(tmp_path / "code.json", [(0, 3)], num_experts=9)], FULL)
