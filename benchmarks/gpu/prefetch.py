"""Does fetching ahead pay? How well the next layer's experts are known one layer early, and what a step would gain.

What is measured, in words:
- *recall*: share of a layer's true choice that is among as many (or `+4`, twice as many) predicted ones.
- *missed*: experts wanted that were in no slot. *guesses*: the predicted experts in no slot, best first; *first right*:
  of the layers with a guess, those whose first guess is wanted; *found*: share of the missed among the guesses.
- *step*: simulated. A layer computes `front` (norm, attention, router), then fetches what it misses, or computes what
  is there, whichever takes longer, then `down`. Ahead: whenever the bus has nothing certain to do, it fetches guesses
  for the next layer, then for the one after it, piece by piece; the true choice ends a wrong guess at the next piece
  and goes on with a right one where it was left. Nothing is evicted for a guess, so a wrong one costs `in_flight` bytes
  and no hit. `gain` is against the same step without guesses; `two` counts both layers, else the next one alone.

Predictors look from layer l at layer l + 1, after l's router: its gate on the residual stream before the experts
(`stale`), with the norm of l instead (`stale, own norm`) or none, from layer l - 1 (`stale, two early`), after the
experts (`late`, known only when the layer ends), a linear map fitted to calibration text in the gate's place
(`fitted`), or with a fitted bias for each expert; and without hidden states how often experts are wanted (`popular`) or
follow the choice of l (`follows`), which recorded traces can show as well.
The first half of each text calibrates, the second is measured, token by token as decoding would see them.
Source of the idea: Eliseev & Mazur 2023 (arXiv 2312.17238), Fate (2502.12224), Pre-gated MoE (2308.12066).

    python -m benchmarks.gpu.prefetch [--checkpoint DIR]... [--texts PATH...] [--tokens N] [--save]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.gpu import paging as gpu_paging
from benchmarks.harness.reporting import REPOSITORY, environment, finish, table

Scores = npt.NDArray[np.float32]  # [T, L, E]; layer 0 has none: NaN
Choice = npt.NDArray[np.int64]  # [T, L, K]
TEXTS = REPOSITORY / "benchmarks" / "data" / "selection"
SHARES = (0.125, 0.25, 0.5)
WINDOW = 512


@dataclass(frozen=True)
class Machine:
    """Seconds of one layer's parts and the bus, as docs/performance.md has them for an H100 and Qwen3-30B-A3B."""

    front: float = 27.5e-6  # qkv, attention, output, route
    middle: float = 22e-6  # gate_up with every expert in a slot
    down: float = 9.5e-6
    rest: float = 300e-6  # of a step of `layers` layers: embedding, head, argmax
    layers: int = 48
    predict: float = 8e-6  # from the router's choice to the first byte of a guess
    bus: float = 50e9  # bytes a second
    span: float = 9437184.0  # bytes of an expert
    in_flight: float = 128 * 1024.0  # bytes of a guess that arrive after the true choice is known
    late: bool = False  # guesses are known only at a layer's end

    def step(self, missed: list[list[int]], *guesses: list[list[int]]) -> float:
        """Seconds of one step; missed[l] are experts of layer l, guesses[d][l] those guessed d + 1 layers early, best
        first."""
        total, staged, last = 0.0, dict[tuple[int, int], float](), (-1, -1)
        for layer, wanted in enumerate(missed):
            fetch = sum(self.span - staged.pop((layer, expert), 0.0) for expert in wanted) / self.bus
            if wanted and last[0] >= 0 and not (last[0] == layer and last[1] in wanted):
                fetch += self.in_flight / self.bus
            layer_time = max(self.middle, fetch) + self.down
            total += self.front + layer_time
            start = layer_time + self.predict if self.late else max(self.predict, fetch)
            idle, last = (layer_time - start + self.front) * self.bus, (-1, -1)
            for distance, lists in enumerate(guesses):
                ahead = layer + 1 + distance
                for expert in lists[ahead] if ahead < len(missed) else ():
                    more = min(idle, self.span - staged.get((ahead, expert), 0.0))
                    if more > 0.0:
                        staged[ahead, expert] = staged.get((ahead, expert), 0.0) + more
                        idle, last = idle - more, (ahead, expert)
        return total + self.rest * len(missed) / self.layers

    def bound(self, missed_bytes: float, layers: int) -> float:
        """The unit of the step's limit: the time of the resident step, or of the bytes at the copy engine's rate."""
        resident = layers * (self.front + self.middle + self.down) + self.rest * layers / self.layers
        return max(resident, missed_bytes / 54.2e9)


