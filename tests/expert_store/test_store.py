"""Reading a store: the right bytes or an error, from any number of threads, while it grows."""

import hashlib
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from expert_store import integrity
from expert_store.errors import ExpertUnavailableError, ManifestError, ShardCorruptError
from expert_store.manifest import Manifest, Source, TrunkFile, write_manifest
from expert_store.shard import shard_name
from expert_store.store import Store
from tests.expert_store.hand_made import COLUMNS, add_shard, grow_store, span, write_store


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_store(tmp_path)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_every_expert_reads_as_it_was_written(tmp_path: Path, manifest: Manifest) -> None:
    with Store.open(tmp_path) as store:
        for experts in COLUMNS:
            for layer, expert in enumerate(experts):
                tensor = torch.empty(36, dtype=torch.uint8)
                memory = memoryview(bytearray(36))
                store.read_expert(layer, expert, tensor)
                store.read_expert(layer, expert, memory)
                assert bytes(tensor.tolist()) == bytes(memory) == span(layer, expert)


def test_available_is_what_the_shards_hold(tmp_path: Path, manifest: Manifest) -> None:
    with Store.open(tmp_path) as store:
        assert store.available.dtype == np.bool_
        assert store.available.tolist() == [[True, False, True, False], [False, True, False, True]]
        assert store.layer_spec(1).module == "model.layers.2.mlp.experts"
        assert store.trunk_path == tmp_path / "trunk"
        assert store.deep_expert(1, 1).index == 1
        with pytest.raises(ValueError, match="read-only"):
            store.available[0, 0] = False


def test_reading_a_span_is_reading_into_the_middle_of_memory(tmp_path: Path, manifest: Manifest) -> None:
    slots = torch.zeros(3, 36, dtype=torch.uint8)
    with Store.open(tmp_path) as store:
        store.read_expert(1, 3, slots[1])
    assert bytes(slots[1].tolist()) == span(1, 3)
    assert not slots[0].any()
    assert not slots[2].any()


def test_an_expert_that_is_elsewhere_is_unavailable(tmp_path: Path, manifest: Manifest) -> None:
    with Store.open(tmp_path) as store:
        memory = memoryview(bytearray(36))
        with pytest.raises(ExpertUnavailableError, match="expert 1 of MoE layer 0 is not in"):
            store.read_expert(0, 1, memory)
        for layer, expert in ((0, 4), (0, -1), (2, 0), (-1, 0)):
            with pytest.raises(ExpertUnavailableError, match=f"there is no expert {expert} in MoE layer {layer}"):
                store.read_expert(layer, expert, memory)
        with pytest.raises(ExpertUnavailableError, match="no MoE layer 2"):
            store.layer_spec(2)


@pytest.mark.parametrize(
    "out",
    [
        memoryview(bytearray(35)),
        memoryview(bytes(36)),
        torch.empty(36),
        torch.empty(2, 18, dtype=torch.uint8),
        torch.empty(72, dtype=torch.uint8)[::2],
    ],
    ids=["too short", "read-only", "floats", "two-dimensional", "strided"],
)
def test_memory_that_does_not_fit_is_refused(
    tmp_path: Path, manifest: Manifest, out: memoryview | torch.Tensor
) -> None:
    with Store.open(tmp_path) as store, pytest.raises(ValueError, match="wanted"):
        store.read_expert(0, 0, out)


def test_altered_bytes_are_never_an_answer(tmp_path: Path, manifest: Manifest) -> None:
    flip(tmp_path / shard_name(0), 4096 + 36 + 5)
    memory = memoryview(bytearray(36))
    with Store.open(tmp_path) as store:
        store.read_expert(0, 0, memory)
        with pytest.raises(ShardCorruptError, match=r"deep-00000.safetensors \(layer 1, expert 3\)"):
            store.read_expert(1, 3, memory)
        store.read_expert(1, 3, memory, verify=False)


