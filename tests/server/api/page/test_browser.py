"""The page in Chromium: a conversation, a stop, a growth, a wrong key, a server that comes back, and accessibility."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from server.serving.loading import load
from server.settings.load import load_settings
from tests.server.api.page.browser import NoBrowserError, ask, browser, open_page
from tests.server.api.running import Running, running, wait_until
from tests.server.api.scripted import CharTokenizer, ScriptedEngine, experts_snapshot, loaded

pytestmark = pytest.mark.exhaustive

KEY, ADMIN = "correct-horse-battery", "staple-of-the-admin"
WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        with browser() as opened:
            yield opened
    except NoBrowserError as error:
        pytest.skip(str(error))


@pytest.fixture
def tab(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a tab of a browser without a history; at the end no error may have been logged in it."""
    contexts, troubles = [], []

    def opened(**options: Any) -> Any:
        contexts.append(chromium.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options}))
        contexts[-1].set_default_timeout(20_000)
        contexts[-1].on("weberror", lambda error: troubles.append(str(error.error)))
        return contexts[-1]

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


def figures(page: Any) -> dict[str, str]:
    """The figures under the last answer."""
    names, values = (page.locator(f".theirs >> nth=-1 >> .figures {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))


def test_conversation_streams_with_its_price_and_is_kept_edited_and_asked_again(tab: Any) -> None:
    engine = ScriptedEngine(answer=["Paris", " **is**", " it.\n", "```py\n", "<b>x</b>", "\n```"])
    with running(engine) as server:
        context = tab()
        page = open_page(context, server.url)
        page.click(".options summary")
        page.fill("#system", "Be short.")
        page.fill("#temperature", "0.5")
        page.fill("#seed", "7")
        page.select_option("#experts-choice", "profile:code")
        ask(page, "What is the capital of France?")
        answer = page.locator(".theirs")
        assert answer.locator("strong").inner_text() == "is"
        assert answer.locator("pre").inner_text() == "<b>x</b>"
        shown = figures(page)
        assert (shown["tokens"], shown["deficit"], shown["expected perplexity"]) == ("7", "12.5 %", "× 1.11")
        sent = engine.submitted[0]
        assert "".join(map(chr, sent.prompt_ids)).startswith("<system>Be short.\n<user>What is the capital")
        assert (sent.sampling.temperature, sent.sampling.seed) == (0.5, 7)
        assert sent.masking is not None
        page.reload()
        page.locator("#state", has_text="ready").wait_for()
        assert page.locator(".mine .text").inner_text() == "What is the capital of France?"
        page.locator(".mine").get_by_role("button", name="Edit").click()
        page.locator(".mine textarea").fill("And of Spain?")
        page.locator(".mine").get_by_role("button", name="Ask again").click()
        wait_until(lambda: len(engine.submitted) == 2)
        page.locator("#send:visible").wait_for()
        assert "And of Spain?" in "".join(map(chr, engine.submitted[1].prompt_ids))
        page.locator(".theirs").get_by_role("button", name="Ask again").click()
        wait_until(lambda: len(engine.submitted) == 3)
        page.locator("#send:visible").wait_for()
        assert page.locator("article").count() == 2
        page.click("#new")
        assert page.locator("#conversation option").all_inner_texts() == ["New conversation", "And of Spain?"]


def test_thinking_is_folded_and_told_apart_from_the_answer(tab: Any) -> None:
    tokenizer = CharTokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if false %}</think>{% endif %}<think>\n"
    )
    engine = ScriptedEngine(answer=["A capital", "?", "</think>", "Paris."])
    with running(load=lambda progress: loaded(engine, tokenizer=tokenizer)) as server:
        page = open_page(tab(), server.url)
        ask(page, "What is the capital of France?")
        assert page.locator(".theirs > .text").inner_text() == "Paris."
        assert page.locator(".thinking .text").is_hidden()
        page.click(".thinking summary")
        assert page.locator(".thinking .text").inner_text() == "A capital?"


def test_markup_in_an_answer_stays_text_and_links_lead_to_the_web_alone(tab: Any) -> None:
    hostile = (
        "<img src=x onerror=alert(1)><script>alert(1)</script> [a](javascript:alert(1)) [b](data:text/html,x) "
        '[c](https://a.example/"onclick=alert(1)) **<b>x</b>** `<i>`\n\n```html\n<script>alert(1)</script>\n```\n'
        "# <u>t</u>\n- <a href=javascript:alert(1)>l</a>\n> <iframe>"
    )
    model = loaded(ScriptedEngine(answer=[hostile], max_context=2000), max_context_tokens=2000)
    with running(load=lambda progress: model) as server:
        page = open_page(tab(), server.url)
        ask(page, hostile)
        made = page.evaluate("[...document.querySelectorAll('#messages *')].map(one => one.localName)")
        assert not set(made) & {"img", "script", "b", "i", "u", "iframe"}
        links = page.evaluate("[...document.querySelectorAll('#messages a')].map(a => [a.protocol, a.rel, a.onclick])")
        assert links == [["https:", "noopener noreferrer", None]]
        assert "onerror=alert(1)" in page.locator(".theirs .text").inner_text()


