"""The routes that change the store: who may, what they say, and the real engine taking it between two steps."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from expert_store.manifest import read_manifest
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from server.api.admin.schemas import GrowResponse, GrowthResponse, PlanResponse, ReloadResponse, ShrinkResponse
from server.cli.main import main
from server.growth.status import GrowthError, GrowthSourceError, NothingToGrowError
from server.serving.loading import load
from server.settings.load import load_settings
from tests.server.api.running import Running, running, wait_until
from tests.server.api.scripted import ScriptedEngine, ScriptedGrowth, loaded

KEY, ADMIN = "correct-horse-battery", "staple-of-the-admin"
CHANGES = ["/experts/grow", "/experts/shrink", "/experts/reload"]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def changing(growth: ScriptedGrowth, **http: Any) -> Any:
    return running(load=lambda progress: loaded(ScriptedEngine(), growth=growth), admin_key=ADMIN, **http)


def ready(server: Running) -> None:
    wait_until(lambda: server.service.loaded is not None, seconds=120)


@pytest.mark.parametrize("path", CHANGES)
def test_ordinary_key_does_not_open_what_changes_the_server(path: str) -> None:
    growth = ScriptedGrowth()
    with changing(growth, api_key=KEY) as server, server.client() as client:
        ready(server)
        assert client.post(path, json={}).status_code == 401
        for headers in (bearer(KEY), {"x-api-key": KEY}):
            response = client.post(path, json={}, headers=headers)
            assert (response.status_code, response.json()["error_type"]) == (403, "forbidden")
            assert "http.admin_key" in response.json()["error"]
        assert client.post(path, json={}, headers=bearer(ADMIN + "x")).status_code == 401
        assert not growth.asked
        for headers in (bearer(ADMIN), {"x-api-key": ADMIN}, {**bearer(KEY), "x-api-key": ADMIN}):
            assert client.post(path, json={"count": 1} if "shrink" in path else {}, headers=headers).status_code < 300
        assert len(growth.asked) == 3


@pytest.mark.parametrize("path", CHANGES)
def test_without_an_admin_key_nothing_changes_the_server_not_even_on_loopback(path: str) -> None:
    growth = ScriptedGrowth()
    with running(load=lambda progress: loaded(ScriptedEngine(), growth=growth)) as server, server.client() as client:
        ready(server)
        response = client.post(path, json={"count": 1})
        assert response.status_code == 403
        assert "http.admin_key_file" in response.json()["error"]
        assert "DEEPFEW_ADMIN_KEY_FILE" in response.json()["error"]
        assert not growth.asked


def test_admin_key_opens_ordinary_routes_too() -> None:
    with changing(ScriptedGrowth(), api_key=KEY) as server, server.client(headers=bearer(ADMIN)) as client:
        ready(server)
        for path in ("/info", "/experts", "/experts/plan", "/experts/growth", "/metrics"):
            assert client.get(path).status_code == 200


@pytest.fixture
def growth() -> ScriptedGrowth:
    return ScriptedGrowth()


@pytest.fixture
def admin(growth: ScriptedGrowth) -> Iterator[httpx.Client]:
    with changing(growth) as server, server.client(headers=bearer(ADMIN)) as client:
        ready(server)
        yield client


def test_plan_lists_candidates_with_their_reason(admin: httpx.Client) -> None:
    plan = admin.get("/experts/plan").json()
    PlanResponse.model_validate(plan, strict=True)
    assert plan["num_candidates"] == 3
    assert plan["candidates"][0] == {
        "experts": [0, 3],
        "bytes": 512,
        "score": 0.5,
        "missing_share": 0.25,
        "reason": "25.00% of the router mass asked for its experts and could not have them",
    }
    assert len(admin.get("/experts/plan", params={"count": 2}).json()["candidates"]) == 2


@pytest.mark.parametrize("query", ["count=0", "count=-1", "count=x", "count=1025", "count=1&count=2", "n=1", "count=²"])
def test_bad_query_of_the_plan_is_refused(admin: httpx.Client, query: str) -> None:
    response = admin.get(f"/experts/plan?{query}")
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert "`count`" in response.json()["error"]


def test_growth_begins_in_the_background_and_a_second_one_is_refused(
    admin: httpx.Client, growth: ScriptedGrowth
) -> None:
    response = admin.post("/experts/grow", json={"count": 2})
    assert response.status_code == 202
    GrowResponse.model_validate(response.json(), strict=True)
    assert len(response.json()["started"]) == 2
    assert admin.post("/experts/grow").status_code == 202  # the body may be left out
    assert growth.asked == [("grow", 2), ("grow", 1)]
    growth.busy = True
    state = admin.get("/experts/growth").json()
    GrowthResponse.model_validate(state, strict=True)
    assert (state["state"], state["progress"]) == ("growing", 0.5)
    for path, body in (("/experts/grow", {}), ("/experts/shrink", {"count": 1}), ("/experts/reload", {})):
        response = admin.post(path, json=body)
        assert (response.status_code, response.json()["error_type"]) == (409, "busy")


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (NothingToGrowError("the store has every expert"), 409, "nothing_to_grow"),
        (GrowthSourceError("the checkpoint is not where it was"), 409, "no_source"),
        (GrowthError("give up at most 3"), 422, "validation"),
        (RuntimeError("/secret/path"), 500, "internal"),
    ],
)
def test_change_that_cannot_be_is_refused_with_its_reason(
    admin: httpx.Client, growth: ScriptedGrowth, failure: Exception, status: int, kind: str
) -> None:
    growth.failure = failure
    for path, body in (("/experts/grow", {}), ("/experts/shrink", {"count": 1}), ("/experts/reload", {})):
        response = admin.post(path, json=body)
        assert (response.status_code, response.json()["error_type"]) == (status, kind)
        assert (str(failure) in response.text) == isinstance(failure, GrowthError)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/experts/grow", {"count": 0}),
        ("/experts/grow", {"count": True}),
        ("/experts/grow", {"count": 10**9}),
        ("/experts/grow", {"cuont": 1}),
        ("/experts/shrink", {}),
        ("/experts/shrink", {"count": 1, "indices": [1]}),
        ("/experts/shrink", {"indices": []}),
        ("/experts/shrink", {"indices": [-1]}),
        ("/experts/shrink", {"indices": ["1"]}),
        ("/experts/reload", {"force": True}),
    ],
)
def test_bad_change_is_refused(admin: httpx.Client, growth: ScriptedGrowth, path: str, body: Any) -> None:
    response = admin.post(path, json=body)
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert not growth.asked


def test_shrink_and_reload_say_what_they_did(admin: httpx.Client, growth: ScriptedGrowth) -> None:
    shrunk = admin.post("/experts/shrink", json={"indices": [1]}).json()
    ShrinkResponse.model_validate(shrunk, strict=True)
    assert shrunk["freed_bytes"] is None
    reloaded = admin.post("/experts/reload").json()
    ReloadResponse.model_validate(reloaded, strict=True)
    assert (reloaded["added"], reloaded["removed"]) == (1, 0)
    assert growth.asked == [("shrink", [1], None), ("reload",)]


def test_model_without_a_store_cannot_change() -> None:
    with running(load=lambda progress: loaded(ScriptedEngine(), growth=None), admin_key=ADMIN) as server:
        ready(server)
        with server.client(headers=bearer(ADMIN)) as client:
            assert client.get("/experts/plan").status_code == 404
            assert client.post("/experts/grow").status_code == 404


# -- with the real engine ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_store(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A store with 12 of the bundled checkpoint's 64 deep experts."""
    prepare(Checkpoint.open(tiny_checkpoint), tmp_path / "store", SelectionRequest(experts="0-11")).run()
    return tmp_path / "store"


