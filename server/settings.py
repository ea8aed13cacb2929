"""The one settings object: frozen, nested, unknown keys refused, every key also a flag and an environment variable.

Invariant: a leaf's name is unique over all sections, so that `http.port` is at once the key `port` of the section
`[http]` in the settings file, the flag `--port` and the variable `DEEPFEW_PORT`. Precedence: flag, environment, file,
default; `Resolved.origins` says for each key which of them won. This module alone reads the environment.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from server.settings_values import MemoryAmount, parse_size

ENV_PREFIX = "DEEPFEW_"
CONFIG_VARIABLE = "DEEPFEW_CONFIG"

Bytes = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SettingsError(Exception):
    """A setting that is unknown, malformed, or that contradicts another; the message names the key and its origin."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelSettings(_Section):
    """What is loaded, where to, and how much of it stays close."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs; auto takes a GPU if any")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the computation; auto keeps the store's"
    )
    experts: str | None = Field(
        None, description="mask: serve only these experts of every layer, for instance 0-7,12; default all in the store"
    )
    slots: Annotated[int, Field(ge=1)] | None = Field(None, description="expert slots in every layer on the device")
    slots_memory: MemoryAmount | None = Field(
        None, description="memory for slots, for instance 8GiB, or 25% of the store's experts; instead of --slots"
    )
    host_memory: MemoryAmount | None = Field(
        None, description="memory for experts on the host behind the slots, for instance 32GiB or 100%"
    )

    @model_validator(mode="after")
    def _one_way_to_say_slots(self) -> ModelSettings:
        if self.slots is not None and self.slots_memory is not None:
            raise ValueError("slots and slots_memory are both set; set one of them")
        return self


class EngineSettings(_Section):
    """How many requests run and wait, and how long they may be."""

    max_batch_size: Annotated[int, Field(ge=1, le=1024)] = Field(8, description="requests decoded together")
    max_context_tokens: Annotated[int, Field(ge=2)] | None = Field(
        None, description="prompt and new tokens of one request together; default: the model's own limit, at most 8192"
    )
    max_queue_requests: Annotated[int, Field(ge=0)] = Field(128, description="waiting requests before 429")
    max_queue_tokens: Annotated[int, Field(ge=1)] = Field(
        262_144, description="prompt tokens of waiting requests before 429"
    )
    prefill_chunk_tokens: Annotated[int, Field(ge=1)] = Field(
        256, description="prompt tokens computed at once, so that a long prompt does not stall the others"
    )
    stall_seconds: Seconds = Field(
        120.0, description="a busy engine without a finished step for this long is unhealthy"
    )


class HttpSettings(_Section):
    """Address, key, and the limits on what a client can make grow."""

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; beyond loopback needs a key")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8080, description="port to listen on; 0 takes a free one")
    api_key: SecretStr | None = Field(None, description="key that guards every route but liveness")
    api_key_file: Path | None = Field(None, description="file that holds the key, rather than the key itself")
    max_body_bytes: Bytes = Field(4 * 2**20, description="longest request body, for instance 4MiB")
    max_header_bytes: Annotated[int, Field(ge=1024)] = Field(32 * 2**10, description="longest request line and headers")
    max_connections: Annotated[int, Field(ge=1)] = Field(1024, description="open connections before 503")
    receive_seconds: Seconds = Field(20.0, description="time a client has to send its headers, and again its body")
    send_seconds: Seconds = Field(
        60.0, description="time a client may leave a stream unread before its request is cancelled"
    )
    keep_alive_seconds: Seconds = Field(15.0, description="interval of comments that keep an idle stream open")
    idle_seconds: Annotated[int, Field(ge=1)] = Field(15, description="time an idle connection is kept")
    max_request_seconds: Seconds = Field(3600.0, description="longest time for one generation, waiting included")
    drain_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        25.0, description="time running requests have to finish after SIGTERM"
    )
    max_prompts: Annotated[int, Field(ge=1)] = Field(
        16, description="completions that one OpenAI request may ask for (prompts times n)"
    )


class UsageSettings(_Section):
    """The ledger of what was served and wanted."""

    usage_save_seconds: Seconds = Field(60.0, description="interval between snapshots of usage.json in the store")


class LogSettings(_Section):
    """What is logged and how."""

    log_format: Literal["auto", "text", "json"] = Field("auto", description="auto: text on a terminal, else JSON lines")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level to log")
    log_prompts: bool = Field(False, description="log prompts and whole answers (never by default)")


class Settings(BaseSettings):
    """Everything that can be set. Built by `load_settings`; leaves get plain values, never this object."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=True)

    store: Path | None = Field(None, description="directory of the store")
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    http: HttpSettings = HttpSettings()
    usage: UsageSettings = UsageSettings()
    log: LogSettings = LogSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load_settings` layered: unlike the others it refuses unknown variables."""
        return (init_settings,)

    def require_safe_address(self) -> None:
        """Refuse to listen beyond loopback without a key.

        Raises:
            SettingsError: host is not a loopback address and no key is set.
        """
        if self.http.api_key is None and not is_loopback(self.http.host):
            raise SettingsError(
                f"host {self.http.host!r} is reachable from other machines and no API key is set. Set one "
                "(--api-key-file FILE, or DEEPFEW_API_KEY), or listen on loopback (--host 127.0.0.1)."
            )


@dataclass(frozen=True)
class Leaf:
    """One key: its dotted path, its flag, its variable, and what pydantic knows of it."""

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
    """Settings, and for each dotted path where its value came from: flag, variable, file or default."""

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
        if isinstance(section, type) and issubclass(section, _Section):
            found.extend(Leaf(f"{name}.{key}", field) for key, field in section.model_fields.items())
        else:
            found.append(Leaf(name, info))
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost counts as reachable."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def load_settings(
    flags: Mapping[str, Any] | None = None,
    *,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Resolved:
    """Layer flags over environment over file over defaults.

    Args:
        flags: leaf name → value, as the command line gave them; None values are left out.
        config: settings file (TOML); without it the file that DEEPFEW_CONFIG names, if any.
        environ: the environment, `os.environ` by default.

    Raises:
        SettingsError: an unknown key, variable or flag; a value that does not parse; an unreadable file.
    """
    environ = os.environ if environ is None else environ
    if config is None and environ.get(CONFIG_VARIABLE):
        config = Path(environ[CONFIG_VARIABLE])
    by_name = {leaf.name: leaf for leaf in leaves()}
    values: dict[str, tuple[Any, str]] = {}
    if config is not None:
        values.update(_file_values(config))
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
            values[by_name[name].path] = (value, f"flag {by_name[name].flag}")
    return _build(values)


def _file_values(config: Path) -> dict[str, tuple[Any, str]]:
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
    _read_key_file(values)
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


def _read_key_file(values: dict[str, tuple[Any, str]]) -> None:
    """Put the key that `http.api_key_file` names into `http.api_key`. An empty variable counts as not set."""
    for path in ("http.api_key", "http.api_key_file"):
        if path in values and values[path][0] == "":
            del values[path]
    if "http.api_key_file" in values:
        if "http.api_key" in values:
            first, second = values["http.api_key"][1], values["http.api_key_file"][1]
            raise SettingsError(f"the API key is set twice, by {first} and by {second}; set one of them")
        file, origin = values["http.api_key_file"]
        try:
            values["http.api_key"] = (Path(file).read_text(encoding="utf-8").strip(), f"file {file}")
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"cannot read the API key file {file} (from {origin}): {error}") from error
    if "http.api_key" in values:
        key, origin = values["http.api_key"]
        if not isinstance(key, str) or len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
            raise SettingsError(
                f"the API key from {origin} must be at least 8 printable ASCII characters without spaces; "
                "`openssl rand -hex 24` makes a good one"
            )
