import json
from pathlib import Path

import numpy as np
import pytest

from router.errors import LedgerError
from router.ledger import StepRecord, UsageLedger

NUM_EXPERTS = 4


def masked_record() -> StepRecord:
    """Two layers, one token, top-2; in layer 1 one pick does not exist (sentinel 4) and mass .25 was missed."""
    return StepRecord(
        served_index=np.array([[[0, 1]], [[2, 4]]]),
        served_weight=np.array([[[0.75, 0.25]], [[1.0, 0.0]]], dtype=np.float32),
        demand_index=np.array([[[0, 1]], [[2, 3]]]),
        demand_weight=np.array([[[0.75, 0.25]], [[0.75, 0.25]]], dtype=np.float32),
        missed_mass=np.array([0.0, 0.25]),
    )


def test_served_and_demanded_are_counted_apart_and_the_sentinel_nowhere() -> None:
    ledger = UsageLedger(2, NUM_EXPERTS, "f")
    ledger.add(masked_record())
    assert ledger.served_count.tolist() == [[1, 1, 0, 0], [0, 0, 1, 0]]
    assert ledger.demand_count.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert ledger.served_mass.tolist() == [[0.75, 0.25, 0, 0], [0, 0, 1.0, 0]]
    assert ledger.deficit_per_layer.tolist() == [0.0, 0.25]
    assert ledger.deficit == 0.125
    assert ledger.num_tokens == 1


def test_tokens_that_did_without_their_most_wanted_expert_are_counted_by_layer_and_once_over_all() -> None:
    ledger = UsageLedger(2, NUM_EXPERTS, "f")
    ledger.add(masked_record())
    assert ledger.top1_missing.tolist() == [0, 0], "what was missed was the second choice"
    weight = np.full((2, 3, 1), 1.0, dtype=np.float32)
    served, wanted = np.array([[[0], [1], [2]], [[0], [1], [2]]]), np.array([[[0], [3], [3]], [[0], [3], [2]]])
    ledger.add(StepRecord(served, weight, wanted, weight, np.array([2.0, 1.0])))
    assert ledger.top1_missing.tolist() == [2, 1]
    assert ledger.top1_missing_tokens == 2
    assert ledger.num_tokens == 4


def test_a_file_of_version_1_is_read_and_has_counted_no_missing_top1(tmp_path: Path) -> None:
    ledger = UsageLedger(2, NUM_EXPERTS, "f")
    ledger.add(masked_record())
    data = ledger.to_json() | {"version": 1}
    del data["top1_missing"], data["top1_missing_tokens"]
    (tmp_path / "usage.json").write_text(json.dumps(data))
    read = UsageLedger.load(tmp_path / "usage.json")
    assert read.to_json() == ledger.to_json()
    assert read.to_json()["version"] == 2


def test_what_some_tokens_wanted_of_each_expert_is_told() -> None:
    assert masked_record().demand_mass_of(slice(0, 1), NUM_EXPERTS).tolist() == [[0.75, 0.25, 0, 0], [0, 0, 0.75, 0.25]]
    unmasked = StepRecord(np.array([[[3, 0], [3, 4]]]), np.full((1, 2, 2), 0.5, dtype=np.float32))
    assert unmasked.demand_mass_of(slice(1, 2), NUM_EXPERTS).tolist() == [[0, 0, 0, 0.5]]


def test_without_a_mask_demand_is_what_was_served() -> None:
    ledger = UsageLedger(1, NUM_EXPERTS, "f")
    ledger.add(StepRecord(np.array([[[3, 0], [3, 1]]]), np.full((1, 2, 2), 0.5, dtype=np.float32)))
    assert ledger.demand_count.tolist() == ledger.served_count.tolist() == [[1, 1, 0, 2]]
    assert ledger.deficit == 0.0


def test_an_empty_ledger_has_no_deficit() -> None:
    assert UsageLedger(2, NUM_EXPERTS, "f").deficit == 0.0


def test_saved_and_merged_ledgers_add_up_exactly(tmp_path: Path) -> None:
    once, twice = UsageLedger(2, NUM_EXPERTS, "f"), UsageLedger(2, NUM_EXPERTS, "f")
    once.add(masked_record())
    (tmp_path / "usage.json").write_text(json.dumps(once.to_json()))
    twice.add(masked_record())
    twice.merge(UsageLedger.load(tmp_path / "usage.json"))
    once.add(masked_record())
    assert twice.to_json() == once.to_json()


def test_usage_of_another_checkpoint_is_not_added() -> None:
    with pytest.raises(LedgerError, match="cannot be added"):
        UsageLedger(2, NUM_EXPERTS, "f").merge(UsageLedger(2, NUM_EXPERTS, "g"))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": "deepfew-usage", "version": 99}',
        '{"format": "deepfew-usage", "version": 1, "served_count": [1]}',
    ],
)
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "usage.json"
    path.write_text(content)
    with pytest.raises(LedgerError, match="usage"):
        UsageLedger.load(path)


def test_arrays_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    ledger = UsageLedger(2, NUM_EXPERTS, "f")
    data = ledger.to_json() | {"demand_mass": [[1.0] * 9]}
    (tmp_path / "usage.json").write_text(json.dumps(data))
    with pytest.raises(LedgerError):
        UsageLedger.load(tmp_path / "usage.json")
