"""The settings of a cluster: one file for replicas and their cluster."""

from pathlib import Path

import pytest

from server.cluster.settings import read_cluster
from server.errors import SettingsError
from server.settings.load import load_settings


def _file(path: Path, text: str) -> Path:
    path = path / "cluster.toml"
    path.write_text(text)
    return path


def test_without_parts_all_replicas_are_alike(tmp_path: Path) -> None:
    cluster, (part,) = read_cluster(_file(tmp_path, 'store = "s"\n[model]\nslots = 5\n[cluster]\nreplicas = 3\n'), {})
    assert (cluster.fronts, part.name, part.replicas) == (1, "all", 3)
    assert (part.settings.store, part.settings.model.slots) == (Path("s"), 5)


def test_a_part_has_the_settings_of_the_file_and_its_own(tmp_path: Path) -> None:
    text = """
        store = "whole"
        [model]
        slots = 5
        [[cluster.parts]]
        name = "whole"
        [[cluster.parts]]
        name = "law"
        replicas = 2
        profiles = ["law"]
        settings = { store = "law", experts = "0-7" }
    """
    _, (whole, law) = read_cluster(_file(tmp_path, text), {})
    assert (whole.settings.store, whole.settings.model.experts) == (Path("whole"), None)
    assert (law.settings.store, law.settings.model.experts, law.settings.model.slots) == (Path("law"), "0-7", 5)
    assert (law.replicas, law.profiles) == (2, ("law",))


def test_the_same_file_without_its_table_serves_one_replica(tmp_path: Path) -> None:
    path = _file(tmp_path, 'store = "s"\n[cluster]\nreplicas = 2\n')
    with pytest.raises(SettingsError, match=r"unknown key cluster\.replicas"):
        load_settings(config=path, environ={})
    path.write_text('store = "s"\n')
    assert read_cluster(path, {})[1][0].settings == load_settings(config=path, environ={}).settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[cluster]\nreplica = 2", r"cluster\.replica: Extra inputs"),
        ("[cluster]\nreplicas = 0", r"cluster\.replicas: .*greater than or equal to 1"),
        ('[[cluster.parts]]\nname = "a"\n[[cluster.parts]]\nname = "a"', "two parts of cluster.parts have one name"),
        (
            '[[cluster.parts]]\nname = "a"\nprofiles = ["x"]\n[[cluster.parts]]\nname = "b"\nprofiles = ["x"]',
            "profile 'x' is in two parts",
        ),
        ('[[cluster.parts]]\nname = "a"\nsettings = { slot = 3 }', r"unknown key slot \(did you mean slots\?\)"),
        (
            '[[cluster.parts]]\nname = "a"\n[[cluster.parts]]\nname = "b"\nsettings = { grow_step = 4 }',
            r"growth\.grow_step is 1 in the part a and 4 in b, .* give it in the table \[growth\]",
        ),
        (
            '[[cluster.parts]]\nname = "a"\nsettings = { api_key = "only-for-a" }\n[[cluster.parts]]\nname = "b"',
            r"http\.api_key is \*+ in the part a and None in b",
        ),
        ("[model]\nslot = 3", r"unknown key model\.slot"),
        ("[cluster", "cannot read the cluster's settings"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_cluster(_file(tmp_path, text), {})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot read the cluster's settings from .*absent"):
        read_cluster(tmp_path / "absent.toml", {})
