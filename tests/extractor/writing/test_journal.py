"""The journal: what is believed after a crash."""

from pathlib import Path

import pytest

from extractor.errors import TargetError
from extractor.writing.journal import JOURNAL_NAME, Journal, journal_head, read_journal
from extractor.writing.pipeline import FileDigest

HEAD = journal_head("ab", (), [(0, 1), (1, 0)])
DIGESTS = [FileDigest(f"experts/{i}", 10 + i, "cd", ("ef",) * i) for i in range(3)]


def begin(directory: Path, digests: int = 3) -> Path:
    journal = Journal.open(directory, HEAD)
    for digest in DIGESTS[:digests]:
        journal.add(digest)
    journal.close()
    return directory / JOURNAL_NAME


def test_what_was_added_is_found_again(tmp_path: Path) -> None:
    assert read_journal(tmp_path) is None
    begin(tmp_path)
    assert read_journal(tmp_path) == (HEAD, {digest.name: digest for digest in DIGESTS})


def test_a_torn_last_line_is_dropped_at_every_length(tmp_path: Path) -> None:
    path = begin(tmp_path, 2)
    two = path.read_bytes()
    begin(tmp_path, 3)
    path.write_bytes(two)
    journal = Journal.open(tmp_path, HEAD)
    journal.add(DIGESTS[2])
    journal.close()
    whole = path.read_bytes()
    for size in range(len(two), len(whole)):
        path.write_bytes(whole[:size])
        journal = Journal.open(tmp_path, HEAD)
        assert list(journal.done) == ["experts/0", "experts/1"]
        journal.add(DIGESTS[2])
        journal.close()
        assert path.read_bytes() == whole


def test_another_extraction_is_refused(tmp_path: Path) -> None:
    begin(tmp_path)
    for other in (journal_head("xx", (), [(0, 1), (1, 0)]), journal_head("ab", (), [(0, 1)])):
        with pytest.raises(TargetError, match="half-made"):
            Journal.open(tmp_path, other)


def test_a_stale_journal_is_replaced(tmp_path: Path) -> None:
    begin(tmp_path)
    other = journal_head("ab", (), [(0, 1), (1, 0), (2, 2)])
    Journal.open(tmp_path, other, stale=HEAD).close()
    assert read_journal(tmp_path) == (other, {})


def test_one_at_a_time(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, HEAD)
    with pytest.raises(TargetError, match="another extraction is writing"):
        Journal.open(tmp_path, HEAD)
    journal.remove()
    assert not (tmp_path / JOURNAL_NAME).exists()
    Journal.open(tmp_path, HEAD).close()


def test_a_damaged_journal_says_what_to_do(tmp_path: Path) -> None:
    path = begin(tmp_path)
    for content in (b"", b"nonsense\n", path.read_bytes().replace(b"sha256", b"sha255")):
        path.write_bytes(content)
        with pytest.raises(TargetError, match=r"is damaged .* delete it"):
            read_journal(tmp_path)
        with pytest.raises(TargetError, match="is damaged"):
            Journal.open(tmp_path, HEAD)
