"""A store that grows while it serves: starts with few deep experts, is sent two kinds of text, and its deficit falls.

What is measured, in words:
- *deficit*: missing share of the router mass over the tokens of one round of requests (prompt and generated).
- *kept*: experts of every layer that the store holds when the round begins.
A round sends four prompts of the first kind, from round `--switch` on of the second kind. After each round the store
grows by the best candidates (what was wanted and missing), while the next round already runs. No request fails and no
restart happens.

    python -m benchmarks.growth [--rounds 10] [--start 4] [--step 4] [--plot FILE] [--save]
"""

from __future__ import annotations

import argparse
import queue
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting import REPOSITORY, environment, finish, table
from expert_store.store import Store
from extractor.checkpoint import Checkpoint
from extractor.prepare import prepare
from extractor.selection import SelectionRequest
from server.calibrate_texts import documents, find_domains
from server.engine.engine import Engine
from server.engine.request import Event, FailedEvent, FinishedEvent, GenerationRequest, SamplingParams
from server.growth import Grower, adopt
from server.model.assembly import load_model
from server.model.runner import Runner

CHECKPOINT = REPOSITORY / "models" / "tiny-moe"
TEXTS = REPOSITORY / "benchmarks" / "data" / "selection"
KINDS = ("stories_synth", "math_qa")
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 64, 24


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--switch", type=int, default=5, help="round from which the second kind is sent")
    parser.add_argument("--start", type=int, default=4, help="deep experts at the start")
    parser.add_argument("--step", type=int, default=4, help="deep experts added after each round")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/growth.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deepfew-growth-") as folder:
        prepare(Checkpoint.open(CHECKPOINT), folder, SelectionRequest(count=arguments.start)).run()
        rounds = serve(Path(folder), arguments)
    print(table(["round", "kind", "kept", "deficit"], [list(one.values()) for one in rounds]))
    if arguments.plot is not None:
        draw(arguments.plot, rounds)
    finish("growth", {"environment": environment(), "rounds": rounds}, save=arguments.save)


def serve(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Send the rounds while the store grows."""
    store = Store.open(folder)
    model = load_model(store, device=torch.device("cpu"), dtype=torch.float32, num_slots=64)
    engine = Engine(lambda progress: Runner(model, max_rows=NUM_PROMPTS, max_tokens=256))
    engine.start()
    while engine.status().state == "loading":
        time.sleep(0.01)
    recent = _Recent(engine)
    grower = Grower(
        store,
        str(CHECKPOINT),
        recent.demand,
        lambda action: engine.between_steps(action).result(60),
        lambda: adopt(store, model.routing, None),
    )
    rounds = []
    try:
        for number in range(arguments.rounds):
            kind = KINDS[number >= arguments.switch]
            kept = int(model.routing.mask.num_allowed[0])
            deficit = _round(engine, kind, number)
            rounds.append({"round": number, "kind": kind, "kept": kept, "deficit": round(deficit, 4)})
            grower.wait()
            if grower.candidates():
                grower.grow(arguments.step)
                grower.wait()
            recent.forget()
    finally:
        engine.stop(0.0)
    return rounds


class _Recent:
    """Demand since the last round, so that growth follows what is wanted now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before = engine.ledger.demand_mass.copy()

    def demand(self) -> Any:
        return self._engine.ledger.demand_mass - self._before

    def forget(self) -> None:
        self._before = self._engine.ledger.demand_mass.copy()


def _round(engine: Engine, kind: str, number: int) -> float:
    """The mean deficit of one round's requests."""
    texts = list(documents(find_domains([str(TEXTS / f"{kind}.txt")])[0]))
    events: list[queue.SimpleQueue[Event]] = []
    for at in range(NUM_PROMPTS):
        ids = engine.runner.model.tokenizer(texts[(number * NUM_PROMPTS + at) % len(texts)])["input_ids"]
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        events.append(queue.SimpleQueue())
        engine.submit(GenerationRequest(f"{number}-{at}", tuple(ids[:PROMPT_TOKENS]), sampling), events[-1].put)
    return sum(_finished(each).deficit.overall for each in events) / NUM_PROMPTS


def _finished(events: queue.SimpleQueue[Event]) -> FinishedEvent:
    while True:
        event = events.get(timeout=120)
        if isinstance(event, FailedEvent):
            raise event.error
        if isinstance(event, FinishedEvent):
            return event


def draw(path: Path, rounds: list[dict[str, Any]]) -> None:
    """Deficit and kept experts over the rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    numbers = [one["round"] for one in rounds]
    axes.plot(numbers, [one["deficit"] for one in rounds], marker="o", color="tab:red")
    axes.set(xlabel="round", ylabel="deficit", ylim=(0, 1), title="A store grows while it serves")
    other = axes.twinx()
    other.step(numbers, [one["kept"] for one in rounds], where="mid", color="tab:blue", alpha=0.6)
    other.set_ylabel("deep experts kept", color="tab:blue")
    switch = next((one["round"] for one in rounds if one["kind"] != rounds[0]["kind"]), None)
    if switch is not None:
        axes.axvline(switch - 0.5, color="black", linestyle=":", linewidth=1)
        axes.text(switch - 0.4, 0.95, f"{rounds[switch]['kind']} from here", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
