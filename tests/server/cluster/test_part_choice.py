"""The part for a request, by what the replicas of each part say that they have; without processes."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("ray.serve")

from server.api.http.errors import ValidationFailed
from server.cluster import parts
from server.cluster.parts import Parts
from server.cluster.replica import ReplicaFacts
from server.serving.service import NotReadyError


class _Handle:
    """The replicas of a part: their facts, or nothing while none is there."""

    def __init__(self, *facts: ReplicaFacts | Exception) -> None:
        self.facts = list(facts)
        self.num_asked = 0

    def broadcast(self, method: str) -> "_Handle":
        assert method == "facts"
        self.num_asked += 1
        return self

    async def results_async(self, **options: Any) -> list[ReplicaFacts | Exception]:
        return self.facts


def _choose(handles: Mapping[str, _Handle], *profiles: str | None, named: Mapping[str, str] | None = None) -> list[str]:
    async def run() -> list[str]:
        made = Parts(handles, named or {}, 1.0)  # type: ignore[arg-type]
        return [await made._part_of(profile) for profile in profiles]

    return asyncio.run(run())


def _parts() -> dict[str, _Handle]:
    return {
        "few": _Handle(ReplicaFacts(("law",), 0.25), ReplicaFacts(("law",), 0.25)),
        "whole": _Handle(ReplicaFacts(("art", "law"), 1.0)),
    }


def test_a_profile_goes_where_it_is_and_the_whole_where_the_whole_is() -> None:
    assert _choose(_parts(), "law", "art", None) == ["few", "whole", "whole"]
    assert _choose(_parts(), "law", named={"law": "whole"}) == ["whole"], "the settings say so"
    with pytest.raises(ValidationFailed, match="no part of this cluster has the profile 'war'"):
        _choose(_parts(), "war")


def test_where_no_part_has_all_the_one_with_the_most_gets_the_rest() -> None:
    handles = {name: _Handle(ReplicaFacts((), share)) for name, share in (("a", 0.25), ("b", 0.5), ("c", 0.5))}
    assert _choose(handles, None) == ["b"]


def test_a_part_that_never_answered_may_be_the_one() -> None:
    handles = {**_parts(), "whole": _Handle()}
    assert _choose(handles, "law") == ["few"]
    for profile in (None, "art"):
        with pytest.raises(NotReadyError, match="what the parts whole have"):
            _choose(handles, profile)
    handles = {"few": _Handle(RuntimeError("starting")), "whole": _parts()["whole"]}
    assert _choose(handles, None) == ["whole"], "it has all, whatever the other one has"


def test_a_part_that_has_gone_keeps_its_requests_and_nobody_is_asked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = _parts()

    async def run() -> list[str]:
        made = Parts(handles, {}, 1.0)  # type: ignore[arg-type]
        chosen = [await made._part_of(None) for _ in range(5)]
        assert handles["few"].num_asked == 1
        monkeypatch.setattr(parts, "FACTS_SECONDS", -1.0)
        handles["whole"].facts = []
        for _ in range(3):
            chosen.append(await made._part_of(None))
            await asyncio.sleep(0)
        assert handles["few"].num_asked > 1
        return chosen

    assert set(asyncio.run(run())) == {"whole"}


def test_a_single_part_is_not_asked() -> None:
    handles = {"all": _Handle()}
    assert _choose(handles, None, "law") == ["all", "all"]
    assert handles["all"].num_asked == 0