class Cache:
    """The slots of one layer under a policy, followed by hand: `take` says what was missed and makes it resident."""

    def __init__(self, num_slots: int, policy: str) -> None:
        self.num_slots, self.policy, self.clock = num_slots, policy, 0
        self.last_use = dict.fromkeys(range(num_slots), -1)
        self.count: dict[int, int] = {}

    def take(self, wanted: list[int]) -> list[int]:
        """Experts of `wanted` that were in no slot; evicts none of `wanted`."""
        missed = [expert for expert in wanted if expert not in self.last_use]
        for expert in wanted:
            self.count[expert] = self.count.get(expert, 0) + 1
            if expert in self.last_use:
                self.last_use[expert] = self.clock

        def rank(expert: int) -> tuple[int, int]:
            return (self.count.get(expert, 0) if self.policy == "lfu" else 0, self.last_use[expert])

        kept = set(wanted)
        victims = sorted((expert for expert in self.last_use if expert not in kept), key=rank)
        for expert, victim in zip(missed, victims, strict=False):
            del self.last_use[victim]
            self.last_use[expert] = self.clock
        self.clock += 1
        return missed


@dataclass
class Hidden:
    """The states of a text's tokens: residual before and after each layer's experts [T, L, H], router logits."""

    before: torch.Tensor
    after: torch.Tensor
    logits: torch.Tensor
    choice: torch.Tensor

    def part(self, of: slice) -> Hidden:
        return Hidden(self.before[of], self.after[of], self.logits[of], self.choice[of])


@torch.inference_mode()
def observe(model: Any, ids: torch.Tensor) -> Hidden:
    """Hidden states of `ids` [T], in windows of WINDOW tokens that do not see each other."""
    layers = model.model.layers
    seen: dict[str, list[list[torch.Tensor]]] = {
        name: [[] for _ in layers] for name in ("before", "after", "logits", "choice")
    }
    hooks = []
    for at, layer in enumerate(layers):
        hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(_keep(seen["before"][at], lambda x: x)))
        hooks.append(layer.register_forward_hook(_keep(seen["after"][at], lambda x: x)))
        hooks.append(layer.mlp.gate.register_forward_hook(_keep_routes(seen["logits"][at], seen["choice"][at])))
    for window in ids.split(WINDOW):
        model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return Hidden(**{name: torch.stack([torch.cat(parts) for parts in lists], 1) for name, lists in seen.items()})


def _keep(into: list[torch.Tensor], of: Callable[[Any], Any]) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Any = None) -> None:
        found = inputs[0] if output is None else output
        found = found[0] if isinstance(found, tuple) else found
        into.append(found.reshape(-1, found.shape[-1]).float())

    return hook


def _keep_routes(logits: list[torch.Tensor], choice: list[torch.Tensor]) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        logits.append(output[0].float())
        choice.append(output[2])

    return hook


