"""The compose file and the manifest of many replicas, checked without an engine and without Kubernetes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.cluster.settings import read_cluster

REPOSITORY = Path(__file__).resolve().parent.parent
DOCKER = REPOSITORY / "docker"
CLUSTER: dict[str, Any] = yaml.safe_load((DOCKER / "compose.cluster.yaml").read_text())
SERVICES: dict[str, Any] = CLUSTER["services"]
CONFIG_MAP, RAY_SERVICE = yaml.safe_load_all((DOCKER / "rayservice.yaml").read_text())
POD_CONTAINERS = [
    RAY_SERVICE["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"],
    *(group["template"]["spec"] for group in RAY_SERVICE["spec"]["rayClusterConfig"]["workerGroupSpecs"]),
]


def _check(*arguments: str) -> None:
    beside = Path(sys.executable).parent / "check-jsonschema"
    tool = str(beside) if beside.exists() else "check-jsonschema"
    done = subprocess.run([tool, *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_follows_the_compose_specification() -> None:
    _check("--builtin-schema", "vendor.compose-spec", "docker/compose.cluster.yaml")


def test_the_services_are_confined_and_their_files_exist() -> None:
    of_base: dict[str, Any] = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
    for service in SERVICES.values():
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["build"]["args"] == {"EXTRAS": "[ray]"}
        assert set(service["depends_on"]) <= set(of_base["services"])
        for volume in service["volumes"]:
            source = volume.split(":-")[-1].split(":")[0].rstrip("}")
            assert (REPOSITORY / source).exists() if source.startswith("./") else source in of_base["volumes"]
    assert SERVICES["head"]["networks"] == of_base["services"]["server"]["networks"]
    assert SERVICES["replica"]["deploy"]["replicas"] == read_cluster(DOCKER / "cluster.toml", {})[0].replicas


def test_the_image_takes_the_extra() -> None:
    assert 'ARG EXTRAS=""' in (DOCKER / "Dockerfile").read_text()
    assert 'constraints.txt ".${EXTRAS}"' in (DOCKER / "Dockerfile").read_text()


def test_the_manifest_follows_its_schema(tmp_path: Path) -> None:
    path = tmp_path / "rayservice.json"
    path.write_text(json.dumps(RAY_SERVICE))
    _check("--schemafile", "docker/rayservice.schema.json", str(path))


def test_the_settings_of_the_manifest_are_those_of_a_cluster(tmp_path: Path) -> None:
    text = CONFIG_MAP["data"]["cluster.toml"]
    for name in ("api-key", "admin-key"):
        (tmp_path / name).write_text(f"the-{name}-of-a-test")
        text = text.replace(f"/keys/{name}", str(tmp_path / name))
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    cluster, (part,) = read_cluster(path, {})
    workers = RAY_SERVICE["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert part.replicas == workers["replicas"]
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(int(cluster.gpus_per_replica))
    serve = yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"])
    assert serve["http_options"] == {"host": part.settings.http.host, "port": part.settings.http.port}
    mounts = {mount["mountPath"] for pod in POD_CONTAINERS for mount in pod["containers"][0]["volumeMounts"]}
    (application,) = serve["applications"]
    assert str(Path(application["args"]["config"]).parent) in mounts
    assert str(part.settings.store) in mounts


def test_volumes_of_the_manifest_are_declared() -> None:
    for pod in POD_CONTAINERS:
        names = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == names


def test_ray_reads_the_manifest_and_finds_the_application() -> None:
    pytest.importorskip("ray.serve")
    from ray.serve.schema import ServeDeploySchema

    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"])).applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
