"""Settings: one frozen object, every key a flag, a variable and a file entry; unknown keys are errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from server.errors import SettingsError
from server.settings.load import leaves, load_settings
from server.settings.schema import Settings, is_loopback
from server.settings.values import MemoryAmount


def test_names_of_keys_are_unique_over_all_sections() -> None:
    names = [leaf.name for leaf in leaves()]
    assert len(names) == len(set(names))
    assert all(leaf.info.description for leaf in leaves())


def test_flag_beats_variable_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "deepfew.toml"
    file.write_text('store = "here"\n[http]\nport = 1\nhost = "::1"\n[engine]\nmax_batch_size = 3\n')
    environ = {"DEEPFEW_PORT": "2", "DEEPFEW_HOST": "127.0.0.2", "DEEPFEW_CONFIG": str(file), "PATH": "/bin"}
    resolved = load_settings({"port": "3", "host": None}, environ=environ)
    assert resolved.settings.http.port == 3
    assert resolved.settings.http.host == "127.0.0.2"
    assert resolved.settings.engine.max_batch_size == 3
    assert resolved.settings.store == Path("here")
    origins = {path: origin for path, _, origin in resolved.rows()}
    assert origins["http.port"] == "flag --port"
    assert origins["http.host"] == "variable DEEPFEW_HOST"
    assert origins["engine.max_batch_size"] == f"file {file}"
    assert origins["model.device"] == "default"


def test_settings_are_frozen() -> None:
    settings = load_settings(environ={}).settings
    with pytest.raises(ValidationError):
        settings.http.port = 1
    with pytest.raises(ValidationError):
        settings.store = Path("x")


@pytest.mark.parametrize(
    ("environ", "text", "message"),
    [
        ({"DEEPFEW_PROT": "1"}, "", r"unknown environment variable DEEPFEW_PROT \(did you mean DEEPFEW_PORT\?\)"),
        ({}, "[http]\nprot = 1\n", r"unknown key http\.prot in .*did you mean http\.port"),
        ({}, "[htpt]\nport = 1\n", r"unknown key htpt\.port .*did you mean http\.port"),
        ({}, "port = 1\n", r"unknown key port"),
        ({}, "[http\n", "is not TOML"),
        ({"DEEPFEW_PORT": "eighty"}, "", r"http\.port from variable DEEPFEW_PORT: .*integer"),
        ({"DEEPFEW_PORT": "70000"}, "", r"http\.port from variable DEEPFEW_PORT: .*65535"),
        ({"DEEPFEW_SLOTS": "0"}, "", r"model\.slots from variable DEEPFEW_SLOTS: .*greater than or equal to 1"),
        ({"DEEPFEW_SLOTS": "4", "DEEPFEW_SLOTS_MEMORY": "1GiB"}, "", "slots and slots_memory are both set"),
        ({"DEEPFEW_SLOTS_MEMORY": "120%"}, "", r"'120%' is not a share"),
        ({"DEEPFEW_DEVICE": "cuda:x"}, "", r"model\.device from variable DEEPFEW_DEVICE: 'cuda:x' is no device"),
        ({"DEEPFEW_MAX_BODY_BYTES": "4 apples"}, "", r"'4 apples' is not a size"),
        ({"DEEPFEW_SEND_SECONDS": "inf"}, "", r"http\.send_seconds .*finite"),
        ({"DEEPFEW_API_KEY": "short"}, "", "at least 8 printable ASCII"),
        ({"DEEPFEW_API_KEY_FILE": "/does/not/exist"}, "", "cannot read the API key file /does/not/exist"),
    ],
)
def test_wrong_setting_is_named_with_its_origin(
    tmp_path: Path, environ: dict[str, str], text: str, message: str
) -> None:
    file = tmp_path / "deepfew.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_settings(config=file, environ=environ)


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read the settings file"):
        load_settings(config=tmp_path / "none.toml", environ={})


def test_key_comes_from_a_file_and_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("0123456789abcdef\n")
    resolved = load_settings({"api_key_file": str(file)}, environ={"DEEPFEW_API_KEY": ""})
    key = resolved.settings.http.api_key
    assert key is not None
    assert key.get_secret_value() == "0123456789abcdef"
    rows = {path: (value, origin) for path, value, origin in resolved.rows()}
    assert rows["http.api_key"] == ("(hidden)", f"file {file}")
    assert "0123456789abcdef" not in repr(resolved)


def test_key_given_twice_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("0123456789abcdef")
    with pytest.raises(SettingsError, match="set twice"):
        load_settings({"api_key_file": str(file)}, environ={"DEEPFEW_API_KEY": "fedcba9876543210"})


def test_admin_key_is_another_key(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("0123456789abcdef")
    resolved = load_settings({"admin_key_file": str(file)}, environ={"DEEPFEW_API_KEY": "fedcba9876543210"})
    key = resolved.settings.http.admin_key
    assert key is not None
    assert key.get_secret_value() == "0123456789abcdef"
    assert "0123456789abcdef" not in repr(resolved)
    with pytest.raises(SettingsError, match="the admin key must be another"):
        load_settings({"admin_key_file": str(file)}, environ={"DEEPFEW_API_KEY": "0123456789abcdef"})
    with pytest.raises(SettingsError, match=r"the admin key from .* must be at least 8"):
        load_settings(environ={"DEEPFEW_ADMIN_KEY": "short"})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", ""])
def test_without_a_key_only_loopback_is_listened_on(host: str) -> None:
    if not host:
        with pytest.raises(SettingsError):
            load_settings({"host": host}, environ={})
        return
    with pytest.raises(SettingsError, match="no API key is set"):
        load_settings({"host": host}, environ={}).settings.require_safe_address()
    load_settings({"host": host}, environ={"DEEPFEW_API_KEY": "0123456789"}).settings.require_safe_address()


def test_loopback_needs_no_key() -> None:
    for host in ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
        load_settings({"host": host}, environ={}).settings.require_safe_address()


def test_nothing_else_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE", "from-the-environment")
    monkeypatch.setenv("HTTP", '{"port": 1}')
    assert Settings() == load_settings(environ={}).settings


def test_memory_is_bytes_or_a_share() -> None:
    assert MemoryAmount.parse("25%").resolve(1000) == 250
    assert MemoryAmount.parse("1KiB").resolve(1000) == 1024
    for text in ("25%", "0.5%", "1024"):
        assert str(MemoryAmount.parse(text)) == text
    for text in ("0%", "101%", "-1%", "x%", "%"):
        with pytest.raises(ValueError, match="is not a share"):
            MemoryAmount.parse(text)
