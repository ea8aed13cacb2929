"""Requests and responses of the routes that show or change the server and its store."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.api.http.fields import Strict
from server.growth.fleet import FleetCandidate
from server.growth.status import Candidate, GrowthState, GrowthStatus
from server.model.kv.blocks import BLOCK_TOKENS
from server.model.kv.rows import KvUsage
from server.model.kv_memory import MemoryShares
from server.serving.service import ExpertsSnapshot, Health, HealthState

MAX_CHANGE = 65536
DEFAULT_CANDIDATES = 8
MAX_CANDIDATES = 1024
MAX_LAYERS = 4096

DeepExpertCount = Annotated[int, Field(ge=1, le=MAX_CHANGE)]


class HealthResponse(BaseModel):
    """The server is healthy."""

    status: Literal["ok"]


class ReadyResponse(BaseModel):
    """State of the model; with status 503 there is `error` and `error_type` too.

    `progress` is the share of loading that is done, over all phases: it never falls. `phase` names the one under way.
    """

    state: HealthState
    reason: str
    progress: float
    phase: str

    @classmethod
    def of(cls, health: Health) -> ReadyResponse:
        """The health as JSON."""
        return cls(state=health.state, reason=health.reason, progress=health.progress, phase=health.phase)


class NotReadyResponse(ReadyResponse):
    """The reason why no request is taken now."""

    error: str
    error_type: Literal["healthcheck"]


class TiersResponse(BaseModel):
    """Where the experts are: in slots on the device, in host memory, or on the disk alone; counters since the start.

    An expert may be in a slot and in host memory. `disk_wait_seconds`: time for which tokens and prompts waited for
    the disk.
    """

    slot_bytes: int
    slot_experts: int
    host_bytes: int
    host_experts: int
    disk_experts: int
    disk_reads: int
    disk_read_bytes: int
    disk_wait_seconds: float

    @classmethod
    def of(cls, found: ExpertsSnapshot) -> TiersResponse:
        """The tiers of a snapshot."""
        return cls(
            slot_bytes=found.slot_bytes,
            slot_experts=int(found.resident.sum()),
            host_bytes=found.tier.host_bytes,
            host_experts=int(found.tier.in_host.sum()),
            disk_experts=int(found.on_disk.sum()),
            disk_reads=found.tier.reads,
            disk_read_bytes=found.tier.read_bytes,
            disk_wait_seconds=found.tier.wait_seconds,
        )


class KvMemory(BaseModel):
    """KV memory in blocks of `block_tokens` tokens; requests hold `used_blocks`, `cached_blocks` wait for prompts to
    come."""

    block_tokens: int
    num_blocks: int
    used_blocks: int
    cached_blocks: int

    @classmethod
    def of(cls, usage: KvUsage) -> KvMemory:
        """The figures of now."""
        return cls(
            block_tokens=BLOCK_TOKENS,
            num_blocks=usage.num_blocks,
            used_blocks=usage.num_used,
            cached_blocks=usage.num_cached,
        )


class Memory(BaseModel):
    """Memory of slots and of keys and values, in bytes, and the least that stays of each.

    `is_moving`: one gets what the other does not need; `reason` says why not. `moves_to_slots`, `moves_to_kv`: times
    since the start.
    """

    is_moving: bool
    reason: str
    slot_bytes: int
    kv_bytes: int
    least_slot_bytes: int
    least_kv_bytes: int
    moves_to_slots: int
    moves_to_kv: int

    @classmethod
    def of(cls, shares: MemoryShares) -> Memory:
        """The shares as JSON."""
        return cls(**asdict(shares))


class InfoResponse(BaseModel):
    """The served model and its limits; names are TGI's if TGI has the field.

    `decode_path`: where the experts of a decode step are driven, `host` or `device`. `generation_defaults`: of the
    checkpoint, for requests that say nothing of these parameters. `batch_invariant`: whether a request's tokens are
    promised not to depend on what else is in the batch. `tool_calls`: the format of the model's calls; `unknown` where
    they stay text. `has_thinking`: whether thinking is told apart. `expert_encodings`: of the experts' tensors that the
    store has in fewer bits; `expert_bits` and `trunk_bits`: of one weight there, with its share of scales.
    `adapters`: names of those that masked requests may have.
    """

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    model_family: str
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    decode_path: str
    batch_invariant: bool
    expert_encodings: dict[str, str]
    expert_bits: float
    trunk_bits: int
    adapters: list[str]
    num_layers: int
    num_experts: int
    top_k: int
    tiers: TiersResponse
    kv_memory: KvMemory
    memory: Memory
    max_input_tokens: int
    max_total_tokens: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_body_bytes: int
    has_chat_template: bool
    tool_calls: str | None
    has_thinking: bool
    generation_defaults: dict[str, float | int | bool]
    router: str
    version: str


class ExpertTotals(BaseModel):
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

    @classmethod
    def of(cls, found: ExpertsSnapshot) -> ExpertTotals:
        """The totals of a snapshot."""
        return cls(
            available=int(found.available.sum()),
            resident=int(found.resident.sum()),
            uses=int(found.uses.sum()),
            demand=int(found.demand.sum()),
            served_mass=float(found.served_mass.sum()),
            demand_mass=float(found.demand_mass.sum()),
            deficit=found.overall_deficit,
            tokens=found.num_tokens,
            top1_missing_tokens=found.top1_missing_tokens,
            hits=int(found.hits.sum()),
            misses=int(found.misses.sum()),
            evictions=int(found.evictions.sum()),
            fetch_bytes=int(found.fetch_bytes.sum()),
            fetch_seconds=float(found.fetch_seconds.sum()),
            slots_per_layer=found.num_slots,
            slot_bytes=found.slot_bytes,
            host_hits=found.host_hits,
            host_misses=found.host_misses,
        )


class Shard(BaseModel):
    """A deep expert: its file, its size, and the expert of every layer."""

    file: str
    bytes: int
    experts: list[int]


class ExpertsResponse(BaseModel):
    """Every expert: `available` to `demand_mass` are `[layer][expert]`, `deficit` to `expert_bytes` are `[layer]`.

    `uses` counts the experts computed, `demand` the choices of the unmasked router; masses are sums of router weight.
    """

    num_layers: int
    num_experts: int
    top_k: int
    available: list[list[bool]]
    resident: list[list[bool]]
    in_host: list[list[bool]]
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

    @classmethod
    def of(cls, found: ExpertsSnapshot, top_k: int) -> ExpertsResponse:
        """The snapshot as lists, with its totals."""
        num_layers, num_experts = found.available.shape
        return cls(
            num_layers=num_layers,
            num_experts=num_experts,
            top_k=top_k,
            available=found.available.tolist(),
            resident=found.resident.tolist(),
            in_host=found.tier.in_host.tolist(),
            uses=found.uses.tolist(),
            demand=found.demand.tolist(),
            served_mass=found.served_mass.tolist(),
            demand_mass=found.demand_mass.tolist(),
            deficit=found.deficit.tolist(),
            top1_missing=found.top1_missing.tolist(),
            hits=found.hits.tolist(),
            misses=found.misses.tolist(),
            evictions=found.evictions.tolist(),
            fetch_bytes=found.fetch_bytes.tolist(),
            fetch_seconds=found.fetch_seconds.tolist(),
            expert_bytes=found.expert_bytes.tolist(),
            totals=ExpertTotals.of(found),
            shards=[Shard(file=one.file, bytes=one.num_bytes, experts=list(one.experts)) for one in found.shards],
        )


class Profile(BaseModel):
    """A mask that requests may name; shares are of all experts of the model."""

    name: str
    kept_share: float
    available_share: float
    adapter: str | None = Field(description="the adapter that requests under it have; null if none was made for it")


class AdapterEntry(BaseModel):
    """An adapter of the store: for one mask, or for masks of a range of sizes; shares are of all experts."""

    name: str
    is_for_one_mask: bool
    least_share: float
    largest_share: float
    perplexity_ratios: dict[str, float] = Field(
        description="share of the experts → perplexity of held-out text ÷ that of the whole model, with the adapter"
    )
    perplexity_ratios_before: dict[str, float] = Field(description="the same without the adapter")


class ProfilesResponse(BaseModel):
    """The masks that a request may choose, and the adapters. `max_pool` is the largest pool; `has_prior`: pools know
    usual text."""

    profiles: list[Profile]
    adapters: list[AdapterEntry]
    max_pool: int
    has_prior: bool


class GrowRequest(Strict):
    """The number of best candidates to add, or the deep experts to add; at most one of the two."""

    count: DeepExpertCount | None = Field(None, description="deep experts to add, the best ones; default 1")
    experts: (
        Annotated[
            list[Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1, max_length=MAX_LAYERS)]],
            Field(min_length=1, max_length=MAX_CANDIDATES),
        ]
        | None
    ) = Field(None, description="add these: for each the expert of every layer, as GET /experts/plan lists them")


class ShrinkRequest(Strict):
    """The deep experts to give up; one of the two."""

    count: DeepExpertCount | None = Field(None, description="give up so many, the least wanted ones")
    indices: (
        Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1, max_length=MAX_CHANGE)] | None
    ) = Field(None, description="give up these, by the index in their file's name")


class ReloadRequest(Strict):
    """An empty object; the body may be left out."""


class CandidateResponse(BaseModel):
    """A deep expert that the store could have; `score` is missing mass × expected output norm ÷ byte."""

    experts: list[int]
    bytes: int
    score: float
    missing_share: float
    reason: str

    @classmethod
    def of(cls, candidate: Candidate) -> CandidateResponse:
        """The candidate as JSON."""
        return cls(
            experts=list(candidate.experts),
            bytes=candidate.num_bytes,
            score=candidate.score,
            missing_share=candidate.missing_share,
            reason=candidate.reason,
        )


class GrowthResponse(BaseModel):
    """The store's present change; totals are since the server started."""

    state: GrowthState
    progress: float = Field(description="share written of the growth under way, or of the last one")
    done_bytes: int
    total_bytes: int
    error: str | None = Field(description="the error of the last growth; the log says more")
    growths: int
    failures: int
    shrinks: int
    grown_bytes: int
    deep_experts: int
    held_bytes: int
    budget_bytes: int | None

    @classmethod
    def of(cls, status: GrowthStatus) -> GrowthResponse:
        """The status as JSON."""
        return cls(
            state=status.state,
            progress=min(status.done_bytes / status.total_bytes, 1.0) if status.total_bytes else 0.0,
            done_bytes=status.done_bytes,
            total_bytes=status.total_bytes,
            error=status.error,
            growths=status.num_growths,
            failures=status.num_failures,
            shrinks=status.num_shrinks,
            grown_bytes=status.grown_bytes,
            deep_experts=status.num_deep_experts,
            held_bytes=status.held_bytes,
            budget_bytes=status.budget_bytes,
        )


