"""Copies of a store: the same content, shared files, and changes that stay apart."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from expert_store.copying import copy_store
from expert_store.errors import ManifestError
from expert_store.integrity import verify_files
from expert_store.manifest import MANIFEST_NAME, read_manifest, write_manifest
from tests.expert_store.hand_made import grow_store, write_store


def test_a_copy_is_the_store_and_shares_its_files(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    (tmp_path / "store" / "usage.json").write_text("{}")
    manifest = copy_store(tmp_path / "store", tmp_path / "copy")
    assert manifest == read_manifest(tmp_path / "store") == read_manifest(tmp_path / "copy")
    shard = manifest.deep_experts[0].file
    assert (tmp_path / "copy" / shard).samefile(tmp_path / "store" / shard)
    verify_files(tmp_path / "copy", manifest)
    assert not (tmp_path / "copy" / "usage.json").exists()


def test_files_are_copied_where_they_cannot_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*paths: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    write_store(tmp_path / "store")
    monkeypatch.setattr(os, "link", refused)
    manifest = copy_store(tmp_path / "store", tmp_path / "copy")
    assert not (tmp_path / "copy" / manifest.deep_experts[0].file).samefile(
        tmp_path / "store" / manifest.deep_experts[0].file
    )
    verify_files(tmp_path / "copy", manifest)


def test_a_copy_that_was_broken_off_is_finished_and_one_that_grew_is_left_as_it_is(tmp_path: Path) -> None:
    manifest, copy = write_store(tmp_path / "store"), tmp_path / "copy"
    copy_store(tmp_path / "store", copy)
    (copy / MANIFEST_NAME).unlink()
    (copy / manifest.deep_experts[0].file).unlink()
    copy_store(tmp_path / "store", copy)
    verify_files(copy, manifest)
    grown = grow_store(copy, manifest, (3, 0))
    assert copy_store(tmp_path / "store", copy) == grown
    assert read_manifest(tmp_path / "store") == manifest


def test_a_store_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    other = write_store(tmp_path / "copy")
    write_manifest(tmp_path / "copy", replace(other, source=replace(other.source, fingerprint="0" * 64)))
    with pytest.raises(ManifestError, match="is a store of the checkpoint"):
        copy_store(tmp_path / "store", tmp_path / "copy")
