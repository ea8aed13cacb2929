"""Room on the disk, and the `--keep` that is recommended."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extractor.planning.sizes import parse_share
from extractor.writing.disk import DISK_MARGIN_BYTES, free_bytes, keep_that_fits


@given(
    num_experts=st.integers(1, 5000),
    shard_bytes=st.integers(1, 10**10),
    trunk_bytes=st.integers(0, 10**10),
    room=st.integers(0, 10**14),
    at_least=st.integers(0, 8),
)
def test_a_recommended_keep_fits_and_is_the_largest(
    num_experts: int, shard_bytes: int, trunk_bytes: int, room: int, at_least: int
) -> None:
    keep = keep_that_fits(room, trunk_bytes, shard_bytes, num_experts, at_least)

    def needed(count: int) -> int:
        return trunk_bytes + count * shard_bytes + DISK_MARGIN_BYTES

    if keep is None:
        assert needed(max(at_least, 1)) > room or num_experts < at_least
        return
    count = int(parse_share(keep) * num_experts + 1e-9)
    assert max(at_least, 1) <= count <= num_experts
    assert needed(count) <= room
    assert count == num_experts or needed(count + 1) > room


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(free_bytes(tmp_path), rel=0.05)