@torch.inference_mode()
def predictions(model: Any, known: Hidden, asked: Hidden) -> dict[str, Scores]:
    """Scores of every predictor for `asked`, fitted on `known` where it is fitted."""
    gates = [layer.mlp.gate.weight.float() for layer in model.model.layers]
    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    num_tokens, num_layers, num_experts = asked.logits.shape
    names = [
        "stale", "stale, own norm", "stale, no norm", "stale, two early", "stale + bias", "fitted", "fitted, two early",
        "late", "late + bias",
    ]  # fmt: skip
    found = {name: np.full((num_tokens, num_layers, num_experts), np.nan, np.float32) for name in names}
    for layer in range(1, num_layers):
        gate, norm, own = gates[layer], norms[layer], norms[layer - 1]

        def put(name: str, scores: torch.Tensor, at: int = layer) -> None:
            found[name][:, at] = scores.numpy()

        before, after = asked.before[:, layer - 1], asked.after[:, layer - 1]
        was, then = known.before[:, layer - 1], known.after[:, layer - 1]
        truth = known.logits[:, layer]
        put("stale", norm(before) @ gate.T)
        put("stale, own norm", own(before) @ gate.T)
        put("stale, no norm", before @ gate.T)
        put("stale + bias", norm(before) @ gate.T + (truth - norm(was) @ gate.T).mean(0))
        put("late", norm(after) @ gate.T)
        put("late + bias", norm(after) @ gate.T + (truth - norm(then) @ gate.T).mean(0))
        if layer > 1:
            put("stale, two early", norms[layer - 2](asked.before[:, layer - 2]) @ gate.T)
            x, y = (_with_one(norms[layer - 2](part.before[:, layer - 2])) for part in (known, asked))
            put("fitted, two early", y @ ridge(x, truth))
        put("fitted", _with_one(own(before)) @ ridge(_with_one(own(was)), truth))
    return found


def _with_one(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.ones(len(x), 1)], dim=1)


def ridge(x: torch.Tensor, y: torch.Tensor, strength: float = 1e-2) -> torch.Tensor:
    """[H, E] of the linear map from x [T, H] to y [T, E] with the least squares, shrunk by `strength` of x's power."""
    power = x.T @ x
    return torch.linalg.solve(power + strength * power.diagonal().mean() * torch.eye(len(power)), x.T @ y)


def from_choices(known: Choice, asked: Choice, num_experts: int) -> dict[str, Scores]:
    """Scores that need no hidden states: how often an expert was wanted, alone and after each of layer l's choice."""
    num_tokens, num_layers, _ = asked.shape
    popular = np.full((num_tokens, num_layers, num_experts), np.nan, np.float32)
    follows = popular.copy()
    wanted = np.zeros((len(known), num_layers, num_experts), np.float32)
    np.put_along_axis(wanted, known, 1.0, axis=2)
    share = (wanted.sum(0) + 0.5) / (len(known) + 1.0)
    for layer in range(1, num_layers):
        together = wanted[:, layer - 1].T @ wanted[:, layer]
        alone = wanted[:, layer - 1].sum(0)[:, None]
        given = np.log((together + 4.0 * share[layer]) / (alone + 4.0)) - np.log(share[layer])
        popular[:, layer] = share[layer]
        follows[:, layer] = given[asked[:, layer - 1]].sum(1) + np.log(share[layer])
    return {"popular": popular, "follows": follows}


def recalls(scores: Scores, choice: Choice) -> dict[str, float]:
    """Share of the true choice among the best K, K + 4 and 2 K predicted, over the layers that have scores."""
    top_k = choice.shape[2]
    first = int(np.isnan(scores[0, :, 0]).sum())
    ranked = np.argsort(-scores[:, first:], axis=2)
    found = {}
    for name, most in (("recall", top_k), ("recall +4", top_k + 4), ("recall x2", 2 * top_k)):
        hit = (choice[:, first:, :, None] == ranked[:, :, None, :most]).any(3)
        found[name] = float(hit.mean())
    return found