@pytest.fixture
def server(small_store: Path) -> Iterator[Running]:
    flags = {"store": str(small_store), "device": "cpu", "dtype": "float32", "slots": 16, "max_batch_size": 2}
    settings = load_settings(flags, environ={}).settings
    with running(load=lambda progress: load(settings, progress), admin_key=ADMIN) as found:
        ready(found)
        yield found


def deficit(client: httpx.Client) -> float:
    body = {"inputs": "Once upon a time there was", "parameters": {"max_new_tokens": 8, "details": True}}
    return float(client.post("/generate", json=body).json()["details"]["deficit"]["overall"])


def grown(client: httpx.Client, count: int) -> None:
    before = client.get("/experts/growth").json()
    assert client.post("/experts/grow", json={"count": count}).status_code == 202
    wait_until(lambda: client.get("/experts/growth").json()["state"] == "idle", seconds=60)
    after = client.get("/experts/growth").json()
    assert (after["error"], after["deep_experts"]) == (None, before["deep_experts"] + count)


def test_running_server_grows_shrinks_and_takes_over_what_others_did(
    server: Running, small_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server.client(headers=bearer(ADMIN), timeout=60) as client:
        before = deficit(client)
        best = client.get("/experts/plan", params={"count": 1}).json()["candidates"][0]
        grown(client, 20)
        available = client.get("/experts").json()["available"]
        assert all(available[layer][expert] for layer, expert in enumerate(best["experts"]))
        assert deficit(client) < before / 2
        shrunk = client.post("/experts/shrink", json={"count": 16}).json()
        assert len(shrunk["removed"]) == 16
        assert shrunk["freed_bytes"] == sum(removed["bytes"] for removed in shrunk["removed"])
        assert not any((small_store / removed["file"]).exists() for removed in shrunk["removed"])
        assert client.get("/experts").json()["totals"]["available"] == 16 * 8
        assert deficit(client) < before, "the 16 most wanted are better than 12 by their index"
        # The usage is on disk when the server has saved it; the command takes what it is given.
        assert main(["shrink", str(small_store), "--deep", str(read_manifest(small_store).deep_experts[0].index)]) == 0
        assert "files stay while somebody reads the store" in capsys.readouterr().out
        reloaded = client.post("/experts/reload").json()
        assert (reloaded["added"], reloaded["removed"], reloaded["growth"]["deep_experts"]) == (0, 1, 15)
        assert len(list((small_store / "experts").iterdir())) == 15
        assert client.post("/experts/reload").json()["removed"] == 0
        refused = client.post("/experts/shrink", json={"count": 8})
        assert refused.status_code == 422
        assert "give up at most 7" in refused.json()["error"]
        assert deficit(client) > 0


def test_answers_are_the_same_while_the_store_shrinks_to_what_a_fresh_server_has(
    server: Running, small_store: Path
) -> None:
    body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 12}}
    with server.client(headers=bearer(ADMIN), timeout=60) as client:
        client.post("/experts/shrink", json={"indices": [0, 5]})
        shrunk = client.post("/generate", json=body).json()
    settings = load_settings({"store": str(small_store), "device": "cpu", "dtype": "float32"}, environ={}).settings
    with running(load=lambda progress: load(settings, progress)) as fresh, fresh.client(timeout=60) as client:
        ready(fresh)
        assert client.post("/generate", json=body).json() == shrunk


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_no_request_fails_and_no_token_is_wrong_while_the_store_changes(server: Running, times: int) -> None:
    """Requests that may have every expert have the whole model's answer, whatever the store holds just then."""
    stop = threading.Event()
    kinds: list[dict[str, Any]] = [{"on_missing": "fetch"}, {}, {"pool": 4}, {"pool": 8, "on_missing": "fetch"}]

    def ask(kind: dict[str, Any]) -> str:
        body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 10, **kind}}
        response = httpx.post(server.url + "/generate", json=body, timeout=120)
        assert response.status_code == 200, (kind, response.text)
        return str(response.json()["generated_text"])

    answers: list[list[str]] = [[] for _ in kinds]
    answered = threading.Condition()

    def keep_asking(at: int) -> None:
        while not stop.is_set():
            answer = ask(kinds[at])
            with answered:
                answers[at].append(answer)
                answered.notify_all()

    def wait_for_answers() -> None:
        """Return once every kind has an answer to a request that was sent after the call."""
        with answered:
            enough = [len(found) + 2 for found in answers]
            is_so = lambda: all(len(found) >= num for found, num in zip(answers, enough, strict=True))  # noqa: E731
            assert answered.wait_for(is_so, 120)

    whole = [ask(kind) if "fetch" in kind.values() else None for kind in kinds]
    with (
        server.client(headers=bearer(ADMIN), timeout=120) as client,
        concurrent.futures.ThreadPoolExecutor(len(kinds)) as pool,
    ):
        asking = [pool.submit(keep_asking, at) for at in range(len(kinds))]
        try:
            for _ in range(times):
                grown(client, 3)
                wait_for_answers()
                assert client.post("/experts/shrink", json={"count": 4}).status_code == 200
                wait_for_answers()
                grown(client, 1)
        finally:
            stop.set()
        for future in asking:
            future.result(120)
        assert client.get("/experts/growth").json()["failures"] == 0
    assert set(answers[0]) == {whole[0]}
    assert set(answers[3]) == {whole[3]}


def test_store_that_had_everything_at_the_start_can_be_fetched_for_when_it_has_shrunk(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    prepare(Checkpoint.open(tiny_checkpoint), tmp_path / "store", SelectionRequest()).run()
    flags = {"store": str(tmp_path / "store"), "device": "cpu", "dtype": "float32", "slots": 16}
    settings = load_settings(flags, environ={}).settings
    body = {"inputs": "The capital of France is", "parameters": {"max_new_tokens": 8, "on_missing": "fetch"}}
    with (
        running(load=lambda progress: load(settings, progress), admin_key=ADMIN) as server,
        server.client(headers=bearer(ADMIN), timeout=60) as client,
    ):
        ready(server)
        whole = client.post("/generate", json=body).json()
        assert client.post("/experts/shrink", json={"count": 50}).status_code == 200
        assert deficit(client) > 0
        fetched = client.post("/generate", json=body)
        assert (fetched.status_code, fetched.json()) == (200, whole)
