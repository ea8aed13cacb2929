"""The manifest: its bytes, what survives writing and reading, and all that is refused."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_store.encoding import RowEncoding
from expert_store.errors import ManifestError, StoreError
from expert_store.manifest import (
    Alignment,
    Manifest,
    TensorSpec,
    format_ids,
    format_manifest,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from tests.expert_store.hand_made import write_store

Edit = Callable[[dict[str, Any]], object]
GOLDEN = Path(__file__).with_name("golden_manifest.json")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_store(tmp_path)


def test_manifest_bytes_never_change(tmp_path: Path, manifest: Manifest) -> None:
    assert (tmp_path / "manifest.json").read_bytes() == GOLDEN.read_bytes()


def test_golden_manifest_reads_as_the_records_that_made_it(manifest: Manifest) -> None:
    assert parse_manifest(GOLDEN.read_bytes()) == manifest


def encoded(manifest: Manifest) -> Manifest:
    """The manifest with experts of one matrix in int4 rows; no shard of it exists."""
    encoding = RowEncoding("int4", 32, "F16", zeros="U8")
    size = 4 * encoding.row_bytes(64)
    spec = TensorSpec("down_proj", "BF16", (4, 64), 0, size, encoding)
    return replace(manifest, layers=tuple(replace(one, span_bytes=size, tensors=(spec,)) for one in manifest.layers))


def test_encoded_experts_make_a_manifest_of_version_2_that_reads_back(manifest: Manifest) -> None:
    content = format_manifest(encoded(manifest))
    assert json.loads(content)["version"] == 2
    assert parse_manifest(content) == encoded(manifest)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensor: tensor["encoding"].update(group=24), "rows of 64 columns in groups of 24"),
        (lambda tensor: tensor["encoding"].update(codes="int3"), "codes is 'int3', wanted 'fp8'"),
        (lambda tensor: tensor.update(shape=[4]), "encoding"),
        (lambda tensor: tensor.update(bytes=64), "its shape and dtype need"),
        (lambda tensor: tensor["encoding"].update(size=1), "unknown key size"),
    ],
)
def test_an_encoding_that_does_not_fit_is_refused(manifest: Manifest, edit: Edit, message: str) -> None:
    document = json.loads(format_manifest(encoded(manifest)))
    edit(document["layers"][0]["tensors"][0])
    with pytest.raises(ManifestError, match=message):
        parse_manifest(json.dumps(document).encode())


def test_absent_experts_are_what_no_deep_expert_has(manifest: Manifest) -> None:
    assert manifest.absent_experts == ((1, 3), (0, 2))


def test_statistics_of_the_alignment_survive(tmp_path: Path, manifest: Manifest) -> None:
    aligned = replace(manifest, alignment=Alignment("profile", {"mass": [0.25, 0.5], "ünits": {"a": None}}))
    write_manifest(tmp_path, aligned)
    assert read_manifest(tmp_path) == aligned


def test_missing_manifest_says_the_store_is_unfinished(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="has not finished"):
        read_manifest(tmp_path)


def test_manifest_that_would_not_read_back_is_not_written(tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(ManifestError, match="does not survive"):
        write_manifest(tmp_path, replace(manifest, alignment=Alignment("index", {"a": (1, 2)})))
    assert read_manifest(tmp_path) == manifest


def test_a_crash_before_the_rename_leaves_the_old_manifest(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_manifest(tmp_path, replace(manifest, alignment=Alignment("profile", {})))
    assert read_manifest(tmp_path) == manifest


REFUSED: dict[str, tuple[Edit, str]] = {
    "another format": (lambda d: d.update(format="zip"), "format is 'zip'"),
    "a newer version": (lambda d: d.update(version=5), "version is 5, this program reads versions 1 to 4"),
    "a missing key": (lambda d: d.pop("model"), "model is missing"),
    "an unknown key": (lambda d: d.update(extra=1), "unknown key.* extra"),
    "an unknown key inside": (lambda d: d["deep_experts"][0].update(extra=1), r"deep_experts\[0\].*unknown key"),
    "a wrong type": (lambda d: d["model"].update(num_layers="2"), "model.num_layers is '2', wanted a valid integer"),
    "a boolean for a number": (lambda d: d["model"].update(top_k=True), "model.top_k is a boolean"),
    "a fraction for a number": (lambda d: d["model"].update(top_k=1.5), "model.top_k is the number 1.5"),
    "an absolute path": (lambda d: d["deep_experts"][0].update(file="/etc/passwd"), "a path inside the store"),
    "a path upwards": (lambda d: d["deep_experts"][0].update(file="experts/../../x"), "a path inside the store"),
    "a path with a null": (lambda d: d["deep_experts"][0].update(file="a\0b"), "a path inside the store"),
    "a trunk file elsewhere": (lambda d: d["trunk"][0].update(name="experts/x"), "below trunk/"),
    "one file twice": (lambda d: d["trunk"].append(d["trunk"][0]), "the same file"),
    "a hash that is none": (lambda d: d["deep_experts"][0].update(sha256="x"), "sha256 is 'x'"),
    "too few hashes": (lambda d: d["deep_experts"][0]["span_hashes"].pop(), "wanted 2 experts and hashes"),
    "half a deep expert": (lambda d: d["deep_experts"][1]["experts"].pop(), "wanted 2 experts"),
    "an expert that does not exist": (lambda d: d["deep_experts"][0].update(experts=[4, 0]), "wanted an id below 4"),
    "an expert twice": (lambda d: d["deep_experts"][1].update(experts=[0, 1]), "no other deep expert has"),
    "no deep expert": (lambda d: d.update(deep_experts=[]), "deep_experts is empty"),
    "deep experts out of order": (lambda d: d["deep_experts"].reverse(), "index does not ascend"),
    "a layer missing": (lambda d: d["layers"].pop(), "layers lists 1 layers"),
    "layers out of order": (lambda d: d["layers"][1].update(model_layer=1), "does not ascend"),
    "overlapping tensors": (lambda d: d["layers"][0]["tensors"][1].update(offset=12), "is at 12, wanted 24"),
    "a tensor too short": (lambda d: d["layers"][0]["tensors"][1].update(bytes=10), "its shape and dtype need 12"),
    "an unknown dtype": (lambda d: d["layers"][0]["tensors"][1].update(dtype="F3"), "dtype is 'F3'"),
    "a span of another size": (lambda d: d["layers"][0].update(span_bytes=37), "do not fill span_bytes 37"),
    "more picks than experts": (lambda d: d["model"].update(top_k=5), "more than num_experts"),
    "an adapter elsewhere": (
        lambda d: d.update(adapters=[{"name": "a", "file": "trunk/a", "bytes": 9, "sha256": "0" * 64}]),
        "below adapters/",
    ),
    "wrong absent experts": (lambda d: d.update(absent_experts=["1", "0,2"]), "absent_experts is not what"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_manifest_is_refused_that_has(name: str) -> None:
    edit, message = REFUSED[name]
    document = json.loads(GOLDEN.read_bytes())
    edit(document)
    with pytest.raises(ManifestError, match=message):
        parse_manifest(json.dumps(document).encode())


def test_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ManifestError, match=r"manifest\.json: it is not JSON"):
        read_manifest(tmp_path)


@given(st.integers(0, GOLDEN.stat().st_size - 1), st.binary(max_size=8))
def test_garbled_manifest_is_refused_or_consistent(at: int, noise: bytes) -> None:
    content = GOLDEN.read_bytes()
    garbled = content[:at] + noise + content[at + len(noise) :]
    try:
        found = parse_manifest(garbled)
    except StoreError:
        return
    assert parse_manifest(format_manifest(found)) == found


@given(st.integers(0, GOLDEN.stat().st_size - 2))
def test_truncated_manifest_is_refused(size: int) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(GOLDEN.read_bytes()[:size])


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda s: st.lists(s) | st.dictionaries(st.text(), s),
        max_leaves=8,
    )
)
def test_any_other_json_is_refused(document: object) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(json.dumps(document).encode())


def test_ids_are_written_as_ranges() -> None:
    assert format_ids((0, 1, 2, 7, 12, 13)) == "0-2,7,12-13"
    assert format_ids(()) == ""
