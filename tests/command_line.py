"""The `deepfew` command in this process: what it prints, and with which status it ends."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

from server.cli.main import main


class Ended(NamedTuple):
    """Exit status, standard output, standard error."""

    status: int
    out: str
    err: str


def run(*arguments: object) -> Ended:
    """Run `deepfew` with the arguments as text."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return Ended(status, out.getvalue(), err.getvalue())
