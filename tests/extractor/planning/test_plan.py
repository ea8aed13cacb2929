"""The plan file: what is written is read, and impossible plans are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extractor.errors import SelectionError
from extractor.planning.plan import Plan, PlannedExpert, parse_plan, plan_document, read_plan, write_plan

PLAN = Plan(
    num_layers=2,
    num_experts=4,
    alignment={"kind": "profile", "windows": 12},
    deep_experts=(PlannedExpert((3, 1), 0.5, {"note": "prose"}), PlannedExpert((0, 2))),
    extra={"fingerprint": "ab", "future": [1]},
)


def test_a_plan_survives_with_the_keys_that_are_unknown(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.json", PLAN)
    assert read_plan(tmp_path / "plan.json") == PLAN
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document == plan_document(PLAN)
    assert document["deep_experts"][0] == {"experts": [3, 1], "score": 0.5, "note": "prose"}
    assert document["future"] == [1]


Edit = Callable[[dict[str, Any]], object]

REFUSED: dict[str, tuple[Edit, str]] = {
    "another format": (lambda d: d.update(format="x"), "it is no plan"),
    "a newer version": (lambda d: d.update(version=2), "version is 2, this program reads version 1"),
    "no alignment": (lambda d: d.pop("alignment"), "alignment is missing"),
    "no deep expert": (lambda d: d.update(deep_experts=[]), "missing or empty"),
    "too few layers": (lambda d: d["deep_experts"][0]["experts"].pop(), "one expert id for each of the 2 layers"),
    "an expert that does not exist": (
        lambda d: d["deep_experts"][0].update(experts=[4, 0]),
        "wanted an id from 0 to 3",
    ),
    "an expert that is no number": (lambda d: d["deep_experts"][0].update(experts=[True, 0]), "wanted an id"),
    "an expert twice": (lambda d: d["deep_experts"][0].update(experts=[0, 1]), "both have expert 0 of layer 0"),
    "a score that is none": (lambda d: d["deep_experts"][0].update(score="good"), "wanted a number"),
    "no layers": (lambda d: d.update(num_layers=0), "num_layers is 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_is_refused_that_has(name: str) -> None:
    edit, message = REFUSED[name]
    document = json.loads(json.dumps(plan_document(PLAN)))
    edit(document)
    with pytest.raises(SelectionError, match=message):
        parse_plan(document)


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(SelectionError, match=r"plan.json: it is no plan.*make the plan again"):
        read_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("nonsense")
    with pytest.raises(SelectionError, match="not JSON"):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(SelectionError, match="cannot be read"):
        read_plan(tmp_path)


def test_an_impossible_plan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(SelectionError):
        write_plan(tmp_path / "plan.json", Plan(2, 4, {"kind": "index"}, (PlannedExpert((9, 9)),)))
    assert not list(tmp_path.iterdir())


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda s: st.dictionaries(st.text(), s)))
def test_any_other_json_is_refused(document: object) -> None:
    with pytest.raises(SelectionError):
        parse_plan(document)
