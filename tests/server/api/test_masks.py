"""Masks and their price per request, in both dialects: what is taken, what is refused, and what the answer says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from expert_store.manifest import read_manifest
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.plan import Plan, PlannedExpert, write_plan
from extractor.planning.selection import SelectionRequest
from extractor.statistics.file import write_statistics
from extractor.statistics.statistics import ExpertStatistics, PricePoint
from extractor.writing.prepare import prepare
from server.api.admin.schemas import ProfilesResponse
from server.engine.request import Deficit, GenerationRequest
from server.masks.domain_prior import DomainPrior
from server.masks.masking import FixedMasking, PoolMasking
from server.masks.profiles import ProfileError
from server.model.load_progress import LoadProgress
from server.serving.deficit import DeficitDetails, deficit_details
from server.serving.loading import load
from server.settings.load import load_settings
from tests.server.api.running import Running, events_of, running, wait_until
from tests.server.api.scripted import EXPERTS, LAYERS, PRICE, ScriptedEngine, loaded

DEFICIT = {
    "overall": 0.125,
    "per_layer": [0.0, 0.25],
    "tokens": 12,
    "top1_missing_tokens": 3,
    "top1_missing_per_layer": [0, 3],
    "adapter": None,
}
CHAT: list[Any] = [{"role": "user", "content": "Where?"}]


@pytest.fixture
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


def nats_of_unknown_text() -> float:
    """What the scripted deficit costs where the kind of text is not known, between 0.1 and 0.3."""
    assert PRICE is not None
    nats = PRICE.expected_loss(0.125).nats
    assert 0.1 <= nats <= 0.3
    return nats


def generate(client: httpx.Client, stream: bool = False, **parameters: Any) -> httpx.Response:
    body = {"inputs": "abc", "parameters": {"max_new_tokens": 2, "details": True, **parameters}, "stream": stream}
    return client.post("/generate", json=body)


def test_what_a_request_says_of_experts_reaches_the_engine(client: httpx.Client, server: Running) -> None:
    assert generate(client).status_code == 200
    plain = server.engine.submitted[-1]
    assert (plain.masking, plain.on_missing, plain.router_temperature) == (None, "mask", 1.0)
    assert generate(client, profile="code", on_missing="refuse", router_temperature=0.5).status_code == 200
    asked = server.engine.submitted[-1]
    assert isinstance(asked.masking, FixedMasking)
    assert asked.masking.mask is not None
    assert asked.masking.mask.num_allowed.tolist() == [2, 2]
    assert (asked.on_missing, asked.router_temperature) == ("refuse", 0.5)
    for pool in (3, 0.75):
        assert generate(client, pool=pool, on_missing="fetch").status_code == 200
        masking = server.engine.submitted[-1].masking
        assert isinstance(masking, PoolMasking)
        weights = np.ones((2, 3, 1), dtype=np.float32)
        masking.observe(np.zeros((2, 3, 1), dtype=np.int64), weights)  # the three tokens of the prompt
        assert masking.mask is not None
        assert masking.mask.num_allowed.tolist() == [3, 3]


def test_openai_client_sends_the_same_as_extra_body(server: Running) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        client.completions.create(
            model="scripted", prompt=["ab", "c"], n=2, max_tokens=1, extra_body={"pool": 2, "router_temperature": 2}
        )
        requests = server.engine.submitted
        maskings = [request.masking for request in requests]
        assert len({id(masking) for masking in maskings}) == 4, "every answer follows its own tokens"
        assert {request.router_temperature for request in requests} == {2.0}
        answer = client.chat.completions.create(
            model="scripted", messages=CHAT, extra_body={"profile": "code", "on_missing": "mask"}
        )
        assert isinstance(requests[-1].masking, FixedMasking)
        assert answer.choices[0].model_extra is not None
        deficit = answer.choices[0].model_extra["deficit"]
        DeficitDetails.model_validate(deficit, strict=True)
        with pytest.raises(openai.BadRequestError) as refusal:
            client.chat.completions.create(model="scripted", messages=CHAT, extra_body={"profile": "chat"}, stream=True)
        assert refusal.value.param == "profile"
        assert "this server has code" in str(refusal.value)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"profile": "do-not-echo-me"}, "profile"),
    ({"profile": "../code"}, "profile"),
    ({"profile": ""}, "profile"),
    ({"profile": "x" * 65}, "profile"),
    ({"profile": 1}, "profile"),
    ({"profile": "code", "pool": 2}, "profile"),
    ({"pool": 0}, "pool"),
    ({"pool": -1}, "pool"),
    ({"pool": 5}, "pool"),
    ({"pool": 10**9}, "pool"),
    ({"pool": 1.5}, "pool"),
    ({"pool": -0.5}, "pool"),
    ({"pool": True}, "pool"),
    ({"pool": "2"}, "pool"),
    ({"pool": [2]}, "pool"),
    ({"on_missing": "ignore"}, "on_missing"),
    ({"on_missing": True}, "on_missing"),
    ({"router_temperature": 0}, "router_temperature"),
    ({"router_temperature": -1}, "router_temperature"),
    ({"router_temperature": 101}, "router_temperature"),
    ({"router_temperature": 1e-3}, "router_temperature"),
    ({"router_temperature": "1"}, "router_temperature"),
]


@pytest.mark.parametrize(("fields", "name"), BAD)
def test_bad_mask_is_refused_by_its_name_in_either_dialect(
    client: httpx.Client, server: Running, fields: dict[str, Any], name: str
) -> None:
    for stream in (False, True):
        response = generate(client, stream, **fields)
        assert (response.status_code, response.json()["error_type"]) == (422, "validation")
        assert f"`parameters.{name}`" in response.json()["error"]
        body = {"model": "scripted", "prompt": "a", "stream": stream, **fields}
        response = client.post(
            "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
        )
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name
        assert "do-not-echo-me" not in response.text
    assert not server.engine.submitted


def test_masks_are_refused_where_none_are_offered() -> None:
    with running(load=lambda progress: loaded(ScriptedEngine(), masks=None)) as server, server.client() as client:
        wait_until(lambda: server.service.loaded is not None)
        assert generate(client, pool=2).status_code == 422
        assert generate(client).status_code == 200
        assert client.get("/experts/profiles").json() == {
            "profiles": [],
            "adapters": [],
            "max_pool": 0,
            "has_prior": False,
        }


def test_every_answer_says_what_it_did_without_and_what_that_costs(client: httpx.Client) -> None:
    deficit = generate(client).json()["details"]["deficit"]
    DeficitDetails.model_validate(deficit, strict=True)
    loss = deficit.pop("expected_loss")
    assert deficit == DEFICIT
    assert [loss["low"], loss["high"]] == pytest.approx([0.1, 0.3])
    assert loss["nats"] == pytest.approx(nats_of_unknown_text())
    assert loss["perplexity_ratio"] == pytest.approx(np.exp(loss["nats"]))
    assert (loss["basis"], loss["is_measured"]) == ("all", True)
    last = events_of(generate(client, stream=True, profile="code").text)[-1]
    loss = last["details"]["deficit"]["expected_loss"]
    assert [loss["nats"], loss["low"], loss["high"]] == pytest.approx([0.1, 0.1, 0.1]), "the profile's own kind of text"
    assert loss["basis"] == "domain"


def test_text_that_routes_like_a_kind_is_priced_as_that_kind(client: httpx.Client, server: Running) -> None:
    shares = np.full((2, LAYERS, EXPERTS), 1e-6)
    shares[0, :, 0] = shares[1, :, 1] = 1.0
    wanted = np.zeros((LAYERS, EXPERTS))
    wanted[:, 1] = 1.0
    model = server.service.loaded
    assert model is not None
    assert model.masks is not None
    masks = replace(model.masks, prior=DomainPrior(shares, ["code", "prose"]))
    deficit = Deficit(0.125, (0.125,) * LAYERS, demand=wanted)
    request = GenerationRequest("one", (1,))
    loss = deficit_details(deficit, replace(model, masks=masks), request).model_dump()["expected_loss"]
    assert loss["basis"] == "routing"
    assert loss["nats"] == pytest.approx(0.3, rel=0.01), "prose costs 0.3, code 0.1"


def test_openai_answers_carry_the_price_where_they_end(server: Running) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="scripted", messages=CHAT, n=2, stream=True)
        ends = [chunk.choices[0] for chunk in stream if chunk.choices[0].finish_reason]
        assert len(ends) == 2
        for end in ends:
            assert end.model_extra is not None
            assert end.model_extra["deficit"]["expected_loss"]["nats"] == pytest.approx(nats_of_unknown_text())


def test_without_calibration_the_price_is_unknown() -> None:
    with running(load=lambda progress: loaded(ScriptedEngine(), price=None)) as server, server.client() as client:
        wait_until(lambda: server.service.loaded is not None)
        assert generate(client).json()["details"]["deficit"] == {**DEFICIT, "expected_loss": None}
        text = client.get("/metrics").text
    assert "deepfew_request_expected_loss_nats_count 0.0" in text
    assert "deepfew_expected_loss_nats" not in text.replace("request_expected_loss_nats", "")


def test_metrics_tell_masks_apart_by_names_of_this_server_alone(client: httpx.Client) -> None:
    generate(client)
    generate(client, profile="code")
    generate(client, pool=2)
    generate(client, profile="unheard-of")
    text = client.get("/metrics").text
    for labels in ('mask="none",profile=""', 'mask="profile",profile="code"', 'mask="pool",profile=""'):
        assert f"deepfew_masked_request_deficit_ratio_count{{{labels}}} 1.0" in text
        assert f"deepfew_masked_request_deficit_ratio_sum{{{labels}}} 0.125" in text
    assert "unheard-of" not in text
    assert f"deepfew_request_expected_loss_nats_sum {0.1 + 2 * nats_of_unknown_text():.3g}" in text
    assert f"deepfew_expected_loss_nats {nats_of_unknown_text():.3g}" in text
    assert "deepfew_top1_missing_tokens_total 3.0" in text
    assert 'deepfew_layer_top1_missing_tokens_total{layer="1"} 3.0' in text


def test_profiles_are_listed(client: httpx.Client) -> None:
    found = client.get("/experts/profiles").json()
    ProfilesResponse.model_validate(found, strict=True)
    assert found == {
        "profiles": [{"name": "code", "kept_share": 0.5, "available_share": 0.5, "adapter": None}],
        "adapters": [],
        "max_pool": 4,
        "has_prior": False,
    }


# -- with the real engine ----------------------------------------------------------------------------------------------

L, E = 8, 64


@pytest.fixture(scope="module")
def real(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A store of 32 experts, of which two profiles take 12 each, with calibrated statistics."""
    folder = tmp_path_factory.mktemp("masks")
    prepare(Checkpoint.open(tiny_checkpoint), folder / "store", SelectionRequest(experts="0-31")).run()
    for name, experts in (("low", range(12)), ("high", range(24, 40))):
        columns = tuple(PlannedExpert((expert,) * L) for expert in experts)
        write_plan(folder / f"{name}.json", Plan(L, E, {"kind": "index"}, columns))
    statistics = ExpertStatistics(read_manifest(folder / "store").source.fingerprint, L, E, 8, domains=["prose"])
    statistics.totals["demand_mass"][:] = 1.0
    statistics.price = [PricePoint("prose", 0.5, 1.0, 100, 0.5)]
    write_statistics(folder / "statistics.safetensors", statistics)
    flags = {
        "store": str(folder / "store"),
        "device": "cpu",
        "dtype": "float32",
        "slots": 32,
        "max_batch_size": 4,
        "profiles": f"{folder / 'low.json'}, {folder / 'high.json'}",
        "statistics": str(folder / "statistics.safetensors"),
    }
    settings = load_settings(flags, environ={}).settings
    with running(load=lambda progress: load(settings, progress)) as found:
        wait_until(lambda: found.service.loaded is not None, seconds=120)
        yield found


