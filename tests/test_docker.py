"""The image and the compose file, checked without an engine: by linters, and against the names in our own code."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from extractor.cli.extract import extract
from server.api.app import create_app
from server.cli.main import COMMANDS
from server.serving.metrics import Metrics
from server.serving.service import Service
from server.settings.load import leaves, load_settings
from server.settings.schema import HttpSettings, Settings

REPOSITORY = Path(__file__).resolve().parent.parent
DOCKER = REPOSITORY / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SERVER: dict[str, Any] = SERVICES["server"]
SERVERS = ("server", "server-cpu")
KEYS = ["/keys/api/key", "/keys/admin/key"]


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
    command = [_tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
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
    images += [service["image"] for service in SERVICES.values()]
    assert images
    assert [image for image in images if not re.search(r":v?\d+\.\d+\.\d+", image)] == []


def test_the_image_does_not_run_as_root_and_stops_by_the_signal_that_drains() -> None:
    user = _instructions("USER")[-1]
    assert user.partition(":")[0] not in ("root", "0")
    assert f"--uid {user.partition(':')[0]}" in DOCKERFILE
    assert _instructions("STOPSIGNAL") == ["SIGTERM"]
    assert _exec_form("ENTRYPOINT")[-1].endswith("/deepfew")


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_confined(service: str) -> None:
    settings = SERVICES[service]
    assert settings["read_only"] is True
    assert settings["cap_drop"] == ["ALL"]
    assert settings["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith(("127.0.0.1:", "${PUBLISH_ADDRESS:-127.0.0.1}:")) for port in settings.get("ports", []))


def test_commands_and_flags_exist() -> None:
    flags = {leaf.flag for leaf in leaves()}
    for command in [_exec_form("CMD"), *(SERVICES[server]["command"] for server in SERVERS)]:
        assert command[0] in COMMANDS
        assert [word for word in command if word.startswith("--") and word not in flags] == []
    assert set(inspect.signature(extract).parameters) >= {"checkpoint", "store", "keep"}
    assert SERVICES["extract"]["command"] == ["extract", "/checkpoint", "/store", "--keep", "${KEEP:-100%}"]


def test_the_environment_resolves_to_settings_that_may_listen() -> None:
    environment = _image_environment() | SERVER["environment"]
    ours = {name: value for name, value in environment.items() if name.startswith("DEEPFEW_")}
    assert set(ours) - {leaf.variable for leaf in leaves()} == set()
    keys = [ours.pop(name) for name in ("DEEPFEW_API_KEY_FILE", "DEEPFEW_ADMIN_KEY_FILE")]
    assert keys == KEYS
    resolved = load_settings({"api_key": "a-key-from-a-secret"}, environ=ours).settings
    assert resolved.http.host == "0.0.0.0"
    resolved.require_safe_address()


def _make_keys(folder: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys, pathlib, make_keys; sys.exit(make_keys.main(pathlib.Path({str(folder)!r})))"
    return subprocess.run([sys.executable, "-c", code], cwd=DOCKER, capture_output=True, text=True)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """The folders that the two volumes are mounted at."""
    for name in ("api", "admin"):
        (tmp_path / "keys" / name).mkdir(parents=True)
    return tmp_path / "keys"


def test_keys_are_made_where_there_are_none_and_stay(keys: Path) -> None:
    (keys / "api" / "key.partial").write_text("cut off")
    assert _make_keys(keys).returncode == 0
    api, admin = keys / "api" / "key", keys / "admin" / "key"
    assert [path.stat().st_mode & 0o777 for path in (api, admin)] == [0o444, 0o400]
    before = api.read_text(), admin.read_text()
    load_settings({"api_key_file": str(api), "admin_key_file": str(admin)}, environ={})  # two keys that a server takes
    again = _make_keys(keys)
    assert again.returncode == 0
    assert (api.read_text(), admin.read_text()) == before
    assert again.stdout.startswith(
        "found the keys; to read them: docker compose run --rm --no-deps --entrypoint cat keys "
    )
    assert before[0] not in again.stdout


def test_keys_that_cannot_be_made_end_the_service_with_one_message(tmp_path: Path) -> None:
    done = _make_keys(tmp_path / "absent")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "the keys cannot be written" in done.stderr


def test_keys_are_mounted_only_where_they_are_needed() -> None:
    mounts = {name: [one for one in service["volumes"] if "-key:" in one] for name, service in SERVICES.items()}
    both = ["api-key:/keys/api:ro", "admin-key:/keys/admin:ro"]
    assert {name: found for name, found in mounts.items() if found} == {
        "keys": ["api-key:/keys/api", "admin-key:/keys/admin"],
        "server": both,
        "server-cpu": both,
        "prometheus": ["api-key:/keys/api:ro"],
    }
    folders = [line for line in _instructions("RUN") if "/keys/api" in line]
    assert folders, "volumes take their owner from the image"
    assert "install -d -o deepfew -g deepfew -m 0700 /keys/admin" in folders[0]


def test_up_alone_serves_once_the_keys_and_the_store_are_there() -> None:
    default = re.findall(r"^COMPOSE_PROFILES=(\w+)$", (REPOSITORY / ".env").read_text(), flags=re.MULTILINE)
    assert {name: SERVICES[name]["profiles"] for name in SERVERS} == {"server": default, "server-cpu": ["cpu"]}
    for name in SERVERS:
        done = {"condition": "service_completed_successfully"}
        assert SERVICES[name]["depends_on"] == {"keys": done, "extract": done}
    for name in ("keys", "extract"):
        assert "profiles" not in SERVICES[name]
        assert SERVICES[name]["restart"] == "no"
    assert SERVICES["keys"]["entrypoint"][1] == "/opt/deepfew/make_keys.py"
    ours = [service for service in SERVICES.values() if service["image"].startswith("deepfew:")]
    assert all(service["pull_policy"] == "build" for service in ours)
    assert all(service["build"] == {"context": ".", "dockerfile": "docker/Dockerfile"} for service in ours)


def test_files_that_are_mounted_from_the_checkout_exist() -> None:
    mounted = {
        one.split(":-")[-1].split(":")[0].rstrip("}") for service in SERVICES.values() for one in service["volumes"]
    }
    sources = {source for source in mounted if source.startswith("./")}
    assert "./models/tiny-moe" in sources
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    named = mounted - sources
    assert named == set(COMPOSE["volumes"])


def test_only_the_gpu_server_asks_for_a_gpu() -> None:
    assert [name for name, service in SERVICES.items() if "deploy" in service] == ["server"]
    assert [SERVICES[name]["command"][3] for name in SERVERS] == ["cuda", "cpu"]


def test_one_port_everywhere() -> None:
    port = _image_environment()["DEEPFEW_PORT"]
    scrape = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"][0]
    assert _instructions("EXPOSE") == [port]
    assert SERVER["environment"]["DEEPFEW_PORT"] == port
    assert [published.rpartition(":")[2] for published in SERVER["ports"]] == [port]
    assert scrape["static_configs"] == [{"targets": [f"deepfew:{port}"]}]
    assert all(SERVICES[server]["networks"]["default"]["aliases"] == ["deepfew"] for server in SERVERS)
    assert str(Settings().http.port) == port, "the documentation's curl lines use the default port"


def test_the_container_has_time_to_drain() -> None:
    drain = float(SERVER["environment"]["DEEPFEW_DRAIN_SECONDS"])
    assert _seconds(SERVER["stop_grace_period"]) > drain + 5


def test_the_store_is_a_volume_where_the_commands_look_for_it() -> None:
    assert _instructions("VOLUME") == ["/store /kernels"]
    assert _exec_form("CMD")[1] == "/store"
    for service in ("server", "extract"):
        settings = SERVICES[service]
        assert "store:/store" in settings["volumes"]
        assert "/store" in settings["command"]


def test_compiled_kernels_outlive_the_container_on_a_volume_that_may_hold_code() -> None:
    assert "kernels:/kernels" in SERVER["volumes"]
    assert any("TRITON_CACHE_DIR=/kernels" in line for line in _instructions("ENV"))
    assert any(" gcc " in line and " python3-dev " in line for line in _instructions("RUN")), "Triton's launchers are C"


def test_the_server_finds_the_checkpoint_where_the_store_was_extracted_from() -> None:
    mounted = [volume for volume in SERVER["volumes"] if ":/checkpoint:" in volume]
    assert mounted == [volume for volume in SERVICES["extract"]["volumes"] if ":/checkpoint:" in volume]
    assert SERVICES["extract"]["command"][1] == "/checkpoint"


def test_health_and_metrics_urls_are_routes() -> None:
    scrape = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"][0]
    assert {"/health/ready", scrape["metrics_path"]} <= _routes()
    assert scrape["authorization"]["credentials_file"] == KEYS[0]