@pytest.mark.parametrize("name", [shard_name(1), "trunk/config.json"])
def test_a_truncated_or_missing_file_is_named_when_the_store_is_opened(
    tmp_path: Path, manifest: Manifest, name: str
) -> None:
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(ShardCorruptError, match=name):
        Store.open(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ShardCorruptError, match=name):
        Store.open(tmp_path)


def test_a_file_cut_off_while_it_is_open_is_told(tmp_path: Path, manifest: Manifest) -> None:
    memory = memoryview(bytearray(36))
    with Store.open(tmp_path) as store:
        store.read_expert(0, 0, memory)
        os.truncate(tmp_path / shard_name(0), 4100)
        with pytest.raises(ShardCorruptError, match="truncated while it was open"):
            store.read_expert(1, 3, memory)


def test_swapped_shards_are_told(tmp_path: Path, manifest: Manifest) -> None:
    first, second = (tmp_path / shard_name(index) for index in range(2))
    os.rename(first, tmp_path / "aside")
    os.rename(second, first)
    os.rename(tmp_path / "aside", second)
    with pytest.raises(ShardCorruptError, match="swapped"):
        Store.open(tmp_path)


def test_a_shard_swapped_after_the_store_was_opened_is_told(tmp_path: Path, manifest: Manifest) -> None:
    with Store.open(tmp_path) as store:
        os.replace(tmp_path / shard_name(1), tmp_path / shard_name(0))
        with pytest.raises(ShardCorruptError, match="swapped"):
            store.read_expert(0, 0, memoryview(bytearray(36)))


def test_files_that_transformers_would_pick_up_must_be_named(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "trunk/adapter_config.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"trunk/adapter_config.json is not named by the manifest"):
        Store.open(tmp_path)


def test_other_files_beside_the_trunk_do_not_matter(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "usage.json").write_text("{}")
    (tmp_path / "experts/deep-00002.safetensors.partial").write_text("")
    Store.open(tmp_path).close()


def test_no_more_files_are_open_than_allowed(tmp_path: Path) -> None:
    write_store(tmp_path, tuple((expert, expert) for expert in range(4)))
    memory = memoryview(bytearray(36))
    before = len(os.listdir("/proc/self/fd"))
    with Store.open(tmp_path, max_open_files=2) as store:
        for expert in (0, 1, 2, 3, 0, 3, 1):
            store.read_expert(1, expert, memory)
            assert bytes(memory) == span(1, expert)
            assert len(os.listdir("/proc/self/fd")) <= before + 3  # and the directory, for its lock
    assert len(os.listdir("/proc/self/fd")) == before


def test_many_threads_read_at_once_with_few_files_open(tmp_path: Path) -> None:
    write_store(tmp_path, tuple((expert, expert) for expert in range(4)))

    def read(seed: int) -> None:
        order, memory = random.Random(seed), memoryview(bytearray(36))
        for _ in range(300):
            layer, expert = order.randrange(2), order.randrange(4)
            store.read_expert(layer, expert, memory)
            assert bytes(memory) == span(layer, expert)

    with Store.open(tmp_path, max_open_files=1) as store, ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))


def test_a_closed_store_says_so(tmp_path: Path, manifest: Manifest) -> None:
    store = Store.open(tmp_path)
    store.close()
    with pytest.raises(ManifestError, match="was closed"):
        store.read_expert(0, 0, memoryview(bytearray(36)))


def test_reload_takes_what_was_added(tmp_path: Path, manifest: Manifest) -> None:
    with Store.open(tmp_path) as store:
        before = store.available
        assert store.reload() is False
        grow_store(tmp_path, manifest, (1, 0))
        assert not store.available[0, 1]
        assert store.reload() is True
        assert store.available[0, 1]
        assert store.available[1, 0]
        assert not before[0, 1]
        memory = memoryview(bytearray(36))
        store.read_expert(1, 0, memory)
        assert bytes(memory) == span(1, 0)


