"""Trained experts become a store of their own, whose bytes are those of the experts with their changes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from expert_store.adapter import Changes, store_adapters
from expert_store.errors import ManifestError
from expert_store.manifest import read_manifest
from expert_store.rows import plain_values
from expert_store.store import Store
from extractor.checkpoint.source import attach_source
from extractor.errors import TargetError
from extractor.exporting.export import prepare_export
from extractor.writing.verify import verify_store
from router.mask import ExpertMask
from server.adapting.run import AdaptRequest, adapt
from server.adapting.store import TrainedStore
from server.adapting.target import Target
from server.adapting.training import TrainingOptions
from server.model.host.assembly import HostModel, load_model
from server.model.runner import RunnerOptions
from server.model.seam.changed import changed
from server.quality.batches import run_batch
from server.quality.texts import TextOptions
from tests.expert_store.test_rows import ENCODINGS
from tests.server.model.repacked import repack

DEEP_EXPERTS = [(4, 1), (1, 6)]
MASK = np.zeros((2, 8), dtype=np.bool_)
MASK[0, [1, 4]] = MASK[1, [1, 6]] = True
TOKENS = [list(range(100, 124))]


def loaded(path: Path, **options: object) -> HostModel:
    common = {"device": torch.device("cpu"), "dtype": torch.float32}
    return load_model(Store.open(path), RunnerOptions(**common | options))  # type: ignore[arg-type]


def request(rank: int = 4) -> AdaptRequest:
    training = TrainingOptions(tokens=256, batch_tokens=64, rate=2e-2, measures=1)
    target = Target(mask=ExpertMask(MASK))
    return AdaptRequest([], TextOptions(context=32), target, training, rank, generated_tokens=128, experts=True)


def trained(path: Path, folder: Path, out: Path, rank: int = 4) -> tuple[Path, Changes]:
    """The store of the trained experts of the store at `path`, and their changes."""
    model = loaded(path, adapters=False)
    store = TrainedStore(model.store, out, DEEP_EXPERTS, transposed=False)
    adapter, changes = adapt(model, request(rank), folder)
    store.write(adapter, changes, 256)
    model.close()
    return out, changes


def same(one: Path, other: Path) -> bool:
    """But for the seconds that an adapter tells."""
    return replace(read_manifest(one), adapters=()) == replace(read_manifest(other), adapters=())


@pytest.fixture(scope="module")
def made(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Changes]:
    folder = tmp_path_factory.mktemp("trained")
    return trained(small_store, folder / "run", folder / "store")


def test_its_bytes_are_the_experts_with_their_changes(made: tuple[Path, Changes], small_store: Path) -> None:
    out, changes = made
    assert verify_store(out) > 0
    with Store.open(out) as new, Store.open(small_store) as old:
        assert [deep.experts for deep in new.manifest.deep_experts] == DEEP_EXPERTS
        for spec in old.manifest.layers:
            for place, expert in enumerate(np.flatnonzero(MASK[spec.layer]).tolist()):
                spans = [torch.empty(spec.span_bytes, dtype=torch.uint8) for _ in range(2)]
                for store, span in zip((new, old), spans, strict=True):
                    store.read_expert(spec.layer, expert, span)
                got, before = (plain_values(spec, span, transposed=False) for span in spans)
                for name, value in got.items():
                    own = {part: one[place : place + 1] for part, one in changes[f"{spec.module}.{name}"].items()}
                    assert torch.equal(value, changed(before[name][None], own)[0])
                    assert not torch.equal(value, before[name])
        assert {file.name: file.sha256 for file in new.manifest.trunk} == {
            file.name: file.sha256 for file in old.manifest.trunk
        }


def test_the_same_training_gives_the_same_store_and_leaves_the_first_as_it_is(
    made: tuple[Path, Changes], small_store: Path, tmp_path: Path
) -> None:
    before = read_manifest(small_store)
    again, _ = trained(small_store, tmp_path / "run", tmp_path / "store")
    assert same(again, made[0])
    assert read_manifest(small_store) == before
    assert verify_store(small_store) > 0


def test_it_is_served_with_its_adapter_and_answers_more_like_the_whole_model(
    made: tuple[Path, Changes], small_store: Path
) -> None:
    new, whole = loaded(made[0]), loaded(small_store)
    name = new.store.manifest.trained.adapter  # type: ignore[union-attr]
    assert new.adapters[name].is_for(new.routing.mask.allowed)
    wanted = run_batch(whole, TOKENS).logits.log_softmax(-1)

    def divergence(logits: torch.Tensor) -> float:
        return float((wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1).mean())

    masked = divergence(run_batch(whole, TOKENS, ExpertMask(MASK)).logits)
    assert divergence(run_batch(new, TOKENS, None, name).logits) < 0.9 * masked
    for model in (new, whole):
        model.close()


def test_no_checkpoint_is_its_source_and_no_directory_is_overwritten(
    made: tuple[Path, Changes], small_store: Path, tmp_path: Path
) -> None:
    with Store.open(made[0]) as new:
        assert "were trained" in attach_source(new)
    with Store.open(small_store) as store:
        with pytest.raises(TargetError, match="is a store"):
            TrainedStore(store, made[0], DEEP_EXPERTS, transposed=False)
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(TargetError, match=r"not empty \(it holds notes.txt\)"):
            TrainedStore(store, tmp_path, DEEP_EXPERTS, transposed=False)


def test_a_killed_run_leaves_no_store_and_the_next_one_writes_it(
    made: tuple[Path, Changes], small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("server.adapting.store.write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(small_store, tmp_path / "run", tmp_path / "store")
    with pytest.raises(ManifestError):
        read_manifest(tmp_path / "store")
    again, _ = trained(small_store, tmp_path / "run", tmp_path / "store")
    assert same(again, made[0])


def test_an_exported_checkpoint_answers_as_the_store_does(made: tuple[Path, Changes], tmp_path: Path) -> None:
    model = loaded(made[0])
    wanted = run_batch(model, TOKENS, None, "trained").logits
    with Store.open(made[0]) as store:
        adapter = store_adapters(store.path, store.manifest)["trained"]
        prepare_export(store, tmp_path / "out", None, "float32", adapter).run()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        got = exported(input_ids=torch.tensor(TOKENS)).logits
    assert torch.allclose(got, wanted, atol=1e-3)
    assert "The experts were trained too, on 256 tokens" in (tmp_path / "out" / "README.md").read_text()
    model.close()


def test_encoded_experts_are_trained_as_their_values_and_written_in_the_dtype_to_compute_in(
    small_store: Path, tmp_path: Path
) -> None:
    rows = dict.fromkeys(("gate_up_proj", "down_proj"), ENCODINGS["int8"])
    encoded = repack(small_store, tmp_path / "encoded", rows)
    out, changes = trained(encoded, tmp_path / "run", tmp_path / "store", rank=0)
    assert all(set(parts) == {"delta"} for parts in changes.values())
    assert verify_store(out) > 0
    with Store.open(out) as new, Store.open(encoded) as old:
        spec, before = new.manifest.layers[1], old.manifest.layers[1]
        assert not spec.is_encoded
        assert [tensor.dtype for tensor in spec.tensors] == [tensor.dtype for tensor in before.tensors]
        span = torch.empty(spec.span_bytes, dtype=torch.uint8)
        new.read_expert(1, 6, span)
        first = torch.empty(before.span_bytes, dtype=torch.uint8)
        old.read_expert(1, 6, first)
        got, values = (plain_values(*one, transposed=False) for one in ((spec, span), (before, first)))
        delta = changes[f"{spec.module}.down_proj"]["delta"][1]
        assert torch.equal(got["down_proj"], values["down_proj"] + delta)