def paged(
    choice: Choice, scores: Sequence[Scores], num_slots: int, policy: str, machine: Machine, skip: int = 64
) -> dict[str, float]:
    """One pass over the choices with slots of their own for each layer; steps from `skip` on count.

    scores: of guesses made one layer early, two, ...; none: nothing is fetched ahead. A layer's guesses are those of
    its best K that are in no slot.
    """
    _, num_layers, top_k = choice.shape
    caches = [Cache(num_slots, policy) for _ in range(num_layers)]
    ranked = [np.argsort(-of, axis=2)[:, :, :top_k] for of in scores]
    seconds = bound = 0.0
    missed_count = wanted_count = guessed = firsts = first_right = found = missed_late = 0
    for step, layers in enumerate(choice.tolist()):
        guesses = [
            [
                [e for e in best[step, at].tolist() if e not in cache.last_use] if at > distance else []
                for at, cache in enumerate(caches)
            ]
            for distance, best in enumerate(ranked)
        ]
        missed = [cache.take(wanted) for cache, wanted in zip(caches, layers, strict=True)]
        if step < skip:
            continue
        seconds += machine.step(missed, *guesses)
        num_missed = sum(map(len, missed))
        bound += machine.bound(num_missed * machine.span, num_layers)
        missed_count += num_missed
        wanted_count += num_layers * top_k
        for at in range(1, num_layers if ranked else 0):
            near = guesses[0][at]
            missed_late += len(missed[at])
            guessed += len(near)
            found += len(set(near) & set(missed[at]))
            firsts += bool(near)
            first_right += bool(near) and near[0] in missed[at]
    steps = len(choice) - skip
    row = {
        "hit rate": 1.0 - missed_count / wanted_count, "missed a layer": missed_count / steps / num_layers,
        "step ms": seconds / steps * 1e3, "ratio": seconds / bound,
    }  # fmt: skip
    if ranked:
        row |= {
            "found": found / max(missed_late, 1), "precision": found / max(guessed, 1),
            "first right": first_right / max(firsts, 1),
        }  # fmt: skip
    return row


def guessed_at_random(choice: Choice, num_experts: int, right: float, seed: int) -> Scores:
    """Scores whose best K hold each true pick with probability `right`, the rest being other experts by popularity; in
    random order."""
    random = np.random.default_rng(seed)
    num_tokens, num_layers, top_k = choice.shape
    counts = np.stack([np.bincount(choice[:, layer].ravel(), minlength=num_experts) for layer in range(num_layers)])
    scores = np.log(counts + 0.5)[None] + random.gumbel(size=(num_tokens, num_layers, num_experts))
    np.put_along_axis(scores, choice, -1e9, axis=2)
    kept = random.random(choice.shape) < right
    num_other = top_k - kept.sum(2)
    order = np.argsort(-scores, axis=2)
    place = np.arange(num_experts)[None, None]
    others = np.where(place < num_other[:, :, None], random.random(scores.shape), -1.0 - place)
    np.put_along_axis(scores, order, others, axis=2)
    np.put_along_axis(scores, choice, np.where(kept, random.random(choice.shape), -1e9), axis=2)
    return scores.astype(np.float32)