def test_real_masks_cost_what_they_hide(real: Running) -> None:
    def ask(**parameters: Any) -> Any:
        body = {"inputs": "Once upon a time there was", "parameters": {"max_new_tokens": 10, "details": True}}
        body["parameters"] |= parameters  # type: ignore[operator]
        response = httpx.post(real.url + "/generate", json=body, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()

    plain, low, pool = ask(), ask(profile="low"), ask(pool=12)
    whole = ask(on_missing="fetch")
    tempered = ask(router_temperature=2.0)
    deficits = [answer["details"]["deficit"]["overall"] for answer in (whole, plain, pool, low)]
    assert deficits[0] == 0.0
    assert deficits == sorted(deficits)
    assert deficits[1] < deficits[2] < deficits[3], "a pool of the prompt's own experts is better than any 12"
    details = low["details"]["deficit"]
    assert details["top1_missing_tokens"] > 0
    assert details["expected_loss"]["nats"] == pytest.approx(2 * details["overall"], abs=0.02) or (
        details["overall"] > 0.5
    )
    assert tempered["generated_text"] != plain["generated_text"]
    with real.client() as client:
        profiles = client.get("/experts/profiles").json()
    assert [(one["name"], one["kept_share"], one["available_share"]) for one in profiles["profiles"]] == [
        ("high", 0.25, 0.125),
        ("low", 0.1875, 0.1875),
    ]
    assert profiles["has_prior"] is True


def test_request_that_refuses_to_do_without_says_which_expert(real: Running) -> None:
    body: dict[str, Any] = {"inputs": "Once upon a time", "parameters": {"on_missing": "refuse", "profile": "low"}}
    with real.client(timeout=60) as client:
        response = client.post("/generate", json=body)
        assert (response.status_code, response.json()["error_type"]) == (424, "expert_missing")
        assert "of layer" in response.json()["error"]
        assert events_of(client.post("/generate", json={**body, "stream": True}).text)[-1]["error_type"] == (
            "expert_missing"
        )
        wait_until(lambda: client.get("/health/ready").status_code == 200)


def test_profile_that_cannot_be_is_said_before_the_model_is_loaded(real: Running, tmp_path: Path) -> None:
    model = real.service.loaded
    assert model is not None
    write_plan(tmp_path / "bad name.json", Plan(L, E, {"kind": "index"}, (PlannedExpert((0,) * L),)))
    store = model.engine.runner.model.store.path  # type: ignore[attr-defined]
    for profiles, message in ((tmp_path, "a profile's name has"), (tmp_path / "none.json", "does not exist")):
        settings = load_settings({"store": str(store), "profiles": str(profiles)}, environ={}).settings
        with pytest.raises(ProfileError, match=message):
            load(settings, LoadProgress())
