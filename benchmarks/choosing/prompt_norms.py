"""Whether what experts put out over prompts stands for what they put out over the tokens that follow.

    python -m benchmarks.choosing.prompt_norms [--checkpoint models/tiny-moe] [--passages 80] [--save]

The device-driven path shows what experts put out in prompts alone; what is grown next goes by wanted mass × expected
output norm. Passages of the texts are prompts, and as many tokens as each has are drawn after it (temperature 0.8).
*Mean norm*: of an expert's output over the tokens that chose it, once over prompts, once over what followed, for
experts that at least `--least` of either chose. *Difference*: of the two, relative to the second. *Noise*: the same
between two halves of what followed, which would be 0 with infinitely many tokens. *Correlation*: over the experts of a
layer. *Kept*: of the quarter of each layer's experts that are worth most by mass × norm over what followed, how many
are in the quarter by mass × norm over prompts, and by mass alone.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, REPOSITORY, environment, finish, table
from expert_store.store import Store
from server.model.host.assembly import load_model
from server.model.host.runner import HostRunner
from server.model.runner import RowStep, Runner, RunnerOptions, StepOutput
from server.model.seam.observation import observe_outputs

TEXTS = REPOSITORY / "benchmarks" / "data" / "selection"
PASSAGE_TOKENS = 48
Float = npt.NDArray[np.float64]


class Norms:
    """Sums over tokens: picks, norms and router mass of each expert, [L, E]."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.picks, self.norms, self.mass = (np.zeros((num_layers, num_experts)) for _ in range(3))

    def add(self, output: StepOutput) -> None:
        """One step whose outputs were observed."""
        assert output.outputs is not None
        for layer, experts in enumerate(output.record.served_index):
            np.add.at(self.picks[layer], experts, 1.0)
            np.add.at(self.norms[layer], experts, output.outputs.norms[layer])
            np.add.at(self.mass[layer], experts, output.record.served_weight[layer])

    @property
    def mean(self) -> Float:
        """[L, E], 0 where nothing was picked."""
        return self.norms / np.maximum(self.picks, 1.0)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--passages", type=int, default=80)
    parser.add_argument("--least", type=int, default=20)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(make_store(arguments.checkpoint, Path(folder) / "store"))
        runner = HostRunner(
            load_model(store, RunnerOptions(device=torch.device("cpu"), dtype=torch.float32)),
            max_rows=1,
            max_tokens=256,
        )
        result = measure(runner, passages(runner, arguments.passages), arguments.least)
        runner.close()
    rows = [[layer, *values] for layer, values in enumerate(zip(result["correlation"], result["spread"], strict=True))]
    print(table(["layer", "correlation of mean norms", "their spread over experts"], rows))
    finish("prompt_norms", {**environment(), **result}, save=arguments.save)


def passages(runner: Runner, count: int) -> list[list[int]]:
    """Token ids of passages from every text, in random order."""
    found = []
    for path in sorted(TEXTS.rglob("*.txt")):
        ids = runner.model.tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
        found += [ids[at : at + PASSAGE_TOKENS] for at in range(0, len(ids) - PASSAGE_TOKENS, 5 * PASSAGE_TOKENS)]
    random.Random(0).shuffle(found)
    return found[:count]


def measure(runner: Runner, prompts: list[list[int]], least: int) -> dict[str, Any]:
    """Norms over prompts and over what follows each, compared."""
    model = runner.model
    model.observer = observe_outputs(model.model, model.num_layers)
    assert model.observer is not None
    model.observer.is_on = True
    spec = model.store.manifest.model
    prompt, first, second = (Norms(spec.num_layers, spec.num_experts) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    for at, ids in enumerate(prompts):
        row = runner.allocate()
        output = runner.prefill(row, ids)
        prompt.add(output)
        for _ in ids:
            token = int(torch.multinomial((output.logits[-1] / 0.8).softmax(-1), 1, generator=generator))
            output = runner.decode([RowStep(row, token)])
            (first, second)[at % 2].add(output)
        runner.free(row)
    after = Norms(spec.num_layers, spec.num_experts)
    for name in ("picks", "norms", "mass"):
        setattr(after, name, getattr(first, name) + getattr(second, name))
    known = (prompt.picks >= least) & (after.picks >= least)
    halves = known & (first.picks >= least / 2) & (second.picks >= least / 2)
    layers = range(spec.num_layers)
    return {
        "num_tokens": [int(one.picks[0].sum()) // spec.top_k for one in (prompt, after)],
        "num_experts": int(known.sum()),
        "difference": _quantiles(prompt.mean, after.mean, known),
        "noise": _quantiles(first.mean, second.mean, halves),
        "correlation": [
            float(np.corrcoef(prompt.mean[at, known[at]], after.mean[at, known[at]])[0, 1]) for at in layers
        ],
        "spread": [float(after.mean[at, known[at]].std() / after.mean[at, known[at]].mean()) for at in layers],
        "kept": {
            "mass and norms over prompts": _kept(after.mass * after.mean, after.mass * prompt.mean),
            "mass alone": _kept(after.mass * after.mean, after.mass),
        },
    }


def _quantiles(one: Float, other: Float, known: npt.NDArray[np.bool_]) -> dict[str, float]:
    relative = np.abs(one - other)[known] / other[known]
    return {name: float(np.quantile(relative, at)) for name, at in (("median", 0.5), ("p90", 0.9))}


def _kept(wanted: Float, by: Float) -> float:
    """Share of the best quarter of each layer by `wanted` that is in the best quarter by `by`."""
    count = wanted.shape[1] // 4
    best, chosen = (np.argsort(-values, axis=1, kind="stable")[:, :count] for values in (wanted, by))
    return float(np.mean([len(set(a) & set(b)) / count for a, b in zip(best.tolist(), chosen.tolist(), strict=True)]))


if __name__ == "__main__":
    main()
