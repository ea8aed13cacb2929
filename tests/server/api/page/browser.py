"""Chromium for the tests of the page, driven by playwright; both are optional (`pip install -e .[browser]`)."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class NoBrowserError(Exception):
    """Chromium or playwright is missing; the text says which."""


def chromium() -> str:
    """The path of a Chromium on this machine. Raises NoBrowserError."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise NoBrowserError(f"no Chromium is on the path (looked for {', '.join(NAMES)}): install your system's")
    return found


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A browser without a window, for the length of the block.

    Raises:
        NoBrowserError: it or playwright is missing.
    """
    path = chromium()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise NoBrowserError("playwright is missing: pip install -e .[browser]") from error
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield opened
        finally:
            opened.close()


def open_page(context: Any, url: str) -> Any:
    """The page at `url` in a new tab, once its model is ready."""
    page = context.new_page()
    page.goto(url)
    page.locator("#state", has_text="ready").wait_for()
    return page


def ask(page: Any, text: str) -> None:
    """Send a question and wait for the end of its answer."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.locator("#send:visible").wait_for()
