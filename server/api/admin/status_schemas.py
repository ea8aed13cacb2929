"""Responses of the routes that tell about the server itself."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Response(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class InfoResponse(_Response):
    """What is served, and its limits; the names are TGI's where TGI has the field.

    `decode_path`: who drives the experts of a decode step, `host` or `device`.
    """

    model_id: str
    model_family: str
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    decode_path: str
    num_layers: int
    num_experts: int
    top_k: int
    max_input_tokens: int
    max_total_tokens: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_body_bytes: int
    router: str
    version: str


class ExpertTotals(_Response):
    """Sums over all layers and experts; `tokens` were routed."""

    available: int
    resident: int
    uses: int
    demand: int
    served_mass: float
    demand_mass: float
    deficit: float
    tokens: int
    top1_missing_tokens: int
    hits: int
    misses: int
    evictions: int
    fetch_bytes: int
    fetch_seconds: float
    slots_per_layer: int
    slot_bytes: int
    host_hits: int
    host_misses: int


class Shard(_Response):
    """A deep expert: its file, its size, and the expert of every layer."""

    file: str
    bytes: int
    experts: list[int]


class ExpertsResponse(_Response):
    """`[layer][expert]` of the first group, `[layer]` of the second.

    `uses` counts what was computed, `demand` what the router wanted before the mask; masses are sums of router weight.
    """

    num_layers: int
    num_experts: int
    top_k: int
    available: list[list[bool]]
    resident: list[list[bool]]
    uses: list[list[int]]
    demand: list[list[int]]
    served_mass: list[list[float]]
    demand_mass: list[list[float]]
    deficit: list[float]
    top1_missing: list[int]
    hits: list[int]
    misses: list[int]
    evictions: list[int]
    fetch_bytes: list[int]
    fetch_seconds: list[float]
    expert_bytes: list[int]
    totals: ExpertTotals
    shards: list[Shard]


class Profile(_Response):
    """A mask that requests may name; shares are of all experts of the model."""

    name: str
    kept_share: float
    available_share: float


class ProfilesResponse(_Response):
    """What requests may narrow their experts to. `max_pool` is the largest pool; `has_prior`: pools know usual text."""

    profiles: list[Profile]
    max_pool: int
    has_prior: bool
