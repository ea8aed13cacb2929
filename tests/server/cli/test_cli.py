"""The `deepfew` command from outside: what it says, what it exits with, and that a server ends as it should."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.cli.main import COMMANDS, main
from server.cli.port import holder_of
from server.settings.load import leaves
from tests.server.cli.processes import Server, deepfew


@pytest.fixture(scope="module")
def store(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint, a quarter of it."""
    found = tmp_path_factory.mktemp("store") / "tiny"
    assert main(["extract", str(tiny_checkpoint), str(found), "--experts", "0-15"]) == 0
    return found


def test_help_lists_every_command_and_loads_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "pydantic", "fastapi")
    loaded = f"print([name for name in {heavy} if name in sys.modules])"
    code = f"import sys; from server.cli.main import main; main(['--help']); {loaded}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(f" {name} " in found for name in COMMANDS)
    assert found.rstrip().endswith("[]")
    assert "To begin" in found


@pytest.mark.parametrize(
    ("given", "wanted"), [({}, "10000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "5"}, "5")]
)
def test_threads_spin_briefly_unless_told_otherwise(given: dict[str, str], wanted: str) -> None:
    code = "import os; from server.cli.main import main; main(['config']); print(os.environ.get('GOMP_SPINCOUNT'))"
    ways = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environ = {name: value for name, value in os.environ.items() if name not in ways} | given
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
    assert found.stdout.splitlines()[-1] == wanted


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"deepfew \S+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["srve"], "No such command 'srve'. Did you mean 'serve'?; `deepfew --help` says more"),
        (["serve"], "no store is named"),
        (["serve", "/does/not/exist"], "/does/not/exist"),
        (["serve", "x", "--port", "http"], "http.port from flag --port"),
        (["serve", "x", "--host", "0.0.0.0"], "no API key is set"),
        (["serve", "x", "--config", "/does/not/exist.toml"], "cannot read the settings file"),
        (["generate", "/does/not/exist", "a"], "/does/not/exist"),
        (["generate", "x", ""], "the prompt is empty"),
        (["generate", "x", "a", "--temperature", "nan"], "temperature is nan"),
        (["generate", "x", "a", "--max-new-tokens", "0"], "max_new_tokens is 0; at least 1 is needed"),
        (
            ["generate", "x", "a", "--device", "tpu"],
            "model.device from flag --device: 'tpu' is no device",
        ),
        (["serve", "x", "--slots-memory", "8 apples"], "model.slots_memory from flag --slots-memory: '8 apples'"),
        (
            ["generate", "x", "a", "--no-such-flag"],
            "--no-such-flag; `deepfew generate --help` says more",
        ),
        (["serve", "x", "--dtype", "int4"], "'int4' is not one of 'auto', 'float32'"),
        (["serve", "x", "--api-key", ""], "the API key from flag --api-key must be at least 8"),
        (["serve", "x", "--admin-key-file", ""], "cannot read the admin key file"),
        (["config", "--por", "1"], "--por"),
    ],
)
def test_what_is_wrong_is_said_in_one_message_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    found = capsys.readouterr()
    assert found.err.startswith("error: ")
    assert message in found.err.replace("\n", " ")
    assert "Traceback" not in found.err


