"""The OpenAPI document against the running server: schemathesis sends what it allows and what it forbids."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.api.fuzz import CONFIG
from tests.server.api.running import running


def test_document_has_every_body_and_every_model_that_it_refers_to() -> None:
    with running() as server, server.client() as client:
        document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert "messages" in schemas["ChatRequest"]["properties"]
    assert "HTTPValidationError" not in schemas
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert ("requestBody" in operation) == (method == "post"), path
    references = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert references <= set(schemas)
    assert "securitySchemes" not in document["components"]


def test_document_of_a_guarded_server_tells_of_the_key() -> None:
    headers = {"x-api-key": "correct-horse-battery"}
    with running(api_key=headers["x-api-key"]) as server, server.client(headers=headers) as client:
        document = client.get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "header"}
    assert "401" in document["paths"]["/generate"]["post"]["responses"]
    assert "401" not in document["paths"]["/health/live"]["get"]["responses"]


def test_document_tells_which_routes_want_the_admin_key() -> None:
    with running(admin_key="staple-of-the-admin") as server, server.client() as client:
        document = client.get("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"admin_bearer", "admin_header"}
    guarded = {
        path
        for path, operations in document["paths"].items()
        for operation in operations.values()
        if {"admin_bearer": []} in operation.get("security", [])
    }
    assert guarded == {"/experts/grow", "/experts/shrink", "/experts/reload"}
    assert all("403" in document["paths"][path]["post"]["responses"] for path in guarded)
    assert document["paths"]["/experts/plan"]["get"]["parameters"][0]["name"] == "count"
    assert document["paths"]["/experts/reload"]["post"]["requestBody"]["required"] is False


@pytest.mark.parametrize(
    ("phases", "num_examples"),
    [("fuzzing", 3), pytest.param("examples,coverage,fuzzing,stateful", 40, marks=pytest.mark.exhaustive)],
)
def test_schemathesis_finds_no_difference(tmp_path: Path, phases: str, num_examples: int) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    with running(receive_seconds=5.0) as server:
        found = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"),
                *(
                    f"{server.url}/openapi.json",
                    "--phases",
                    phases,
                    "--max-examples",
                    str(num_examples),
                    "--seed",
                    "1",
                    "--no-color",
                ),
            ],
            capture_output=True,
            text=True,
            timeout=380,
            check=False,
        )
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
