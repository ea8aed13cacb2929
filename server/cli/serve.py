"""`deepfew serve STORE`: bind, answer about health at once, load in the background, serve until a signal."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

from server.api.app import create_app
from server.api.http.listener import Listener, PortTakenError, bind_socket
from server.api.readiness import checked
from server.cli.flags import SECTIONS, with_settings
from server.cli.port import holder_of
from server.errors import UsageError, message_of
from server.serving.loading import check_store, load
from server.serving.logging_setup import configure_logging
from server.serving.metrics import Metrics
from server.serving.service import Service
from server.settings.load import Resolved
from server.settings.schema import Settings
from server.settings.version import package_version

log = logging.getLogger(__name__)


@with_settings(*SECTIONS)
def serve(resolved: Resolved) -> int:
    """Serve a store over HTTP until a signal; in a browser the address is a page with a chat and the map of experts."""
    status = serve_settings(resolved)
    if status == 0:
        # All is saved. An interpreter that frees a model object by object takes seconds, or a minute on a busy machine.
        _leave(0)
    return status


def _leave(status: int) -> NoReturn:
    """End the process without freeing what it holds; the log and the output are written first."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


OnListening = Callable[[Service, str, Callable[[], None]], None]


def serve_settings(resolved: Resolved, *, on_listening: OnListening | None = None) -> int:
    """Serve a store.

    Args:
        resolved: settings, logged with their origins.
        on_listening: called when the socket is bound and loading begins, with the service, the server's address, and a
            function that stops the server as a signal does. Must not block.

    Returns:
        0 after a signal; 2 if the model could not be loaded and the log says how to correct it. If the engine's thread
        hangs, the process ends here with status 1, since an interpreter that waits for the thread would hang too.

    Raises:
        UsageError: the address is taken. SettingsError, ManifestError: found before listening. Any error of loading
        that is not one of ours.
    """
    settings = resolved.settings
    configure_logging(settings.log.log_format, settings.log.log_level)
    settings.require_safe_address()
    check_store(settings)
    listener = _bind(settings)
    port = listener.getsockname()[1]
    host = settings.http.host
    url = f"http://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"http://{host}:{port}"
    changed = {path: value for path, value, origin in resolved.rows() if origin != "default"}
    log.info("listening", extra={"url": url, "page": f"{url}/", "settings": changed})
    service = Service(
        lambda progress: checked(load(settings, progress)),
        stall_seconds=settings.engine.stall_seconds,
        on_failure=lambda: server.stop(),
    )
    version = package_version()
    app = create_app(
        service, Metrics(service, version), settings.http, version=version, log_prompts=settings.log.log_prompts
    )
    server = Listener(app, service, settings.http)
    service.start()
    if on_listening is not None:
        on_listening(service, url, server.stop)
    server.run(sockets=[listener])
    if service.error is not None:
        message = message_of(service.error)
        if message is None:
            raise service.error
        log.error(message)
        return 2
    log.info("stopped")
    if service.loaded is not None and service.loaded.engine.status().is_wedged:
        _leave(1)
    if service.loaded is None:
        # The loading thread is deep inside a library; an interpreter that unloads under it may crash.
        _leave(0)
    return 0


def _bind(settings: Settings) -> socket.socket:
    try:
        return bind_socket(settings.http.host, settings.http.port)
    except PortTakenError as error:
        raise UsageError(f"{error}{holder_of(settings.http.port)}; choose another with --port, or stop it") from error
    except OSError as error:
        raise UsageError(
            f"cannot listen on {settings.http.host} port {settings.http.port}: {error.strerror or error}; "
            "choose another --host or --port"
        ) from error
