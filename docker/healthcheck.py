"""The container's health check: exit status 0 when the server answers /health/ready with 200, else 1 and the reason.

Standard library alone. It reads the same variables as the server, so it asks the right port and shows the right key.
"""

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

TIMEOUT_SECONDS = 4.0


def _key() -> str | None:
    file = os.environ.get("DEEPFEW_API_KEY_FILE")
    return Path(file).read_text(encoding="utf-8").strip() if file else os.environ.get("DEEPFEW_API_KEY")


def main() -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{os.environ.get('DEEPFEW_PORT', '8080')}/health/ready")
    key = _key()
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_SECONDS):
            return 0
    except urllib.error.HTTPError as error:
        print(f"not ready: {error.code} {error.read(500).decode(errors='replace')}", file=sys.stderr)
    except OSError as error:
        print(f"not reachable: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
