"""Makes the keys of a server where there are none; the service `keys` runs it before the others.

Standard library alone. A key is 24 random bytes in hex, written whole or not at all; a key that is there stays. The API
key is readable by the users of every container that mounts its volume, the admin key by the server's user alone.
"""

import os
import secrets
import sys
from pathlib import Path

MODES = {Path("api/key"): 0o444, Path("admin/key"): 0o400}


def make_keys(folder: Path) -> list[Path]:
    """Write the keys that are missing or empty under `folder`, and return their paths."""
    made = []
    for name, mode in MODES.items():
        path = folder / name
        if path.is_file() and path.stat().st_size > 0:
            continue
        partial = path.with_name("key.partial")
        partial.unlink(missing_ok=True)
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(24))
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(mode)
        partial.replace(path)
        made.append(path)
    return made


def main(folder: Path = Path("/keys")) -> int:
    try:
        made = make_keys(folder)
    except OSError as error:
        print(f"the keys cannot be written: {error}; remove the volumes api-key and admin-key", file=sys.stderr)
        return 1
    show = "docker compose run --rm --no-deps --entrypoint cat keys"
    print(f"{'made' if made else 'found'} the keys; to read them: {show} {folder}/api/key, and {folder}/admin/key")
    return 0


if __name__ == "__main__":
    sys.exit(main())
