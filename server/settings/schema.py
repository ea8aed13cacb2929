"""The one settings object: frozen, nested, unknown keys refused. `server.settings.load` builds it.

Invariant: a leaf's name is unique over all sections, so that `http.port` is at once the key `port` of the section
`[http]` in the settings file, the flag `--port` and the variable `DEEPFEW_PORT`.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from server.errors import SettingsError
from server.settings.values import Device, Dtype, MemoryAmount

Bytes = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ModelSettings(Section):
    """Settings of loading: the device, the mask, and the memory for experts."""

    device: Device = Field("auto", description="where the model runs: auto (a GPU if any), cpu, cuda, or cuda:1")
    dtype: Dtype = Field("auto", description="dtype of the computation; auto keeps the store's")
    experts: str | None = Field(
        None, description="mask: serve only these experts of every layer, for instance 0-7,12; default all in the store"
    )
    slots: Annotated[int, Field(ge=1)] | None = Field(None, description="expert slots in every layer on the device")
    slots_memory: MemoryAmount | None = Field(
        None, description="memory for slots, for instance 8GiB, or 25% of the store's experts; instead of --slots"
    )
    host_memory: MemoryAmount | None = Field(
        None,
        description="memory for experts on the host behind the slots, such as 32GiB or 25%; the rest is read from disk",
    )
    kv_memory: MemoryAmount | None = Field(
        None,
        description="memory for keys and values of all requests, such as 4GiB; default a share of what is free, for at "
        "most max_batch_size requests of max_context_tokens",
    )
    memory_balance: Literal["moving", "fixed"] | None = Field(
        None,
        description="moving: slots and KV memory get what the other does not need while serving, starting from the "
        "sizes given; fixed: they keep these; default moving on a CPU, fixed on a GPU",
    )
    prefix_cache: bool = Field(
        True, description="keep keys and values of prompts, so that a prompt that begins alike is not read again"
    )
    decode_path: Literal["auto", "device", "host"] = Field(
        "auto", description="who fetches experts while decoding: device (captured graphs, GPU only), host, or auto"
    )
    cache_policy: Literal["lru", "lfu"] = Field(
        "lru", description="which expert leaves a slot: the least recently or the least frequently used"
    )
    kept_experts: Annotated[int, Field(ge=0)] = Field(
        0, description="slots of every layer kept for the experts that usage.json has seen served most"
    )
    batch_invariant: bool = Field(
        True,
        description="a request's tokens do not depend on what else is in the batch; off is faster for several requests "
        "in float32 on a CPU and for eight and more on a GPU, where their last bits then do",
    )
    resident_bias: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = Field(
        0.0, description="cache-aware routing: bonus of experts in slots, in ranges of the logits; device path only"
    )
    adapters: bool = Field(True, description="masked requests have the store's adapters; off serves them without")

    statistics: Path | None = Field(
        None, description="statistics file of `deepfew calibrate`, for what masks are expected to cost"
    )
    warn_perplexity_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        1.1, description="warn at start where the mask is expected to raise perplexity by more than this factor"
    )
    served_model_name: str | None = Field(
        None,
        description="names of the model for clients, joined by commas, the first one told; default the checkpoint's",
    )
    use_generation_config: bool = Field(
        True, description="take the checkpoint's generation_config.json where a request says nothing"
    )

    @property
    def served_names(self) -> tuple[str, ...]:
        """The parts of `served_model_name`."""
        return tuple(name.strip() for name in (self.served_model_name or "").split(",") if name.strip())

    @model_validator(mode="after")
    def _one_way_to_say_slots(self) -> ModelSettings:
        if self.slots is not None and self.slots_memory is not None:
            raise ValueError("slots and slots_memory are both set; set one of them")
        return self


class EngineSettings(Section):
    """Limits on running and waiting requests and on their length."""

    max_batch_size: Annotated[int, Field(ge=1, le=1024)] = Field(8, description="requests decoded together")
    max_context_tokens: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="prompt and new tokens of one request together; default what the model was made for and memory "
        "holds",
    )
    max_queue_requests: Annotated[int, Field(ge=0)] = Field(128, description="waiting requests before 429")
    max_queue_tokens: Annotated[int, Field(ge=1)] = Field(
        262_144, description="prompt tokens of waiting requests before 429"
    )
    prefill_chunk_tokens: Annotated[int, Field(ge=1)] = Field(
        256,
        description="prompt tokens computed at once, so that a long prompt does not stall the others; below 32 no "
        "prompt is kept",
    )
    corrupt_experts: Literal["fail", "mask"] = Field(
        "fail", description="damaged experts: fail the requests that need one, or mask it for all until a restart"
    )
    stall_seconds: Seconds = Field(
        120.0, description="a busy engine without a finished step for this long is unhealthy"
    )


class HttpSettings(Section):
    """Address, key, and the limits on the memory that a client can use."""

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; beyond loopback needs a key")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8080, description="port to listen on; 0 takes a free one")
    api_key: SecretStr | None = Field(None, description="key that guards every route but liveness")
    api_key_file: Path | None = Field(None, description="file that holds the key, rather than the key itself")
    admin_key: SecretStr | None = Field(
        None,
        description="key that opens what changes the server: growing, shrinking, reloading; without it nothing does",
    )
    admin_key_file: Path | None = Field(None, description="file that holds the admin key, rather than the key itself")
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


class UsageSettings(Section):
    """Settings of the ledger of served and demanded experts."""

    usage_save_seconds: Seconds = Field(60.0, description="interval between snapshots of usage.json in the store")
    usage_directory: Path | None = Field(
        None, description="directory of usage.json and the collected statistics, one for each server; default the store"
    )
    collect_statistics: bool = Field(
        True, description="collect what calibrate does from a sample of steps, into statistics.safetensors in the store"
    )


class MasksSettings(Section):
    """Settings of the masks that requests may use."""

    profiles: str | None = Field(
        None, description="masks that requests may name: plan files, or folders of them, joined by commas"
    )


class GrowthSettings(Section):
    """Settings of growing the served store, on request and automatically under a budget."""

    grow_budget: MemoryAmount | None = Field(
        None, description="grow by itself until the shards take this, for instance 12GiB, or 50% of all experts"
    )
    grow_from: str | None = Field(
        None, description="the store's checkpoint, for growing and fetching; default where it was extracted from"
    )
    grow_interval_seconds: Seconds = Field(
        60.0, description="between looks at what was wanted and missing, which counts half after each"
    )
    grow_min_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        0.01,
        description="add by itself only deep experts that were missed for at least this share of the router mass",
    )
    grow_step: Annotated[int, Field(ge=1)] = Field(1, description="most deep experts added at one look")
    grow_replace: bool = Field(
        False,
        description="when the budget is full, give deep experts up for ones that are wanted more than twice as much",
    )


class LogSettings(Section):
    """Settings of the log."""

    log_format: Literal["auto", "text", "json"] = Field("auto", description="auto: text on a terminal, else JSON lines")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level to log")
    log_prompts: bool = Field(False, description="log prompts and whole answers (never by default)")


class Settings(Section):
    """All settings. `load_settings` builds it; other code gets single values of it, never this object."""

    store: Path | None = Field(None, description="directory of the store")
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    http: HttpSettings = HttpSettings()
    usage: UsageSettings = UsageSettings()
    masks: MasksSettings = MasksSettings()
    growth: GrowthSettings = GrowthSettings()
    log: LogSettings = LogSettings()

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


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost counts as reachable."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
