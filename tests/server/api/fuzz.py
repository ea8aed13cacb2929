"""schemathesis against `deepfew serve` of the bundled checkpoint: hundreds of cases a route, the real engine behind.

Minutes long, so it is a command of its own: `python -m tests.server.api.fuzz [--examples 300] [--seconds 1500]`. Its
exit status is 0 when no check of any case failed and the server was ready and idle afterwards. The test in
`test_openapi.py` does the same in short with a scripted engine.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED
from benchmarks.harness.servers import running

CONFIG = """
# A value can be of the right type and yet too much for this model or this server: 400 (OpenAI's) and 422 say so. What
# changes the server wants the admin key (403) and one change at a time (409).
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 403, 404, 409, 422, 429]

# This stream ends only when its client leaves; test_live.py reads it.
[[operations]]
include-path = "/experts/live"
enabled = false
"""
LEAVE_SECONDS = 30
REQUEST_SECONDS = 120
ADMIN_KEY = "fuzz-admin-correct-horse"
ADMIN_PATHS = "^/experts/(grow|shrink|reload)$"


def main() -> None:
    """Serve, fuzz, and look at the server once more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=300, help="random cases of each operation")
    parser.add_argument("--seconds", type=int, default=1500, help="most time for all of them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--context-tokens", type=int, default=48, help="of the server, so that no case takes long")
    parser.add_argument("--admin", action="store_true", help="what the admin key opens, with the key, and nothing else")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        config = Path(folder) / "schemathesis.toml"
        config.write_text(CONFIG)
        store = make_store(BUNDLED, Path(folder) / "store")
        serve = (sys.executable, "-m", "server.cli", "serve", str(store), "--dtype", "float32")
        limits = ("--max-context-tokens", str(arguments.context_tokens), "--receive-seconds", "5")
        key = ("--admin-key", ADMIN_KEY) if arguments.admin else ()
        with running((*serve, *limits, *key, "--log-level", "warning")) as url:
            counts = ("--max-examples", str(arguments.examples), "--max-time", str(arguments.seconds))
            fuzz = (sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run")
            options = ("--seed", str(arguments.seed), "--no-color", "--continue-on-failure")
            patience = ("--request-timeout", str(REQUEST_SECONDS))  # a busy machine is no failure of the server
            command = [*fuzz, f"{url}/openapi.json", *counts, *options, *patience]
            if arguments.admin:
                command += ["--header", f"Authorization: Bearer {ADMIN_KEY}", "--include-path-regex", ADMIN_PATHS]
            status = subprocess.run(command, check=False).returncode
            left = _left_behind(url)
    print(f"left behind: {left or 'nothing'}")
    sys.exit(bool(status or left))


def _left_behind(url: str) -> str:
    """What is not as it should be when the last case is over; a case that was given up has a while to end."""
    until = time.monotonic() + LEAVE_SECONDS
    while True:
        ready = httpx.get(f"{url}/health/ready", timeout=30)
        names = "deepfew_requests_running|deepfew_requests_waiting|deepfew_kv_used_tokens"
        text = httpx.get(f"{url}/metrics", timeout=30).text
        busy = [f"{name} {value}" for name, value in re.findall(rf"^({names}) (\S+)", text, re.M) if float(value)]
        if ready.status_code == 200 and not busy:
            return ""
        if time.monotonic() > until:
            return ", ".join([*busy, f"ready: {ready.text}"])
        time.sleep(0.2)


if __name__ == "__main__":
    main()
