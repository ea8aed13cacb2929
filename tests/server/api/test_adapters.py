"""Adapters over HTTP: which requests have one, how they choose, and where the answer says so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from extractor.planning.plan import Plan, PlannedExpert, write_plan
from router.mask import ExpertMask
from server.serving.loading import load
from server.settings.load import load_settings
from tests.server.adapters import with_adapters
from tests.server.api.running import Running, running, wait_until

KEPT = [0, 2, 3, 7]


@pytest.fixture(scope="module")
def served(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("adapters")
    store = with_adapters(small_store, folder / "store", ExpertMask.same_in_every_layer(KEPT, 2, 8))
    columns = tuple(PlannedExpert((expert, expert)) for expert in KEPT)
    write_plan(folder / "half.json", Plan(2, 8, {"kind": "index"}, columns))
    flags = {"store": str(store), "device": "cpu", "dtype": "float32", "profiles": str(folder / "half.json")}
    with running(load=lambda progress: load(load_settings(flags, environ={}).settings, progress)) as found:
        wait_until(lambda: found.service.loaded is not None, seconds=120)
        yield found


@pytest.fixture
def client(served: Running) -> Iterator[httpx.Client]:
    with served.client() as found:
        yield found


def ask(client: httpx.Client, **parameters: Any) -> Any:
    body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 6, "details": True, **parameters}}
    response = client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_masked_requests_have_the_adapter_that_was_made_for_them_and_others_have_none(client: httpx.Client) -> None:
    answers = {
        name: ask(client, **parameters)
        for name, parameters in {
            "plain": {},
            "profile": {"profile": "half"},
            "pool": {"pool": 3},
            "without": {"profile": "half", "adapter": "none"},
            "named": {"profile": "half", "adapter": "pools"},
            "fetching": {"profile": "half", "on_missing": "fetch"},
        }.items()
    }
    used = {name: answer["details"]["deficit"]["adapter"] for name, answer in answers.items()}
    assert used == {
        "plain": None,
        "profile": "planned",
        "pool": "pools",
        "without": None,
        "named": "pools",
        "fetching": "planned",
    }
    texts = [answers[name]["generated_text"] for name in ("profile", "without", "named")]
    assert len(set(texts)) == 3
    loss = answers["profile"]["details"]["deficit"]["expected_loss"]
    assert 0 < loss["nats"] <= 0.2, "the adapter's own price"
    assert answers["without"]["details"]["deficit"]["expected_loss"] is None, "the store was not calibrated"


def test_an_adapter_that_cannot_be_used_is_refused_by_its_name(client: httpx.Client) -> None:
    for parameters, reason in (
        ({"adapter": "other", "profile": "half"}, "this server has planned, pools"),
        ({"adapter": "pools"}, "this request has no mask"),
        ({"adapter": "../x"}, "adapter"),
    ):
        response = client.post("/generate", json={"inputs": "a", "parameters": parameters})
        assert response.status_code == 422
        assert reason in response.text


def test_the_server_lists_its_adapters_and_the_figures_of_their_training(client: httpx.Client) -> None:
    assert client.get("/info").json()["adapters"] == ["planned", "pools"]
    found = client.get("/experts/profiles").json()
    assert [(one["name"], one["adapter"]) for one in found["profiles"]] == [("half", "planned")]
    planned, pools = found["adapters"]
    assert planned["is_for_one_mask"]
    assert planned["least_share"] == planned["largest_share"] == 0.5
    assert (pools["least_share"], pools["largest_share"]) == (0.1, 1.0)
    assert pools["perplexity_ratios"] == {"0.25": 1.05}
    assert pools["perplexity_ratios_before"] == {"0.25": 9.0}