def test_reads_go_on_while_the_store_is_reloaded(tmp_path: Path, manifest: Manifest) -> None:
    stop, failures = threading.Event(), []

    def read() -> None:
        memory = memoryview(bytearray(36))
        while not stop.is_set():
            store.read_expert(0, 2, memory)
            if bytes(memory) != span(0, 2):
                failures.append(bytes(memory))

    with Store.open(tmp_path) as store:
        thread = threading.Thread(target=read)
        thread.start()
        grown = grow_store(tmp_path, manifest, (1, 0))
        store.reload()
        grow_store(tmp_path, grown, (3, 2))
        store.reload()
        stop.set()
        thread.join()
        assert store.available.all()
    assert not failures


def test_reload_refuses_what_does_not_follow(tmp_path: Path, manifest: Manifest) -> None:
    with Store.open(tmp_path) as store:
        for other in (
            replace(manifest, source=Source("other", "cd" * 32, "x")),
            replace(manifest, deep_experts=(manifest.deep_experts[0], add_shard(tmp_path, 1, (1, 0)))),
        ):
            write_manifest(tmp_path, other)
            with pytest.raises(ManifestError, match="does not follow from"):
                store.reload()
        assert store.manifest == manifest


def test_verify_reads_every_byte(tmp_path: Path, manifest: Manifest) -> None:
    counted: list[int] = []
    with Store.open(tmp_path) as store:
        total = store.verify(counted.append)
    assert total == sum(counted) == 2 * 4168 + manifest.trunk[0].bytes


def test_verify_names_every_bad_file(tmp_path: Path, manifest: Manifest) -> None:
    with Store.open(tmp_path) as store:
        flip(tmp_path / shard_name(0), 4096 + 1)
        flip(tmp_path / "trunk/config.json", 1)
        with pytest.raises(ShardCorruptError, match=r"(?s)deep-00000.*trunk/config.json"):
            store.verify()


@pytest.mark.parametrize("small_bytes", [0, 1 << 20])
def test_a_trunk_that_was_altered_is_named_in_the_place_of_what_loading_it_raised(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, small_bytes: int
) -> None:
    monkeypatch.setattr(integrity, "SMALL_BYTES", small_bytes)
    config = tmp_path / "trunk/config.json"
    told = r"trunk/config.json: sha256 is \w{64}, the manifest says \w{64}.*extract into an empty.*deepfew verify"
    with Store.open(tmp_path) as store:
        with store.checking_trunk() as check:
            pass
        check.wait()
    with Store.open(tmp_path) as store:
        flip(config, 1)
        with pytest.raises(ShardCorruptError, match=told), store.checking_trunk():
            raise ValueError("the config is no JSON")
        flip(config, 1)
        with pytest.raises(ValueError, match="of another kind"), store.checking_trunk():
            raise ValueError("of another kind")


def test_every_large_file_of_a_trunk_is_read_and_every_bad_one_named(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "SMALL_BYTES", 0)
    content = b"weights"
    files = []
    for number in range(9):
        (tmp_path / f"trunk/{number}.bin").write_bytes(content)
        files.append(TrunkFile(f"trunk/{number}.bin", len(content), hashlib.sha256(content).hexdigest()))
    whole = replace(manifest, trunk=(*manifest.trunk, *files))
    integrity.TrunkCheck(tmp_path, whole).wait()
    flip(tmp_path / "trunk/3.bin", 2)
    flip(tmp_path / "trunk/8.bin", 6)
    with pytest.raises(ShardCorruptError, match=r"(?s)^[^\n]*3.bin: sha256[^\n]*\n[^\n]*8.bin: sha256[^\n]*$"):
        integrity.TrunkCheck(tmp_path, whole).wait()


def test_verify_tells_span_hashes_that_are_wrong(tmp_path: Path, manifest: Manifest) -> None:
    deep = replace(manifest.deep_experts[0], span_hashes=("0" * 16, manifest.deep_experts[0].span_hashes[1]))
    write_manifest(tmp_path, replace(manifest, deep_experts=(deep, manifest.deep_experts[1])))
    with Store.open(tmp_path) as store, pytest.raises(ShardCorruptError, match=r"span_hashes.*layers \[0\]"):
        store.verify()
