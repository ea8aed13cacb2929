"""`deepfew cluster CONFIG`: replicas of a store on Ray Serve, behind one address, until a signal."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from server.errors import UsageError
from server.serving.logging_setup import configure_logging

log = logging.getLogger(__name__)


def cluster(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="settings file (TOML), with the table [cluster]")],
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Ray cluster to join, such as auto; default one on this machine"),
    ] = None,
) -> int:
    """Serve a store from several replicas over HTTP, on Ray Serve, until a signal."""
    # Ray reads both when it is imported. Unless told not to, it sends statistics of its use to its makers, and one
    # machine alone listens on an address that others reach.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise UsageError("deepfew cluster needs Ray Serve: pip install 'deepfew[ray]'") from error
    from server.cluster.application import build
    from server.cluster.settings import read_cluster
    from server.serving.loading import check_store

    settings, parts = read_cluster(config)
    for part in parts:
        part.settings.require_safe_address()
        if address is None:
            check_store(part.settings)
    http, logs = parts[0].settings.http, parts[0].settings.log
    configure_logging(logs.log_format, logs.log_level)
    stopped = threading.Event()
    if address is None:
        ray.init(
            address="local", include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=True,
            configure_logging=False,
        )  # fmt: skip
    else:
        ray.init(address=address, configure_logging=False)
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: stopped.set())
    try:
        serve.start(http_options={"host": http.host, "port": http.port})
        serve.run(build(settings, parts), name="deepfew", route_prefix="/")
        log.info(
            "ready",
            extra={"url": f"http://{http.host}:{http.port}", "replicas": {part.name: part.replicas for part in parts}},
        )
        while not stopped.wait(1.0):
            pass
        log.info("draining", extra={"seconds": http.drain_seconds})
        serve.shutdown()
    finally:
        ray.shutdown()
    return 0
