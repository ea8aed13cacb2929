"""docs/http.md against the code: every route, setting and metric is there, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.api.http.errors import TABLE
from server.settings.load import leaves
from tests.server.api.running import running


@pytest.fixture(scope="module")
def page() -> str:
    return (Path(__file__).parents[3] / "docs" / "http.md").read_text()


def test_every_setting_is_documented_as_it_is(page: str) -> None:
    rows = re.findall(
        r"^\| `([a-z_.]+)` \| (?:`(--[a-z-]+)`|argument) \| `(DEEPFEW_\w+)` \| (.*?) \| (.*) \|$", page, re.M
    )
    assert [row[0] for row in rows] == [leaf.path for leaf in leaves()]
    for leaf, (path, flag, variable, default, text) in zip(leaves(), rows, strict=True):
        assert (flag or leaf.flag, variable, text) == (leaf.flag, leaf.variable, leaf.info.description), path
        assert default.strip("` ") == ("" if leaf.info.default is None else str(leaf.info.default)), path


def test_every_metric_and_route_is_documented(page: str) -> None:
    with running() as server, server.client() as client:
        paths = set(client.get("/openapi.json").json()["paths"])
        texts = [client.get(path).text for path in ("/metrics", "/metrics/vllm")]
    exported = {
        family.name + ("_total" if family.type == "counter" else "")
        for text in texts
        for family in text_string_to_metric_families(text)
    }
    assert set(re.findall(r"`(deepfew_\w+|vllm:\w+)`", page)) == exported
    assert {path for path in paths if f"{path}`" not in page} == set()


def test_every_test_that_the_reliability_page_names_exists() -> None:
    root = Path(__file__).parents[3]
    page = (root / "docs" / "reliability.md").read_text()
    defined = {
        name
        for file in root.glob("tests/**/test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    named = {name for name in re.findall(r"`(test_\w+)`", page) if f"{name}.py" not in page}
    assert named
    assert named <= defined


def test_every_status_is_documented(page: str) -> None:
    documented = {int(status) for status in re.findall(r"\b[45]\d\d\b", page)}
    assert {row.status for row in TABLE.values()} <= documented
