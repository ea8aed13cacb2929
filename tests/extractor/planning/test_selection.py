"""What can be asked for, and what cannot."""

import dataclasses
import inspect

import pytest

from extractor.cli import extract as cli
from extractor.errors import SelectionError
from extractor.planning.plan import Plan, parse_plan
from extractor.planning.selection import Selection, SelectionRequest, select
from tests.expert_store.hand_made import LAYERS, MODEL

SHARD_BYTES, TRUNK_BYTES = 4168, 1000


def chosen(fingerprint: str | None = None, **request: object) -> Selection:
    return select(SelectionRequest(**request), MODEL, LAYERS, TRUNK_BYTES, fingerprint)  # type: ignore[arg-type]


def first_experts(selection: Selection) -> list[int]:
    return [experts[0] for experts in selection.deep_experts]


def plan_of(deep_experts: list[list[int]], **extra: object) -> Plan:
    document = {
        "format": "deepfew-plan",
        "version": 1,
        "alignment": {"kind": "profile", "rounds": 3},
        "num_layers": 2,
        "num_experts": 4,
        "deep_experts": [{"experts": experts, "score": 1.0} for experts in deep_experts],
        **extra,
    }
    return parse_plan(document)


def test_everything_is_the_default() -> None:
    selection = chosen()
    assert selection.deep_experts == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert (selection.alignment.kind, selection.alignment.statistics) == ("index", {})


def test_experts_count_keep_and_budget_take_a_part() -> None:
    assert first_experts(chosen(experts="2-3,0")) == [0, 2, 3]
    assert first_experts(chosen(count=2)) == [0, 1]
    assert first_experts(chosen(keep=0.25)) == [0]
    assert first_experts(chosen(keep=0.6)) == [0, 1]
    assert first_experts(chosen(budget_bytes=TRUNK_BYTES + 3 * SHARD_BYTES)) == [0, 1, 2]
    assert first_experts(chosen(budget_bytes=TRUNK_BYTES + 3 * SHARD_BYTES - 1)) == [0, 1]


def test_a_plan_gives_the_expert_of_every_layer_best_first() -> None:
    plan = plan_of([[3, 1], [0, 2], [2, 0]])
    assert chosen(plan=plan).deep_experts == ((3, 1), (0, 2), (2, 0))
    assert chosen(plan=plan, count=2).deep_experts == ((3, 1), (0, 2))
    assert chosen(plan=plan, keep=0.25).deep_experts == ((3, 1),)
    assert chosen(plan=plan).alignment.statistics == {"rounds": 3}


def test_a_plan_for_another_model_is_refused() -> None:
    plan = plan_of([[3, 1]], fingerprint="aa")
    assert chosen(plan=plan, fingerprint="aa").deep_experts == ((3, 1),)
    with pytest.raises(SelectionError, match="was made for the checkpoint aa"):
        chosen(plan=plan, fingerprint="bb")
    plan = plan_of([[3, 1]], num_experts=8)
    with pytest.raises(SelectionError, match="2 layers of 8 experts, the checkpoint has 2 of 4"):
        chosen(plan=plan)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"experts": "0-4"}, "expert 4 does not exist; this model has experts 0 to 3"),
        ({"experts": "x"}, "no id or range"),
        ({"count": 0}, "--count is 0, wanted 1 to 4"),
        ({"count": 5}, "--count is 5, wanted 1 to 4"),
        ({"keep": 0.2}, "keep at least 25%"),
        ({"keep": 1.5}, "--keep is 1.5"),
        ({"budget_bytes": TRUNK_BYTES + SHARD_BYTES - 1}, "which take 5168 bytes"),
        ({"count": 1, "keep": 0.5}, "--count and --keep contradict"),
        ({"experts": "0", "plan": plan_of([[3, 1]])}, "--plan and --experts contradict"),
    ],
)
def test_impossible_requests_say_what_is_possible(request_: dict[str, object], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        chosen(**request_)


def test_no_option_asks_for_some_layers_only() -> None:
    assert not [name for name in inspect.signature(cli.extract).parameters if "layer" in name]
    assert not [field.name for field in dataclasses.fields(SelectionRequest) if "layer" in field.name]