class PlanResponse(BaseModel):
    """Deep experts to extract next, best first; `num_candidates` counts those beyond the list as well."""

    candidates: list[CandidateResponse]
    num_candidates: int
    growth: GrowthResponse


class GrowResponse(BaseModel):
    """The deep experts that are being added in the background."""

    started: list[CandidateResponse]
    growth: GrowthResponse


class RemovedResponse(BaseModel):
    """A deep expert that was given up."""

    index: int
    file: str
    bytes: int
    experts: list[int]


class ShrinkResponse(BaseModel):
    """The deep experts given up; `freed_bytes` is null while another process reads the store and the files stay."""

    removed: list[RemovedResponse]
    freed_bytes: int | None
    growth: GrowthResponse


class ReloadResponse(BaseModel):
    """Deep experts that the store on disk had more and less than the served one."""

    added: int
    removed: int
    growth: GrowthResponse


class StoreResponse(BaseModel):
    """A store of a cluster, and the replicas that read it; the first of them changes it."""

    name: str
    replicas: list[str]
    growth: GrowthResponse


class FleetCandidateResponse(CandidateResponse):
    """A deep expert for one of a cluster's stores; other stores have `experts_elsewhere` of its experts."""

    store: str
    experts_elsewhere: int

    @classmethod
    def of_fleet(cls, found: FleetCandidate) -> FleetCandidateResponse:
        """The candidate as JSON."""
        of_one = CandidateResponse.of(found.candidate).model_dump()
        return cls(**of_one, store=found.store, experts_elsewhere=found.num_elsewhere)


class FleetGrowthResponse(GrowthResponse):
    """The sums over a cluster's stores, and each store."""

    stores: list[StoreResponse]


class FleetPlanResponse(PlanResponse):
    """Deep experts to add to a cluster's stores, best first; each counts as added for those after it."""

    candidates: list[FleetCandidateResponse]  # type: ignore[assignment]  # of one server's kind, and more
    growth: FleetGrowthResponse


class FleetChangeResponse(BaseModel):
    """The answers of the stores that were changed, and of those that refused, by the stores' names."""

    changed: dict[str, Any]
    refused: dict[str, Any]