def test_conversations_that_do_not_fit_go_the_oldest_first(tab: Any) -> None:
    fill = """async (length) => {
        const { Conversations } = await import("/page/conversations.js");
        localStorage.clear();
        const kept = new Conversations();
        for (let at = 0; at < 60; at++) {
            kept.begin();
            kept.current.messages.push({ role: "user", content: at + "x".repeat(length) });
            kept.save();
        }
        return new Conversations().all.map((one) => parseInt(one.messages[0].content));
    }"""
    with running() as server:
        page = open_page(tab(), server.url)
        assert page.evaluate(fill, 10) == list(range(59, 9, -1))
        few = page.evaluate(fill, 100_000)
        assert few == list(range(59, 59 - len(few), -1))
        assert len(few) == 19


def test_stop_ends_the_answer_in_the_engine_too(tab: Any) -> None:
    engine = ScriptedEngine(pause_after=2)
    with running(engine) as server:
        page = open_page(tab(), server.url)
        page.fill("#prompt", "Where is Paris?")
        page.click("#send")
        page.locator(".theirs .text", has_text="Paris,").wait_for()
        page.click("#stop")
        page.locator(".theirs", has_text="Stopped.").wait_for()
        wait_until(lambda: len(engine.cancelled) == 1)
        assert "Paris," in page.locator(".theirs .text").inner_text()
        engine.resume.set()
        ask(page, "Again?")
        assert page.locator(".theirs").count() == 2


def test_wrong_key_is_told_and_the_right_one_is_kept_in_the_tab_alone(tab: Any) -> None:
    with running(api_key=KEY) as server:
        context = tab()
        page = context.new_page()
        page.goto(server.url)
        dialog = page.locator("#key-dialog")
        dialog.wait_for()
        assert "wants its key" in dialog.inner_text()
        page.fill("#api-key", "wrong")
        dialog.get_by_role("button", name="Use").click()
        dialog.get_by_text("This key is wrong").wait_for()
        page.fill("#api-key", KEY)
        dialog.get_by_role("button", name="Use").click()
        page.locator("#state", has_text="ready").wait_for()
        ask(page, "Where is Paris?")
        assert "city of light" in page.locator(".theirs .text").inner_text()
        assert KEY not in json.dumps(page.evaluate("Object.entries(localStorage)"))
        assert KEY not in page.url
        page.reload()
        page.locator("#state", has_text="ready").wait_for()
        other = context.new_page()
        other.goto(server.url)
        other.locator("#key-dialog").wait_for()


def test_server_that_goes_away_is_told_and_used_again_when_it_is_back(tab: Any) -> None:
    with running(ScriptedEngine(pause_after=2)) as server:
        page = open_page(tab(), server.url)
        page.fill("#prompt", "Where is Paris?")
        page.click("#send")
        page.locator(".theirs .text", has_text="Paris,").wait_for()
        port = server.port
    page.locator("#trouble", has_text="Trying again").wait_for()
    page.locator(".theirs .trouble").wait_for()
    assert page.locator("#state").inner_text() == "no connection"
    with running(port=port):
        page.locator("#state", has_text="ready").wait_for()
        assert page.locator("#trouble").is_hidden()
        page.locator(".theirs").get_by_role("button", name="Ask again").click()
        page.locator(".theirs .text", has_text="city of light").wait_for()


def test_map_shows_one_expert_the_difference_of_two_and_a_table_by_keyboard(tab: Any) -> None:
    with running() as server:
        page = open_page(tab(), server.url)
        page.locator("#legend", has_text="in a slot 4").wait_for()
        page.focus("#map")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        page.locator("#reading", has_text="layer 0, expert 0").wait_for()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("End")
        assert "layer 1, expert 3; not here" in page.locator("#spoken").inner_text()
        rows = [row.split("\t") for row in page.locator("#reading tbody tr").all_inner_texts()]
        assert ["wanted", "1", "8", "+7"] in rows
        page.keyboard.press("Escape")
        assert page.locator("#reading").inner_text() == ""
        for mode in ("lately", "demand", "uses", "missing", "place"):
            page.select_option("#mode", mode)
        page.select_option("#order", "wanted")
        page.click("#table summary")
        page.locator("#table-body tbody tr").nth(1).wait_for()
        assert page.locator("#table-body tbody tr").all_inner_texts()[1].split("\t")[-1] == "25.0 %"
        page.select_option("#table-layer", "1")
        assert page.locator("#table-body tbody tr").count() == 4


