"""Stores give deep experts up: the manifest first, the files when nobody reads them, and growth goes on after it."""

from pathlib import Path

import pytest

from expert_store.errors import ManifestError
from expert_store.manifest import read_manifest
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.errors import TargetError
from extractor.planning.plan import Plan, PlannedExpert
from extractor.planning.selection import SelectionRequest
from extractor.writing.extract import JOURNAL_NAME
from extractor.writing.prepare import prepare
from extractor.writing.shrink import shrink_store, tidy
from extractor.writing.verify import verify_against

LAYERS, EXPERTS = 8, 64


@pytest.fixture
def store(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A store with 12 of the bundled checkpoint's 64 deep experts."""
    prepare(Checkpoint.open(tiny_checkpoint), tmp_path / "store", SelectionRequest(experts="0-11")).run()
    return tmp_path / "store"


def shards(store: Path) -> list[int]:
    return sorted(int(file.stem.removeprefix("deep-")) for file in (store / "experts").iterdir())


def grow(store: Path, checkpoint: Path, experts: list[int]) -> None:
    """Add deep experts of one id in every layer."""
    columns = [deep.experts for deep in read_manifest(store).deep_experts] + [(expert,) * LAYERS for expert in experts]
    plan = Plan(LAYERS, EXPERTS, {"kind": "grown"}, tuple(PlannedExpert(column) for column in columns))
    prepare(Checkpoint.open(checkpoint), store, SelectionRequest(plan=plan)).run()


def test_a_shrunk_store_lacks_what_it_gave_up_and_is_whole(store: Path, tiny_checkpoint: Path) -> None:
    shrink_store(store, [3, 7])
    assert shards(store) == list(range(12))
    assert tidy(store) == sum(deep.bytes for deep in read_manifest(store).deep_experts[:2])
    assert shards(store) == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    with Store.open(store) as opened:
        assert not opened.available[:, [3, 7]].any()
        assert opened.available[:, [2, 11]].all()
        opened.verify()
    verify_against(store, Checkpoint.open(tiny_checkpoint))


def test_a_shrunk_store_grows_under_indices_that_it_never_had(store: Path, tiny_checkpoint: Path) -> None:
    shrink_store(store, [3, 10, 11])
    assert read_manifest(store).next_index == 12
    grow(store, tiny_checkpoint, [11, 40])
    manifest = read_manifest(store)
    assert [deep.index for deep in manifest.deep_experts] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 12, 13]
    assert manifest.retired_below == 0
    tidy(store)
    assert shards(store) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 12, 13]
    with Store.open(store) as opened:
        opened.verify()
        assert opened.available[:, [11, 40]].all()


def test_files_stay_while_somebody_reads_the_store(store: Path) -> None:
    with Store.open(store) as reader:
        shrink_store(store, [0])
        assert tidy(store) is None
        assert reader.remove_unnamed() is None  # what it serves is not what the manifest says
        assert reader.reload()
        with Store.open(store):
            assert reader.remove_unnamed() is None
        assert 0 in shards(store)
        assert reader.remove_unnamed() == reader.manifest.deep_experts[0].bytes
        assert 0 not in shards(store)
        assert tidy(store) is None  # it is still being read


def test_a_reader_of_the_old_manifest_reads_on(store: Path) -> None:
    with Store.open(store) as reader:
        memory = memoryview(bytearray(reader.layer_spec(0).span_bytes))
        shrink_store(store, [5])
        tidy(store)
        reader.read_expert(0, 5, memory)


def test_no_more_is_given_up_than_every_token_wants(store: Path) -> None:
    with pytest.raises(ManifestError, match="give up at most 4"):
        shrink_store(store, range(5))
    with pytest.raises(ManifestError, match="no deep expert 12"):
        shrink_store(store, [12])
    assert len(read_manifest(store).deep_experts) == 12
    shrink_store(store, range(4))
    assert len(read_manifest(store).deep_experts) == 8


def test_a_store_that_is_being_extracted_into_does_not_shrink(store: Path) -> None:
    (store / JOURNAL_NAME).write_text('{"format": "deepfew-journal", "version": 1, "columns": []}\n')
    with pytest.raises(TargetError, match="half-made extraction"):
        shrink_store(store, [0])
    assert len(read_manifest(store).deep_experts) == 12


@pytest.mark.parametrize("moment", ["before the manifest", "after the manifest"])
def test_killed_while_it_shrinks_a_store_is_whole_and_the_same_command_finishes(
    store: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    where = (
        "extractor.writing.shrink.write_manifest"
        if moment == "before the manifest"
        else "extractor.writing.journal.Journal.remove"
    )
    with monkeypatch.context() as patch:
        patch.setattr(where, die)
        with pytest.raises(KeyboardInterrupt):
            shrink_store(store, [3])
    with Store.open(store) as opened:
        opened.verify()
    if moment == "before the manifest":
        shrink_store(store, [3])
    tidy(store)
    assert 3 not in shards(store)
    shrink_store(store, [4])
    assert not (store / JOURNAL_NAME).exists()
    assert len(read_manifest(store).deep_experts) == 10


def test_a_growth_prepared_before_the_store_shrank_is_told(store: Path, tiny_checkpoint: Path) -> None:
    work = prepare(Checkpoint.open(tiny_checkpoint), store, SelectionRequest(experts="0-15"))
    shrink_store(store, [0])
    with pytest.raises(TargetError, match="changed by somebody else"):
        work.run()
    assert 0 not in {deep.index for deep in read_manifest(store).deep_experts}
