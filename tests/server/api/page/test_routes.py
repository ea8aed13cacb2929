"""The page as a browser gets it: which requests get it, its headers, and that it needs no key and holds nothing."""

from __future__ import annotations

import re
import threading

import httpx
import pytest

from server.api.page.routes import FILES, FOLDER, INDEX
from server.model.load_progress import LoadProgress
from server.serving.service import LoadedModel
from tests.server.api.running import running
from tests.server.api.scripted import ScriptedEngine, loaded

KEY = "correct-horse-battery"
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


def test_browser_gets_the_page_and_a_client_what_it_got_before() -> None:
    with running() as server, server.client() as client:
        page = client.get("/", headers=BROWSER)
        assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert page.headers["vary"] == "Accept"
        assert page.content == INDEX.content
        other = client.get("/")
        assert (other.status_code, other.headers["allow"]) == (405, "POST")
        assert other.json()["error_type"] == "method_not_allowed"
        assert client.post("/", json={"inputs": "a"}, headers=BROWSER).json()[0]["generated_text"]


def test_every_file_that_a_file_of_the_page_names_is_there_and_nothing_is_from_elsewhere() -> None:
    for name, content in {"index.html": INDEX.content, **{n: f.content for n, f in FILES.items()}}.items():
        text = content.decode()
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        named = re.findall(r"from \"\./([\w.-]+)\"", text) + re.findall(r"(?:src|href)=\"page/([\w.-]+)\"", text)
        assert set(named) <= set(FILES), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
    html = INDEX.content.decode()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", html)
    assert {path.name for path in FOLDER.iterdir()} == {*FILES, "index.html"}


def test_headers_forbid_what_the_page_does_not_do() -> None:
    with running() as server, server.client() as client:
        for path in ("/", *(f"/page/{name}" for name in FILES)):
            response = client.get(path, headers=BROWSER)
            assert response.status_code == 200
            rules = dict(rule.strip().split(" ", 1) for rule in response.headers["content-security-policy"].split(";"))
            assert (
                rules["default-src"]
                == rules["frame-ancestors"]
                == rules["base-uri"]
                == rules["form-action"]
                == "'none'"
            )
            assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["referrer-policy"] == "no-referrer"


def test_browser_that_has_a_file_is_told_so() -> None:
    with running() as server, server.client() as client:
        etag = client.get("/", headers=BROWSER).headers["etag"]
        for known in (etag, f"W/{etag}", f'"other", {etag}'):
            again = client.get("/", headers={**BROWSER, "if-none-match": known})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
        assert client.get("/", headers={**BROWSER, "if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "wrong"}], ids=["no key", "a wrong key"])
def test_page_needs_no_key_and_opens_nothing_else(headers: dict[str, str]) -> None:
    with running(api_key=KEY) as server, server.client(headers={**BROWSER, **headers}) as client:
        assert client.get("/").status_code == 200
        assert client.head("/").status_code == 200
        for name in FILES:
            assert client.get(f"/page/{name}").status_code == 200
        assert client.get("/page/none.js").status_code == 404
        for method, path in (("POST", "/"), ("POST", "/page/main.js"), ("GET", "/info"), ("GET", "/page/../info")):
            raw = client.build_request(method, httpx.URL(server.url).copy_with(raw_path=path.encode()))
            assert client.send(raw).status_code == 401, path
        assert client.get("/", headers={"accept": "*/*"}).status_code == 401


def test_page_is_there_before_the_model_is() -> None:
    go = threading.Event()

    def load(progress: LoadProgress) -> LoadedModel:
        go.wait(10)
        return loaded(ScriptedEngine())

    with running(load=load) as server, server.client(headers=BROWSER) as client:
        assert client.get("/health/ready").status_code == 503
        assert client.get("/").status_code == 200
        go.set()
