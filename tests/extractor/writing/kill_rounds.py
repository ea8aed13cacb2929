"""Kill extractions at every step and at random moments; run by test_kill.py in a process of its own.

    python -m tests.extractor.writing.kill_rounds CHECKPOINT FOLDER steps STRIDE
    python -m tests.extractor.writing.kill_rounds CHECKPOINT FOLDER random ROUNDS

`steps`: for every STRIDE-th call k of the system that changes the disk, a child is killed (SIGKILL, to itself) right
before call k, and the extraction is then run to its end. `random`: children are killed after a random share of the time
that an extraction takes, one after the other in the same directory, until one finishes. After every kill the directory
must be either no store or a whole one; at the end it must have the bytes of an undisturbed extraction. Prints how many
children were killed.
"""

import itertools
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expert_store.errors import ManifestError
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare

STEPS = ("mkdir", "open", "write", "fsync", "replace", "unlink", "ftruncate")


def extract(checkpoint: Path, store: Path) -> None:
    prepare(Checkpoint.open(checkpoint), store, SelectionRequest()).run()


def in_child(action: Callable[[], None], seconds: float | None = None) -> bool:
    """Run `action` in a forked child, killed after `seconds`; whether it finished."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            print(f"child failed: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "the child failed"
    return os.WIFEXITED(status)


def die_before_step(number: int) -> None:
    """Make this process kill itself before the call number `number` that changes the disk."""
    counter, lock = itertools.count(1), threading.Lock()

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            with lock:
                if next(counter) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return step

    for name in STEPS:
        setattr(os, name, wrap(getattr(os, name)))


def check_never_half(store: Path) -> None:
    try:
        opened = Store.open(store)
    except ManifestError as error:
        if "has not finished" not in str(error) and store.exists():
            raise
        return
    with opened:
        assert opened.available.all()
        opened.verify()


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def kill_at_steps(checkpoint: Path, folder: Path, wanted: dict[str, bytes], stride: int) -> int:
    store = folder / "store"
    for killed, number in enumerate(itertools.count(1, stride)):

        def die(number: int = number) -> None:
            die_before_step(number)
            extract(checkpoint, store)

        finished = in_child(die)
        check_never_half(store)
        extract(checkpoint, store)
        assert contents(store) == wanted, f"killed before step {number}: other bytes"
        shutil.rmtree(store)
        if finished:
            return killed
    raise AssertionError


def kill_at_random(checkpoint: Path, folder: Path, wanted: dict[str, bytes], rounds: int) -> int:
    store, killed, order = folder / "store", 0, random.Random(0)
    started = time.monotonic()
    in_child(lambda: extract(checkpoint, folder / "timed"))  # the first in this process took longer
    seconds = time.monotonic() - started
    for _ in range(rounds):
        window = seconds / 4
        while not in_child(lambda: extract(checkpoint, store), order.random() * window):
            killed += 1
            window *= 1.25  # so that a busy machine finishes some time
            check_never_half(store)
        assert contents(store) == wanted, "other bytes after kills"
        shutil.rmtree(store)
    return killed


def main() -> None:
    checkpoint, folder, mode, *numbers = sys.argv[1:]
    whole = Path(folder) / "whole"
    extract(Path(checkpoint), whole)
    wanted = contents(whole)
    if mode == "steps":
        print(kill_at_steps(Path(checkpoint), Path(folder), wanted, int(numbers[0])))
    else:
        print(kill_at_random(Path(checkpoint), Path(folder), wanted, int(numbers[0])))


if __name__ == "__main__":
    main()
