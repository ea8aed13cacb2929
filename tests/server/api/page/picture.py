"""The picture of the page for the README: a part of the bundled checkpoint, asked, grown, and asked again.

`python -m tests.server.api.page.picture docs/figures/page.png` writes it. It needs what the tests of the page need.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from server.serving.loading import load
from server.settings.load import load_settings
from tests.server.api.page.browser import ask, browser, open_page
from tests.server.api.running import running, wait_until

CHECKPOINT = Path(__file__).resolve().parents[4] / "models" / "tiny-moe"
ADMIN = "staple-of-the-admin"
KEPT, ADDED = 16, 38
BEFORE = ("Which river flows through Cairo?", "What is the capital of Japan?")
AFTER = ("What is the capital of France?", "What is the capital of Japan?")
LAST = "Write a short story about a dog who lost his ball in the big park."
WATCH_MS = 9_000


def main() -> None:
    """Write the picture to the path that the command line names."""
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="page-picture-") as folder, browser() as chromium:
        prepare(Checkpoint.open(CHECKPOINT), Path(folder) / "store", SelectionRequest(count=KEPT)).run()
        flags = {"store": f"{folder}/store", "device": "cpu", "slots": 24, "host_memory": "50%"}
        settings = load_settings(flags, environ={}).settings
        with running(load=lambda progress: load(settings, progress), admin_key=ADMIN) as server:
            wait_until(lambda: server.service.loaded is not None, seconds=120)
            context = chromium.new_context(viewport={"width": 1360, "height": 850}, color_scheme="light")
            page = open_page(context, server.url)
            page.click(".options summary")
            page.fill("#temperature", "0")
            page.fill("#max_tokens", "90")
            page.click(".options summary")
            for question in (*BEFORE, LAST):
                ask(page, question)
            page.locator("#grow-count").fill(str(ADDED))
            page.get_by_role("button", name=f"Grow by {ADDED}").click()
            page.fill("#admin-key", ADMIN)
            page.locator("#key-dialog").get_by_role("button", name="Use").click()
            page.locator(".growth", has_text=f"{KEPT + ADDED} deep experts").wait_for()
            page.click("#new")
            for question in AFTER:
                ask(page, question)
            page.wait_for_timeout(WATCH_MS)
            page.fill("#prompt", LAST)
            page.press("#prompt", "Enter")
            page.locator("#map").focus()
            for key in ("ArrowRight", "ArrowRight", "Enter", "ArrowDown", "ArrowRight", "ArrowRight", "Enter"):
                page.keyboard.press(key)
            page.evaluate("document.activeElement.blur()")
            page.locator("#send:visible").wait_for()
            page.locator("#grow-count").fill("4")
            page.wait_for_timeout(600)
            page.screenshot(path=out)


if __name__ == "__main__":
    main()