def test_config_shows_values_with_their_origins(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--port", "9", "--json", "--api-key", "0123456789"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["http.port"] == {"value": "9", "from": "flag --port"}
    assert found["http.host"] == {"value": "127.0.0.1", "from": "default"}
    assert "0123456789" not in text
    assert main(["config"]) == 0
    table = capsys.readouterr().out
    assert "DEEPFEW_PORT" in table
    assert main(["config", "--profiles", "/a/long/path" * 20]) == 0
    wide = capsys.readouterr().out
    assert "/a/long/path" * 20 in wide
    assert all(leaf.variable in table and leaf.variable in wide for leaf in leaves())


def test_holder_of_a_port_is_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        if Path("/proc/net/tcp").exists():
            assert f"process {os.getpid()} " in holder_of(port)
            assert main(["serve", "--port", str(port), "--config", os.devnull, "/dev/null"]) == 2
    assert holder_of(port, proc=Path("/does/not/exist")) == ""


PARIS = ("The capital of France is", "--max-new-tokens", "5", "--slots", "8")


def generated(store: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON object of `deepfew generate`, run in this process."""
    assert main(["generate", str(store), *PARIS, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_prints_the_text_or_one_json_object(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = deepfew("generate", str(store), *PARIS)
    assert plain.returncode == 0, plain.stderr
    summary = generated(store, capsys)
    assert plain.stdout == summary["generated_text"] + "\n"
    assert 0 < summary["deficit"]["overall"] < 1
    assert summary["generated_tokens"] <= 5
    assert plain.stderr == ""


def test_generate_takes_masks_for_its_prompt(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, pool = (generated(store, capsys, *more)["deficit"] for more in ((), ("--pool", "8")))
    assert 0 < plain["overall"] < pool["overall"]
    assert pool["top1_missing_tokens"] > 0
    for more, message in (
        (("--pool", "many"), "is no number of experts"),
        (("--router-temperature", "0"), "--router-temperature is 0.0"),
    ):
        assert main(["generate", str(store), *PARIS, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(store, tmp_path_factory.mktemp("log") / "log", "--slots", "8", "--dtype", "float32")
    try:
        found.wait_for("/health/live", 60)
        found.wait_for("/health/ready")
        yield found
    finally:
        found.kill()


def test_server_answers_and_says_what_the_mask_cost(server: Server) -> None:
    body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 4, "details": True}}
    answer = httpx.post(server.url + "/generate", json=body, timeout=60).json()
    assert 0 < answer["details"]["deficit"]["overall"] < 1
    assert len(answer["details"]["deficit"]["per_layer"]) == 8
    experts = httpx.get(server.url + "/experts", timeout=10).json()
    assert experts["totals"]["available"] == 8 * 16
    assert experts["totals"]["resident"] == 8 * 8
    assert experts["totals"]["misses"] > 0
    assert experts["totals"]["demand"] == experts["totals"]["uses"] > 0
    assert sum(sum(row[16:]) for row in experts["uses"]) == 0
    assert sum(sum(row[16:]) for row in experts["demand"]) > 0


def test_disconnect_frees_the_row_and_the_server_goes_on(server: Server) -> None:
    body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 900}}
    with server.post("/generate_stream", body) as connection:
        while b"data:" not in connection.recv(4096):
            pass
    until = time.monotonic() + 20
    while "deepfew_requests_running 0.0" not in httpx.get(server.url + "/metrics", timeout=10).text:
        assert time.monotonic() < until
        time.sleep(0.05)
    text = httpx.get(server.url + "/metrics", timeout=10).text
    assert "deepfew_kv_used_tokens 0.0" in text


def test_second_server_on_the_port_names_the_holder(server: Server, store: Path) -> None:
    found = deepfew("serve", str(store), "--port", str(server.port))
    assert found.returncode == 2
    assert f"port {server.port} is in use" in found.stderr
    assert "--port" in found.stderr


def test_sigterm_finishes_what_runs_saves_usage_and_exits_0(server: Server, store: Path) -> None:
    body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 40}}
    with httpx.stream("POST", server.url + "/generate_stream", json=body, timeout=60) as response:
        chunks = response.iter_text()
        first = next(chunks)
        server.process.send_signal(signal.SIGTERM)
        text = first + "".join(chunks)
    assert '"generated_text":"' in text.rpartition("data: ")[2]
    assert server.process.wait(20) == 0
    assert (store / "usage.json").exists()
    records = server.records()
    assert records[-1]["message"] == "stopped"
    assert "Once upon" not in server.log.read_text()


@pytest.mark.exhaustive
def test_killed_server_starts_again_with_the_usage_that_was_saved(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    (copy / "usage.json").unlink(missing_ok=True)
    texts = []
    for number in range(2):
        found = Server(copy, tmp_path / f"log{number}", "--dtype", "float32", "--usage-save-seconds", "0.1")
        try:
            found.wait_for("/health/live")
            found.wait_for("/health/ready")
            before = found.wait_for("/experts")["totals"]["tokens"]
            assert (before > 0) == (number == 1)
            body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 40}}
            texts.append(httpx.post(found.url + "/generate", json=body, timeout=60).json()["generated_text"])
            until = time.monotonic() + 20
            while not (copy / "usage.json").exists():
                assert time.monotonic() < until
                httpx.post(found.url + "/generate", json=body, timeout=60)
                time.sleep(0.1)
        finally:
            found.kill()
    assert texts[0] == texts[1]
    left = {path.name.removesuffix(".partial") for path in copy.iterdir()} - {"statistics.safetensors"}
    assert left == {"experts", "manifest.json", "trunk", "usage.json"}


@pytest.mark.exhaustive
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root can become somebody else")
def test_user_without_rights_on_the_store_can_serve_it(store: Path) -> None:
    nobody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    may_read = (
        subprocess.run([*nobody, sys.executable, "-c", "import server.cli.main, torch"], check=False).returncode == 0
    )
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        copy = Path(folder) / "store"
        shutil.copytree(store, copy)
        Path(folder).chmod(0o755)
        (copy / "usage.json").unlink(missing_ok=True)
        if not may_read or subprocess.run([*nobody, "ls", str(copy)], check=False, capture_output=True).returncode:
            pytest.skip("the interpreter or the temporary folder is closed to other users")
        found = Server(copy, Path(folder) / "log", "--usage-save-seconds", "0.1", before=nobody)
        try:
            found.wait_for("/health/live")
            found.wait_for("/health/ready")
            body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 20}}
            assert httpx.post(found.url + "/generate", json=body, timeout=60).status_code == 200
            found.process.send_signal(signal.SIGTERM)
            assert found.process.wait(30) == 0
            assert "could not be saved" in found.log.read_text()
            assert not (copy / "usage.json").exists()
        finally:
            found.kill()


def test_sigterm_while_loading_exits_0(store: Path, tmp_path: Path) -> None:
    found = Server(store, tmp_path / "log")
    try:
        found.wait_for("/health/live")
        found.process.send_signal(signal.SIGTERM)
        assert found.process.wait(30) == 0
        assert "Traceback" not in found.log.read_text()
    finally:
        found.kill()


def test_store_that_cannot_be_loaded_ends_the_server_with_one_message(store: Path, tmp_path: Path) -> None:
    """One process serves in vain several times."""
    altered = shutil.copytree(store, tmp_path / "altered")
    (weights,) = (altered / "trunk").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    cases = [
        (store, ["--experts", "60-63"], "expert"),  # the mask, before the engine's thread begins
        (store, ["--slots-memory", "1KiB"], "at least"),  # the memory, on the engine's thread
        (store, ["--max-context-tokens", "1000000"], "max_context_tokens is 1000000"),
        (altered, [], f"{weights}: sha256 is"),
        (altered, [], "extract into an empty directory"),
    ]
    code = "import json, sys\nfrom server.cli.main import main\nprint([main(line) for line in json.loads(sys.argv[1])])"
    lines = [["serve", str(path), "--port", "0", "--log-level", "error", *flags] for path, flags, _ in cases]
    found = subprocess.run(
        [sys.executable, "-c", code, json.dumps(lines)], capture_output=True, text=True, timeout=300, check=False
    )
    assert found.stdout.splitlines()[-1] == str([2] * len(cases)), found.stderr
    for record, (_, _, message) in zip(map(json.loads, found.stderr.splitlines()), cases, strict=True):
        assert record["level"] == "error"
        assert message in record["message"]
        assert "exception" not in record


@pytest.mark.parametrize(
    ("command", "usage", "words"),
    [
        ("extract", "deepfew extract [OPTIONS] {CHECKPOINT} {STORE}", ["--plan FILE", "--count N", "--json Print"]),
        ("calibrate", "deepfew calibrate [OPTIONS] {SOURCE} {TEXTS}...", ["--out FILE", "--price N", "--no-weights"]),
        ("plan", "deepfew plan [OPTIONS]", ["--stats FILE", "--quota DOMAIN=SHARE", "--budget SIZE"]),
        ("serve", "deepfew serve [OPTIONS] [STORE]", ["--port PORT", "--no-log-prompts", "--slots-memory MEMORY"]),
        ("generate", "deepfew generate [OPTIONS] {STORE} {PROMPT}", ["--seed N", "--device DEVICE", "--config FILE"]),
    ],
)
def test_help_names_values_in_plain_words(
    command: str, usage: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    plain = " ".join(shown.replace("│", " ").split())
    assert usage in plain
    assert [word for word in words if word not in plain] == []
    options = plain.partition("Options")[2].replace("--help -h <bool>", "")  # which typer writes itself
    assert not re.search(r"<(str|path|bool|int|float|list)", options)