def test_map_takes_every_cell_of_a_large_model(tab: Any) -> None:
    layers, experts = 61, 384
    small = experts_snapshot()
    changed = {
        name: getattr(small, name).repeat(1).take(range(layers), mode="wrap")
        for name in (
            "deficit",
            "top1_missing",
            "hits",
            "misses",
            "evictions",
            "fetch_bytes",
            "fetch_seconds",
            "expert_bytes",
        )
    }
    cells = {
        name: getattr(small, name).repeat(96, axis=1).take(range(layers), axis=0, mode="wrap")
        for name in ("available", "corrupt", "uses", "demand", "served_mass", "demand_mass", "resident")
    }
    tier = replace(small.tier, in_host=small.tier.in_host.repeat(96, axis=1).take(range(layers), axis=0, mode="wrap"))
    shot = replace(small, **changed, **cells, tier=tier, shards=())
    model = loaded(ScriptedEngine(), lambda: shot, num_layers=layers, num_experts=experts, masks=None)
    with running(load=lambda progress: model) as server:
        page = open_page(tab(), server.url)
        page.locator("#legend", has_text=f"not here {layers * 96:,}").wait_for()
        assert page.locator("#experts *").count() < 300, "cells are pixels, not elements"


@pytest.fixture
def growing(tiny_checkpoint: Path, tmp_path: Path) -> Iterator[Running]:
    """The real engine over 12 of the bundled checkpoint's 64 deep experts."""
    prepare(Checkpoint.open(tiny_checkpoint), tmp_path / "store", SelectionRequest(experts="0-11")).run()
    flags = {"store": str(tmp_path / "store"), "device": "cpu", "dtype": "float32", "slots": 16}
    settings = load_settings(flags, environ={}).settings
    with running(load=lambda progress: load(settings, progress), admin_key=ADMIN) as server:
        wait_until(lambda: server.service.loaded is not None, seconds=120)
        yield server


def test_growth_from_the_page_makes_the_deficit_fall(tab: Any, growing: Running) -> None:
    page = open_page(tab(), growing.url)
    page.click(".options summary")
    page.fill("#max_tokens", "12")
    page.fill("#temperature", "0")
    ask(page, "What is the capital of France?")
    before = float(figures(page)["deficit"].split()[0])
    page.locator(".brings", has_text="would serve").wait_for()
    page.locator("#grow-count").fill("24")
    page.get_by_role("button", name="Grow by 24").click()
    page.fill("#admin-key", "wrong")
    page.locator("#key-dialog").get_by_role("button", name="Use").click()
    page.locator(".growth .trouble", has_text="admin key").wait_for()
    page.get_by_role("button", name="Grow by 24").click()
    page.fill("#admin-key", ADMIN)
    page.locator("#key-dialog").get_by_role("button", name="Use").click()
    page.locator(".growth", has_text="36 deep experts").wait_for()
    page.locator("#legend", has_text=f"not here {8 * 28}").wait_for()
    page.locator(".theirs").get_by_role("button", name="Ask again").click()
    page.locator("#send:visible").wait_for()
    assert float(figures(page)["deficit"].split()[0]) < before / 2
    page.get_by_role("button", name="Shrink by 24").click()
    page.locator(".growth", has_text="12 deep experts").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_axe_finds_nothing_serious_and_nothing_is_cut_off(tab: Any, scheme: str, viewport: dict[str, int]) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install -e .[browser]").Axe()
    with running(
        ScriptedEngine(answer=["# A title\n", "- one\n- two\n\n", "`x`", " [a](https://a.example)"])
    ) as server:
        page = open_page(tab(color_scheme=scheme, viewport=viewport), server.url)
        ask(page, "Where is Paris?")
        page.click(".options summary")
        page.evaluate("document.getElementById('table').open = true")
        for view in ("chat", "experts", "now"):
            page.evaluate("view => { location.hash = view; }", view)
            page.locator(f"#{view}").wait_for()
            found = axe.run(page).response["violations"]
            assert [
                (one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")
            ] == []
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= viewport["width"], f"{view} is {width} wide"
        page.click("#keys")
        assert [
            one["id"] for one in axe.run(page).response["violations"] if one["impact"] in ("serious", "critical")
        ] == []
