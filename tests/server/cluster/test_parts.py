"""Real replicas of different parts: who gets a request, what they say together, and stores that grow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expert_store.manifest import read_manifest
from extractor.planning.plan import Plan, PlannedExpert, write_plan
from tests.server.cluster.processes import Cluster

pytestmark = pytest.mark.exhaustive
pytest.importorskip("ray")
ADMIN = {"x-api-key": "staple-of-the-admin"}


@pytest.fixture(scope="module")
def cluster(small_store: Path, few_small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two replicas of a part with three of eight deep experts, and one of the whole checkpoint."""
    folder = tmp_path_factory.mktemp("parts")
    write_plan(folder / "law.json", Plan(2, 8, {"kind": "index"}, tuple(PlannedExpert((at, at)) for at in (0, 2))))
    write_plan(folder / "art.json", Plan(2, 8, {"kind": "index"}, tuple(PlannedExpert((at, at)) for at in (6, 7))))
    (folder / "admin").write_text(ADMIN["x-api-key"])
    started = Cluster(
        f"""[model]
device = "cpu"
[http]
admin_key_file = "{folder}/admin"
[cluster]
statistics_seconds = 0.5
cpus_per_replica = 0.5
[[cluster.parts]]
name = "few"
replicas = 2
profiles = ["law"]
settings = {{ store = "{few_small_store}", profiles = "{folder}/law.json" }}
[[cluster.parts]]
name = "whole"
settings = {{ store = "{small_store}", profiles = "{folder}/art.json" }}
""",
        folder, 3, ("few", "whole"),
    )  # fmt: skip
    yield started
    started.stop()


def _deficit(cluster: Cluster, **parameters: Any) -> float:
    body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 6, "details": True, **parameters}}
    answer = cluster.client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return float(answer.json()["details"]["deficit"]["overall"])


def test_the_whole_goes_where_the_whole_is_and_a_profile_where_it_is(cluster: Cluster) -> None:
    assert _deficit(cluster) == 0.0
    assert _deficit(cluster, profile="law") > 0.0
    assert _deficit(cluster, profile="art") > 0.0, "found by asking the replicas: no part names it"
    for path, body in (
        ("/generate", {"inputs": "a", "parameters": {"profile": "war"}}),
        ("/v1/completions", {"model": "tiny-moe", "prompt": "a", "profile": "war"}),
    ):
        refused = cluster.client.post(path, json=body)
        assert refused.status_code in (400, 422)
        assert "no part of this cluster has the profile 'war'" in refused.text
    names = [profile["name"] for profile in cluster.client.get("/experts/profiles").json()["profiles"]]
    assert names == ["art", "law"]


def test_a_store_grows_and_all_of_its_replicas_take_it_over(cluster: Cluster, few_small_store: Path) -> None:
    before = cluster.client.get("/experts").json()
    assert sorted(one["available"] for one in before["replicas"].values()) == [6, 6, 16]
    assert before["totals"]["available"] == 16
    plan = cluster.client.get("/experts/plan").json()
    assert {one["store"] for one in plan["candidates"]} == {"few"}, "the whole has all"
    assert [len(store["replicas"]) for store in plan["growth"]["stores"]] == [2, 1]
    refused = cluster.client.post("/experts/grow", json={"count": 1})
    assert refused.status_code in (401, 403)
    begun = cluster.client.post("/experts/grow", json={"count": 1}, headers=ADMIN)
    assert begun.status_code == 202, begun.text

    def available() -> list[int]:
        found = cluster.client.get("/experts").json()["replicas"].values()
        return sorted(one["available"] for one in found)

    cluster.wait(lambda: available() == [8, 8, 16])
    assert len(read_manifest(few_small_store).deep_experts) == 4
    assert cluster.client.get("/experts/growth").json()["deep_experts"] == 12


def test_stores_of_their_own_grow_by_themselves_within_their_budget(few_small_store: Path, tmp_path: Path) -> None:
    deep = read_manifest(few_small_store).deep_experts
    text = f"""store = "{few_small_store}"
[model]
device = "cpu"
[growth]
grow_budget = "{(len(deep) + 2) * max(one.bytes for one in deep)}"
grow_interval_seconds = 1
grow_min_share = 0
[cluster]
replicas = 2
statistics_seconds = 0.5
own_stores = "{tmp_path}/own"
"""
    cluster = Cluster(text, tmp_path, 2)
    try:
        for at in range(6):
            body = {"inputs": f"Story {at}", "parameters": {"max_new_tokens": 4}}
            assert cluster.client.post("/generate", json=body).status_code == 200
        cluster.wait(lambda: cluster.client.get("/experts/growth").json()["deep_experts"] == 2 * (len(deep) + 2))
        stores = [read_manifest(path) for path in sorted((tmp_path / "own").iterdir())]
        assert [len(manifest.deep_experts) for manifest in stores] == [len(deep) + 2] * 2
        assert len(read_manifest(few_small_store).deep_experts) == len(deep), "the part's own store stays"
        assert cluster.client.get("/experts/plan").json()["num_candidates"] == 0
    finally:
        cluster.stop()
