"""The image and the compose file, checked without an engine: by linters, and against the names in our own code."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.api.app import create_app
from server.cli.main import COMMANDS
from server.serving.metrics import Metrics
from server.serving.service import Service
from server.settings.load import leaves, load_settings
from server.settings.schema import HttpSettings, Settings

REPOSITORY = Path(__file__).resolve().parent.parent
DOCKER = REPOSITORY / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVER: dict[str, Any] = COMPOSE["services"]["server"]


def _instructions(name: str) -> list[str]:
    """What follows an instruction's name, continuation lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    return [line.partition(" ")[2].strip() for line in text.splitlines() if line.startswith(name + " ")]


def _image_environment() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(_instructions("ENV"))))


def _exec_form(instruction: str) -> list[str]:
    words: list[str] = yaml.safe_load(_instructions(instruction)[-1])
    return words


def _seconds(text: str) -> float:
    return float(text.removesuffix("s")) if text.endswith("s") else float(text.removesuffix("m")) * 60


def _tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def _routes() -> set[str]:
    def never_loaded(progress: object) -> Any:
        raise AssertionError("nothing is served here")

    service = Service(never_loaded, stall_seconds=1.0)
    app = create_app(service, Metrics(service, "0"), HttpSettings(), version="0")
    return set(app.openapi()["paths"])


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([_tool("hadolint"), "docker/Dockerfile"], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_compose_file_follows_the_compose_specification() -> None:
    command = [_tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "docker/compose.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
def test_promtool_accepts_the_scrape_configuration() -> None:
    command = ["promtool", "check", "config", "--syntax-only", "docker/prometheus.yml"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_that_is_copied_exists_and_is_let_through() -> None:
    sources = [word for line in _instructions("COPY") if "--from=" not in line for word in line.split()[:-1]]
    assert sources
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    let_through = set(re.findall(r"^!(\S+)", (DOCKER / "Dockerfile.dockerignore").read_text(), flags=re.MULTILINE))
    assert set(sources) == let_through


def test_base_images_have_a_pinned_tag() -> None:
    images = [*re.findall(r"^ARG CUDA_IMAGE=(\S+)", DOCKERFILE, flags=re.MULTILINE)]
    images += [service["image"] for service in COMPOSE["services"].values()]
    assert images
    assert [image for image in images if not re.search(r":v?\d+\.\d+\.\d+", image)] == []


def test_the_image_does_not_run_as_root_and_stops_by_the_signal_that_drains() -> None:
    user = _instructions("USER")[-1]
    assert user.partition(":")[0] not in ("root", "0")
    assert f"--uid {user.partition(':')[0]}" in DOCKERFILE
    assert _instructions("STOPSIGNAL") == ["SIGTERM"]
    assert _exec_form("ENTRYPOINT")[-1].endswith("/deepfew")


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_every_service_is_confined(service: str) -> None:
    settings = COMPOSE["services"][service]
    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith(("127.0.0.1:", "${PUBLISH_ADDRESS:-127.0.0.1}:")) for port in settings.get("ports", []))


def test_commands_and_flags_exist() -> None:
    flags = {leaf.flag for leaf in leaves()}
    for command in [_exec_form("CMD"), SERVER["command"], COMPOSE["services"]["extract"]["command"]]:
        assert command[0] in COMMANDS
        assert [word for word in command if word.startswith("--") and word not in flags] == []


def test_the_environment_resolves_to_settings_that_may_listen() -> None:
    environment = _image_environment() | SERVER["environment"]
    ours = {name: value for name, value in environment.items() if name.startswith("DEEPFEW_")}
    assert set(ours) - {leaf.variable for leaf in leaves()} == set()
    secrets = [ours.pop(name) for name in ("DEEPFEW_API_KEY_FILE", "DEEPFEW_ADMIN_KEY_FILE")]
    assert secrets == [f"/run/secrets/{name}" for name in SERVER["secrets"]]
    resolved = load_settings({"api_key": "a-key-from-a-secret"}, environ=ours).settings
    assert resolved.http.host == "0.0.0.0"
    resolved.require_safe_address()


@pytest.mark.parametrize("name", ["api_key", "admin_key"])
def test_the_key_is_a_secret_that_git_does_not_see(name: str) -> None:
    secret = COMPOSE["secrets"][name]["file"]
    ignored = subprocess.run(["git", "check-ignore", "-q", f"docker/{secret}"], cwd=REPOSITORY)
    assert ignored.returncode in (0, 128), "128: not a git checkout"


def test_only_the_server_has_the_admin_key() -> None:
    has_it = [name for name, service in COMPOSE["services"].items() if "admin_key" in service.get("secrets", [])]
    assert has_it == ["server"]


def test_one_port_everywhere() -> None:
    port = _image_environment()["DEEPFEW_PORT"]
    scrape = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"][0]
    assert _instructions("EXPOSE") == [port]
    assert SERVER["environment"]["DEEPFEW_PORT"] == port
    assert [published.rpartition(":")[2] for published in SERVER["ports"]] == [port]
    assert scrape["static_configs"] == [{"targets": [f"server:{port}"]}]
    assert str(Settings().http.port) == port, "the documentation's curl lines use the default port"


def test_the_container_has_time_to_drain() -> None:
    drain = float(SERVER["environment"]["DEEPFEW_DRAIN_SECONDS"])
    assert _seconds(SERVER["stop_grace_period"]) > drain + 5


def test_the_store_is_a_volume_where_the_commands_look_for_it() -> None:
    assert _instructions("VOLUME") == ["/store /kernels"]
    assert _exec_form("CMD")[1] == "/store"
    for service in ("server", "extract"):
        settings = COMPOSE["services"][service]
        assert "store:/store" in settings["volumes"]
        assert "/store" in settings["command"]


def test_compiled_kernels_outlive_the_container_on_a_volume_that_may_hold_code() -> None:
    assert "kernels:/kernels" in SERVER["volumes"]
    assert any("TRITON_CACHE_DIR=/kernels" in line for line in _instructions("ENV"))
    assert any(" gcc " in line and " python3-dev " in line for line in _instructions("RUN")), "Triton's launchers are C"


def test_the_server_finds_the_checkpoint_where_the_store_was_extracted_from() -> None:
    mounted = [volume for volume in SERVER["volumes"] if ":/checkpoint:" in volume]
    assert mounted == [volume for volume in COMPOSE["services"]["extract"]["volumes"] if ":/checkpoint:" in volume]
    assert COMPOSE["services"]["extract"]["command"][1] == "/checkpoint"


def test_health_and_metrics_urls_are_routes() -> None:
    scrape = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"][0]
    assert {"/health/ready", scrape["metrics_path"]} <= _routes()
    assert scrape["authorization"]["credentials_file"] == "/run/secrets/api_key"
    assert COMPOSE["services"]["prometheus"]["secrets"] == ["api_key"]
