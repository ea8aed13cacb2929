"""Builds the settings: every key is also a flag and an environment variable.

Precedence: flag, environment, file, default; `Resolved.origins` names the source of each key's value. Only this module
reads the environment.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from extractor.planning.sizes import parse_size
from server.errors import SettingsError
from server.settings.schema import Section, Settings

ENV_PREFIX = "DEEPFEW_"
CONFIG_VARIABLE = "DEEPFEW_CONFIG"


@dataclass(frozen=True)
class Leaf:
    """One key: its dotted path, its flag, its variable, and its pydantic field."""

    path: str
    info: FieldInfo

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()


@dataclass(frozen=True)
class Resolved:
    """Settings, and for each dotted path the origin of its value: flag, variable, file or default."""

    settings: Settings
    origins: Mapping[str, str]

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(dotted path, value as text with secrets hidden, origin) of every key, in order of declaration."""
        for leaf in leaves():
            value: Any = self.settings
            for part in leaf.path.split("."):
                value = getattr(value, part)
            text = "" if value is None else "(hidden)" if isinstance(value, SecretStr) else str(value)
            yield leaf.path, text, self.origins.get(leaf.path, "default")


def leaves() -> list[Leaf]:
    """Every key in order of declaration."""
    found: list[Leaf] = []
    for name, info in Settings.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found.extend(Leaf(f"{name}.{key}", field) for key, field in section.model_fields.items())
        else:
            found.append(Leaf(name, info))
    return found


def cache_directory() -> Path:
    """The user's folder for what can be measured again (XDG_CACHE_HOME, else ~/.cache); it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepfew"


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    other_tables: Collection[str] = (),
) -> Resolved:
    """Layer flags over environment over file over defaults.

    Args:
        flags: leaf name → value, as the command line gave them; None values are left out.
        config: settings file (TOML); without it the file that DEEPFEW_CONFIG names, if any.
        environ: the environment, `os.environ` by default.
        other_tables: tables of the file that are not settings of a server.

    Raises:
        SettingsError: an unknown key, variable or flag; a value that does not parse; an unreadable file.
    """
    environ = os.environ if environ is None else environ
    if config is None and environ.get(CONFIG_VARIABLE):
        config = Path(environ[CONFIG_VARIABLE])
    by_name = {leaf.name: leaf for leaf in leaves()}
    values: dict[str, tuple[Any, str]] = {}
    if config is not None:
        values.update(_file_values(config, other_tables))
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable == CONFIG_VARIABLE:
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        if name not in by_name:
            raise SettingsError(
                f"unknown environment variable {variable}"
                + _suggestion(name, by_name, lambda near: by_name[near].variable)
                + ". `deepfew config` lists all keys."
            )
        values[by_name[name].path] = (text, f"variable {variable}")
    for name, value in (flags or {}).items():
        if value is not None:
            if name not in by_name:
                raise SettingsError(f"unknown key {name}" + _suggestion(name, by_name, str))
            values[by_name[name].path] = (value, f"flag {by_name[name].flag}")
    return _build(values)


def _file_values(config: Path, other_tables: Collection[str]) -> dict[str, tuple[Any, str]]:
    try:
        document = tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {config}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"the settings file {config} is not TOML: {error}") from error
    known = {leaf.path: leaf for leaf in leaves()}
    sections = {path.partition(".")[0] for path in known if "." in path}
    values: dict[str, tuple[Any, str]] = {}
    for key, value in document.items():
        if key in other_tables:
            continue
        entries = {f"{key}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {key: value}
        for path, item in entries.items():
            if path not in known:
                candidates = {**known, **dict.fromkeys(sections)}
                raise SettingsError(f"unknown key {path} in {config}" + _suggestion(path, candidates, str))
            values[path] = (item, f"file {config}")
    return values


def _suggestion(name: str, known: Mapping[str, Any], render: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {render(near[0])}?)" if near else ""


def _build(values: Mapping[str, tuple[Any, str]]) -> Resolved:
    values = dict(values)
    _read_keys(values)
    nested: dict[str, Any] = {}
    for path, (value, origin) in values.items():
        if path.endswith("_bytes") and isinstance(value, str):
            try:
                value = parse_size(value)
            except ValueError as error:
                raise SettingsError(f"{path} from {origin}: {error}") from error
        section, _, key = path.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = value
    try:
        settings = Settings(**nested)
    except ValidationError as error:
        problems = []
        for problem in error.errors(include_input=False, include_url=False):
            path = ".".join(str(part) for part in problem["loc"][:2])
            origin = values[path][1] if path in values else "the settings"
            problems.append(f"{path} from {origin}: {problem['msg'].removeprefix('Value error, ')}")
        raise SettingsError("; ".join(dict.fromkeys(problems))) from error
    return Resolved(settings, {path: origin for path, (_, origin) in values.items()})


def _read_keys(values: dict[str, tuple[Any, str]]) -> None:
    for name, title in (("api_key", "API key"), ("admin_key", "admin key")):
        _read_key(values, f"http.{name}", title)
    api_key, admin_key = (values.get(f"http.{name}") for name in ("api_key", "admin_key"))
    if api_key is not None and admin_key is not None and api_key[0] == admin_key[0]:
        raise SettingsError(
            f"the admin key from {admin_key[1]} is the API key from {api_key[1]}; the admin key must be another, since "
            "whoever has the API key must not have it"
        )


def _read_key(values: dict[str, tuple[Any, str]], key_path: str, title: str) -> None:
    """Put the key that `{key_path}_file` names into `key_path`. An empty variable counts as not set."""
    file_path = f"{key_path}_file"
    for path in (key_path, file_path):
        if path in values and values[path][0] == "" and values[path][1].startswith("variable "):
            del values[path]
    if file_path in values:
        if key_path in values:
            first, second = values[key_path][1], values[file_path][1]
            raise SettingsError(f"the {title} is set twice, by {first} and by {second}; set one of them")
        file, origin = values[file_path]
        try:
            values[key_path] = (Path(file).read_text(encoding="utf-8").strip(), f"file {file}")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"cannot read the {title} file {file} (from {origin}): {error}") from error
    if key_path in values:
        key, origin = values[key_path]
        if not isinstance(key, str) or len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
            raise SettingsError(
                f"the {title} from {origin} must be at least 8 printable ASCII characters without spaces; "
                "`openssl rand -hex 24` makes a good one"
            )
