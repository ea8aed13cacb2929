"""Sizes and shares mean the same wherever they are written."""

import pytest

from extractor.planning.sizes import format_size, parse_share, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8GiB", 8 << 30),
        ("8G", 8 << 30),
        ("8gb", 8 * 10**9),
        ("1.5 GB", 1_500_000_000),
        (" 512mib ", 512 << 20),
        ("2TiB", 2 << 40),
        ("4096", 4096),
        ("4k", 4096),
        ("1B", 1),
    ],
)
def test_a_size_is_read(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e9", "8 gigs", "12Gib/s", "4IB", "0", "0.1B", "nan", "١GiB"])
def test_a_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size of at least one byte; write it like 8GiB"):
        parse_size(text)


def test_a_share_is_a_percentage_or_a_fraction() -> None:
    assert parse_share("25%") == parse_share(" 0.25 ") == 0.25
    assert parse_share("100%") == parse_share("1") == 1.0
    for text in ("0%", "101%", "-1", "half", "", "%", "nan"):
        with pytest.raises(ValueError, match="is not a share above 0 and at most 1; write it like 25%"):
            parse_share(text)


def test_sizes_are_written_for_people() -> None:
    sizes = (0, 1023, 4096, 12.5 * 2**30, 3 * 2**40)
    assert [format_size(size) for size in sizes] == ["0 B", "1023 B", "4.0 KiB", "12.5 GiB", "3.0 TiB"]