def checkpoint_part(path: Path, texts: list[Path], tokens: int) -> dict[str, Any]:
    """Recalls, and what the caches and the simulated step make of them, on one checkpoint's own choices."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    halves: tuple[list[Hidden], list[Hidden]] = ([], [])
    for text in texts:
        ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"][0]
        middle = len(ids) // 2
        halves[0].append(observe(model, ids[: min(tokens, middle)]))
        halves[1].append(observe(model, ids[middle : middle + tokens]))
    known, asked = (joined(half) for half in halves)
    num_experts = known.logits.shape[2]
    choice = asked.choice.numpy()
    scores = predictions(model, known, asked) | from_choices(known.choice.numpy(), choice, num_experts)
    recall = [{"predictor": name, **recalls(found, choice)} for name, found in scores.items()]
    machine = Machine()
    return {
        "name": path.name, "known_tokens": len(known.logits), "asked_tokens": len(choice), "recall": recall,
        "paged": list(_paged_rows(choice, scores, num_experts, machine)),
    }  # fmt: skip


def joined(parts: list[Hidden]) -> Hidden:
    """One after the other."""
    return Hidden(*(torch.cat([getattr(p, name) for p in parts]) for name in ("before", "after", "logits", "choice")))


PAGED = ("stale, own norm", "stale + bias", "fitted", "late + bias", "popular", "follows")


def _paged_rows(
    choice: Choice, scores: dict[str, Scores], num_experts: int, machine: Machine
) -> Iterator[dict[str, Any]]:
    for policy, shares in (("lru", SHARES), ("lfu", SHARES[-1:])):
        for share in shares:
            slots = int(share * num_experts)
            off = paged(choice, (), slots, policy, machine)
            for name, found in scores.items():
                if name in PAGED:
                    early = replace(machine, late=name.startswith("late"))
                    yield {"policy": policy, "slots": slots, "predictor": name} | _beside(
                        off, paged(choice, (found,), slots, policy, early)
                    )
            if "fitted" in scores:
                both = (scores["fitted"], scores["fitted, two early"])
                yield {"policy": policy, "slots": slots, "predictor": "fitted, two"} | _beside(
                    off, paged(choice, both, slots, policy, machine)
                )


def _beside(off: dict[str, float], on: dict[str, float]) -> dict[str, float]:
    return on | {"off ms": off["step ms"], "off ratio": off["ratio"], "gain": 1.0 - on["step ms"] / off["step ms"]}


def synthetic_part(rights: Sequence[float]) -> list[dict[str, Any]]:
    """The step on the GPU benchmark's synthetic traces, each true pick among the guessed K with a given probability one
    layer early, and with 0.04 less two layers early."""
    rows = []
    for skew, stickiness in ((0.6, 0.3), (1.0, 0.5)):
        trace = gpu_paging.synthetic(144, 48, 128, 8, skew, stickiness, seed=1).astype(np.int64)
        for share in SHARES:
            off = paged(trace, (), int(share * 128), "lru", Machine())
            for right in rights:
                near = guessed_at_random(trace, 128, right, seed=3)
                far = guessed_at_random(trace, 128, two_early(right), seed=4)
                on = paged(trace, (near,), int(share * 128), "lru", Machine())
                two = paged(trace, (near, far), int(share * 128), "lru", Machine())
                rows.append({"skew": skew, "share": share, "right": right} | _beside(off, on) | {
                    "two ms": two["step ms"], "two ratio": two["ratio"],
                    "two gain": 1.0 - two["step ms"] / off["step ms"],
                })  # fmt: skip
    return rows


def two_early(right: float) -> float:
    """Assumed of guesses two layers early where those one layer early are right so often (0.035 to 0.04 less has been
    reported for Qwen3-30B-A3B); none and all stay none and all."""
    return right if right in (0.0, 1.0) else max(right - 0.04, 0.0)


def recorded_part() -> list[dict[str, Any]]:
    """Recorded choices of a 26-layer model, which hold no hidden states: first half fits, second is measured."""
    rows = []
    for task in ("intent", "summary"):
        trace = gpu_paging.recorded(task).astype(np.int64)
        asked = trace[len(trace) // 2 :]
        scores = from_choices(trace[: len(trace) // 2], asked, 64)
        for name, found in scores.items():
            rows.append({"task": task, "predictor": name, **recalls(found, asked)})
        machine = Machine(span=17301504.0)
        rows += [{"task": task, **row} for row in _paged_rows(asked, scores, 64, machine)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", type=Path, help="default: the bundled one")
    parser.add_argument("--texts", nargs="+", type=Path, default=sorted(TEXTS.glob("*.txt")))
    parser.add_argument("--tokens", type=int, default=1024, help="of each text that calibrate, and as many measured")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/prefetch.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"environment": environment(), "texts": [path.name for path in arguments.texts]}
    result["checkpoints"] = []
    for path in arguments.checkpoint or [REPOSITORY / "models" / "tiny-moe"]:
        part = checkpoint_part(path, arguments.texts, arguments.tokens)
        result["checkpoints"].append(part)
        for name in ("recall", "paged"):
            print(f"\n{part['name']}: {name}\n" + show(part[name]))
    result["synthetic"] = synthetic_part([0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 1.0])
    print("\nsynthetic\n" + show(result["synthetic"]))
    result["recorded"] = recorded_part()
    for kind in ("recall", "step ms"):
        print("\nrecorded\n" + show([row for row in result["recorded"] if kind in row]))
    finish("prefetch", result, save=arguments.save)


def show(rows: list[dict[str, Any]]) -> str:
    """A table of rows that have the same keys."""
    return table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
