"""Requests and responses of the routes that tell what a store should have, and that change it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from server.api.http.fields import Strict

MAX_CHANGE = 65536
DEFAULT_CANDIDATES = 8
MAX_CANDIDATES = 1024

DeepExpertCount = Annotated[int, Field(ge=1, le=MAX_CHANGE)]


class GrowRequest(Strict):
    """How many of the best candidates to add."""

    count: DeepExpertCount = Field(1, description="deep experts to add; default 1")


class ShrinkRequest(Strict):
    """Which deep experts to give up; one of the two."""

    count: DeepExpertCount | None = Field(None, description="give up so many, the least wanted ones")
    indices: (
        Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1, max_length=MAX_CHANGE)] | None
    ) = Field(None, description="give up these, by the index in their file's name")


class ReloadRequest(Strict):
    """Nothing to say; the body may be left out."""


class CandidateResponse(BaseModel):
    """A deep expert that the store could have; `score` is missing mass × expected output norm ÷ byte."""

    experts: list[int]
    bytes: int
    score: float
    missing_share: float
    reason: str


class GrowthResponse(BaseModel):
    """What the store is going through; totals are since the server started."""

    state: Literal["idle", "growing", "adopting", "shrinking", "reloading"]
    progress: float = Field(description="share written of the growth under way, or of the last one")
    done_bytes: int
    total_bytes: int
    error: str | None = Field(description="what the last growth failed with; the log says more")
    growths: int
    failures: int
    shrinks: int
    grown_bytes: int
    deep_experts: int
    held_bytes: int
    budget_bytes: int | None


class PlanResponse(BaseModel):
    """What to extract next, best first; `num_candidates` counts those beyond the list as well."""

    candidates: list[CandidateResponse]
    num_candidates: int
    growth: GrowthResponse


class GrowResponse(BaseModel):
    """What is being added now, in the background."""

    started: list[CandidateResponse]
    growth: GrowthResponse


class RemovedResponse(BaseModel):
    """A deep expert that was given up."""

    index: int
    file: str
    bytes: int
    experts: list[int]


class ShrinkResponse(BaseModel):
    """What was given up; `freed_bytes` is null while another process reads the store, so that the files stay."""

    removed: list[RemovedResponse]
    freed_bytes: int | None
    growth: GrowthResponse


class ReloadResponse(BaseModel):
    """What the store on disk had more and less than what was served."""

    added: int
    removed: int
    growth: GrowthResponse
