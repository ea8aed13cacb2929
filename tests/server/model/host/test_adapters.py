"""Rows with and without adapters in one batch: each has the bits that it has alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from expert_store.store import Store
from server.model.host.assembly import HostModel, load_model
from server.model.host.runner import HostRunner
from server.model.host.sequence_runner import SequenceRunner
from server.model.runner import RunnerOptions
from tests.server.adapters import HALF, ROWS, decoded, with_adapters


@pytest.fixture(scope="module")
def adapted(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_adapters(small_store, tmp_path_factory.mktemp("adapted") / "store", HALF)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(scope="module")
def model(adapted: Path, dtype: torch.dtype) -> Iterator[HostModel]:
    found = load_model(Store.open(adapted), RunnerOptions(device=torch.device("cpu"), dtype=dtype, num_slots=4))
    yield found
    found.close()


@pytest.mark.parametrize("kind", [HostRunner, SequenceRunner])
def test_a_row_has_its_own_bits_beside_rows_of_other_adapters(
    model: HostModel, kind: type[HostRunner | SequenceRunner]
) -> None:
    runner = kind(model, max_rows=len(ROWS), max_tokens=64)
    together = decoded(runner, list(range(len(ROWS))))
    for at in range(len(ROWS)):
        (alone,) = decoded(runner, [at])
        assert all(torch.equal(one, other) for one, other in zip(alone, together[at], strict=True)), at
    assert not torch.equal(together[1][0], decoded(runner, [2])[0][0])


def test_a_row_without_a_mask_has_the_bits_of_a_store_without_adapters(
    model: HostModel, dtype: torch.dtype, small_store: Path
) -> None:
    plain = load_model(Store.open(small_store), RunnerOptions(device=torch.device("cpu"), dtype=dtype, num_slots=4))
    wanted = decoded(HostRunner(plain, max_rows=2, max_tokens=64), [0, 2])
    got = decoded(HostRunner(model, max_rows=5, max_tokens=64), list(range(5)))
    for ours, theirs in ((got[0], wanted[0]), (got[2], wanted[1])):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    plain.close()
