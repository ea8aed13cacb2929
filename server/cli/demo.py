"""`python -m server.cli.demo`, run by `make demo`: the bundled checkpoint becomes a store, a server and streamed text.

Everything is real: the store is made by `deepfew extract`, the server is the one that `deepfew serve` runs, with fewer
slots than experts, and the text comes from a `POST /generate` over HTTP. A second run finds the store and is quick.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from expert_store.errors import StoreError
from expert_store.manifest import read_manifest
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.writing.journal import JOURNAL_NAME
from server.cli.main import main as deepfew
from server.cli.main import run
from server.cli.port import holder_of
from server.errors import UsageError
from server.serving.service import Service
from server.settings.load import load_settings

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "models" / "tiny-moe"
STORE = ROOT / "store" / "tiny-moe"
HOST = "127.0.0.1"
FIRST_PORT, NUM_PORTS = 8080, 20
SLOTS = 16
PROMPT = "The capital of France is"
PARAMETERS = {"max_new_tokens": 40, "details": True}

console = Console(highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo until Ctrl-C; returns the exit status."""
    application = typer.Typer(add_completion=False)
    application.command()(demo)
    return run(application, sys.argv[1:] if argv is None else argv, "python -m server.cli.demo")


def demo(
    port: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Port to listen on; by default the first free one from {FIRST_PORT}."),
    ] = None,
    slots: Annotated[int, typer.Option(metavar="N", help="Expert slots of a layer of 64.")] = SLOTS,
    store: Annotated[Path, typer.Option(metavar="STORE", help="Where the store is, or is made.")] = STORE,
    once: Annotated[bool, typer.Option("--once", metavar="", help="End after the first answer.")] = False,
) -> int:
    """Turn the bundled checkpoint into a store, a server and streamed text."""
    return make_store(store) or show_server(store, port or free_port(), slots, once=once)


def make_store(store: Path) -> int:
    """Extract the bundled checkpoint, or find that it was done. Returns the exit status.

    The demo's own store is made again if it cannot be read (another version, damaged); a store that the user named is
    never changed.
    """
    _heading(f"1  {CHECKPOINT.relative_to(ROOT)} → {_shown(store)}: one file for each deep expert")
    if store == STORE and store.exists() and not (store / JOURNAL_NAME).exists() and (why := _why_stale(store)):
        console.print(f"   {why}; making it anew", style="yellow", markup=False)
        shutil.rmtree(store)
    return deepfew(["extract", str(CHECKPOINT), str(store)])


def _why_stale(store: Path) -> str:
    """The reason why an extraction could not continue this store; empty if it could."""
    try:
        if read_manifest(store).source.fingerprint == Checkpoint.open(CHECKPOINT).fingerprint:
            return ""
    except StoreError as error:
        return str(error)
    return f"{_shown(store)} was made from another checkpoint"


def free_port() -> int:
    """The first port from `FIRST_PORT` on that nothing listens on.

    Raises:
        UsageError: none of `NUM_PORTS`.
    """
    for port in range(FIRST_PORT, FIRST_PORT + NUM_PORTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                console.print(f"   port {port} is in use{holder_of(port)}; trying the next one", style="yellow")
                continue
            return port
    raise UsageError(f"ports {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1} are all in use; name one with --port")


def show_server(store: Path, port: int, slots: int, *, once: bool) -> int:
    """Serve the store, show one answer, print what to try, and go on serving (or not, with `once`)."""
    from server.cli.serve import serve_settings

    flags = {"store": str(store), "port": port, "slots": slots, "log_level": "warning"}
    _heading(f"2  a server on {HOST}:{port}, with {slots} expert slots in each layer")
    failures: list[Exception] = []

    def show(service: Service, stop: Callable[[], None]) -> None:
        try:
            if _wait(service):
                _stream(port)
                _print_what_to_try(port)
        except Exception as error:
            failures.append(error)
        if once or failures:
            stop()

    def in_background(service: Service, url: str, stop: Callable[[], None]) -> None:
        threading.Thread(target=show, args=(service, stop), daemon=True).start()

    status = serve_settings(load_settings(flags, environ={}), on_listening=in_background)
    if failures:
        raise failures[0]
    console.print("\nstopped")
    return status


def _wait(service: Service) -> bool:
    """Show how loading goes; returns whether the server became ready."""
    with console.status("   starting") as spinner:
        while not (health := service.health()).is_ready:
            if service.error is not None or health.state != "loading":
                return False
            spinner.update(f"   {health.reason}")
            time.sleep(0.1)
    return True


def _stream(port: int) -> None:
    body = json.dumps({"inputs": PROMPT, "parameters": PARAMETERS, "stream": True})
    _heading("3  POST /generate, as it arrives")
    console.print(f"   {PROMPT}", style="dim", end="", markup=False)
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != http.HTTPStatus.OK:
        raise UsageError(f"the server answered {response.status}: {response.read(500).decode(errors='replace')}")
    started, event = time.monotonic(), {}
    for line in response:
        if line.startswith(b"data:"):
            event = json.loads(line.removeprefix(b"data:"))
            if "error" in event:
                raise UsageError(f"the stream ended with an error: {event['error']}")
            if not event["token"]["special"]:
                console.print(event["token"]["text"], style="bold", end="", markup=False)
    seconds = time.monotonic() - started
    connection.close()
    details = event["details"]
    tokens, missing = details["generated_tokens"], details["deficit"]["overall"]
    console.print(f"\n   {tokens} tokens in {seconds:.2f} s; deficit {missing:.1%} (router mass that was unavailable)")


def _print_what_to_try(port: int) -> None:
    url, header = f"http://{HOST}:{port}", "-H 'Content-Type: application/json'"
    body = json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": 20}})
    _heading("4  your turn")
    console.print(f"in a browser, a chat and the map of experts:  {url}/\nin another terminal:", markup=False)
    for line in (
        f"{_shown(Path(sys.executable).with_name('deepfew'))} chat {url}",
        f"curl {url}/generate {header} -d '{body}'",
        f"curl -N {url}/generate_stream {header} -d '{body}'",
        f"curl {url}/experts",
        f"curl {url}/metrics",
    ):
        console.print(line, markup=False)
    console.print("\nCtrl-C ends the server.", style="dim")


def _heading(text: str) -> None:
    console.print(f"\n{text}", style="bold cyan", markup=False)


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main())
