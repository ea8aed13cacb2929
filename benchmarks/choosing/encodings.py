"""Experts in fewer bits: perplexity and KL divergence over bytes, for encodings, masks, and mixes of both.

What is measured, in words:
- *ratio*: perplexity ÷ perplexity of the checkpoint with all experts, on the same held-out tokens; *mean ratio* is the
  geometric mean over the kinds of text. Even documents of every file calibrate, odd ones are measured.
- *KL*: mean over the same tokens of the divergence of the next token's distribution from the checkpoint's, in nats; it
  is known much better than the ratio, since it does not depend on which token came.
- *bits*: of one weight of the kept experts, with its share of scales and zero points, without the padding of rows to 16
  bytes, which is large in these narrow matrices and small in real ones; *bytes*: kept bits ÷ the bits of all experts in
  16 bits.
- *encodings*: all experts in one encoding, made by weight error alone and (`stats`) weighted by what calibration saw.
- *down*: another encoding of `down_proj` than of `gate_up_proj`.
- *masks*: fewer experts, all in one encoding; `kind`: chosen (coverage) for each kind of text, `all`: for all of them.
- *mixes*: the experts in two encodings: the most salient ones in the larger (`salient`), the least salient, any
  (`random`), or all experts of the first or last layers.
Weights are replaced by their decoded values, in float32.

    python -m benchmarks.choosing.encodings [--checkpoint DIR]... [--texts PATH...] [--tokens N] [--parts PART...]
                                            [--save NAME]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from benchmarks.harness.checkpoints import make_store
from benchmarks.harness.reporting import BUNDLED, REPOSITORY, environment, finish, table, write_result
from expert_store.encoding import CODE_BITS, RowEncoding
from expert_store.rows import FIELD_DTYPES, decode_fields, span_values
from expert_store.store import Store
from extractor.encoding.importance import Importance
from extractor.encoding.names import ENCODINGS, encoding_of
from extractor.encoding.quantise import quantise
from extractor.planning.criteria import normalised, score
from router.mask import ExpertMask
from server.model.host.assembly import load_model
from server.model.runner import RunnerOptions
from server.quality.batches import batches, losses, run_batch, token_sequences
from server.quality.calibration import CalibrationOptions, calibrate
from server.quality.comparison import allow_best
from server.quality.texts import TextOptions, find_domains

DATA = REPOSITORY / "benchmarks" / "data" / "selection"
PARTS = ("encodings", "down", "masks", "mixes")
COLUMNS = ("part", "name", "kept", "bits", "bytes", "mean_ratio", "worst_ratio", "kl", "worst_kl")
SIXTEEN = "16bit"
FOUR_BITS = ("int4", "mxfp4", "nvfp4")
CALIBRATION = TextOptions(half="even", max_tokens=4096)
DOWN_SHARE = 1 / 3
"""The share of an expert's weights that is in `down_proj`."""


@dataclass(frozen=True)
class Made:
    """The encodings of an expert's two matrices, and whether calibration weighted their errors."""

    gate_up: str
    down: str
    with_stats: bool = False

    @classmethod
    def of(cls, name: str, with_stats: bool = False) -> Made:
        """Both matrices in one encoding."""
        return cls(name, name, with_stats)

    @property
    def bits(self) -> float:
        """Bits of one weight."""
        return (1 - DOWN_SHARE) * bits_of(self.gate_up) + DOWN_SHARE * bits_of(self.down)


PLAIN = Made.of(SIXTEEN)
Choice = Callable[[str], list[list[Made]]]
"""A function from the kind of text to the encodings of all experts, by layer and expert."""
Masks = Mapping[str, ExpertMask]


def bits_of(name: str) -> float:
    """Bits of one weight in a row without padding and without the row's overall scale."""
    if name == SIXTEEN:
        return 16.0
    encoding: RowEncoding = ENCODINGS[name]
    scale_bytes = sum(FIELD_DTYPES[dtype].itemsize for dtype in (encoding.scales, encoding.zeros) if dtype is not None)
    return CODE_BITS[encoding.codes] + 8 * scale_bytes / encoding.group


class Measurements:
    """One checkpoint with its held-out texts.

    Args:
        checkpoint: directory.
        folder: for its store.
        texts: files, a kind of text each.
        tokens: held out of each kind.
    """

    def __init__(self, checkpoint: Path, folder: Path, texts: Sequence[str], tokens: int) -> None:
        options = RunnerOptions(device=torch.device("cpu"), dtype=torch.float32)
        self.model = load_model(Store.open(make_store(checkpoint, folder)), options)
        domains = find_domains(texts)
        calibration = CalibrationOptions(CALIBRATION, price_tokens=0, with_weights=False)
        self.statistics = calibrate(self.model, domains, calibration)
        assert self.statistics.channels is not None
        self._importance = Importance.of(self.statistics.channels)
        held_out = TextOptions(half="odd", max_tokens=tokens)
        self.texts = {one.name: token_sequences(self.model, one, held_out) for one in domains}
        self._slots = self.model.cache.page_table.copy()
        self.num_layers, self.num_experts = self._slots.shape
        self._held = [[PLAIN] * self.num_experts for _ in range(self.num_layers)]
        self._decoded: dict[tuple[str, str, bool], list[list[Tensor]]] = {}
        self._whole = {name: [run_batch(self.model, batch).logits.half() for batch in batches(self.model, sequences)]
                       for name, sequences in self.texts.items()}  # fmt: skip

    def measure(
        self, part: str, name: str, choice: Choice, bits: float, kept: int | None = None, masks: Masks | None = None
    ) -> dict[str, Any]:
        """One row of the table."""
        changes, divergences = {}, {}
        for kind, sequences in self.texts.items():
            self._hold(choice(kind))
            found: list[Tensor] = []
            for batch, whole in zip(batches(self.model, sequences), self._whole[kind], strict=True):
                logits = run_batch(self.model, batch, None if masks is None else masks[kind]).logits
                change = losses(logits, batch) - losses(whole.float(), batch)
                found.append(torch.stack([torch.from_numpy(change), divergence(whole, logits)[:, :-1]]).flatten(1))
            changes[kind], divergences[kind] = torch.cat(found, dim=1).mean(dim=1).tolist()
        kept = self.num_experts if kept is None else kept
        worst = max(changes, key=lambda kind: changes[kind])
        return {
            "part": part,
            "name": name,
            "kept": kept,
            "bits": round(bits, 3),
            "bytes": round(kept / self.num_experts * bits / 16, 4),
            "mean_ratio": round(float(np.exp(np.mean(list(changes.values())))), 5),
            "worst_ratio": [worst, round(float(np.exp(changes[worst])), 4)],
            "kl": round(float(np.mean(list(divergences.values()))), 5),
            "worst_kl": round(max(divergences.values()), 5),
        }

    def everywhere(self, made: Made) -> Choice:
        """All experts alike."""
        same = [[made] * self.num_experts for _ in range(self.num_layers)]
        return lambda kind: same

    def mixed(self, first: Made, second: Made, is_first: Mapping[str, np.ndarray]) -> Choice:
        """Experts in the encoding `first` where `is_first[kind]`, bool [L, E], says so, else in `second`."""
        return lambda kind: [[first if one else second for one in layer] for layer in is_first[kind]]

    def scores(self, kinds: Sequence[str], criterion: str) -> np.ndarray:
        """Scores of the experts over kinds of text that count the same, [L, E]."""
        return np.mean([normalised(score(self.statistics, criterion, [kind])) for kind in kinds], axis=0)

    def _hold(self, wanted: list[list[Made]]) -> None:
        """Put the decoded values of the experts' encodings into their slots."""
        for layer, pool in enumerate(self.model.cache.pools):
            for expert, made in enumerate(wanted[layer]):
                if self._held[layer][expert] == made:
                    continue
                self._held[layer][expert] = made
                slot = int(self._slots[layer, expert])
                for name, encoding in (("gate_up_proj", made.gate_up), ("down_proj", made.down)):
                    pool.params[name][slot].copy_(self._values(name, encoding, made.with_stats)[layer][expert])

    def _values(self, tensor: str, encoding: str, with_stats: bool) -> list[list[Tensor]]:
        """The decoded values of a tensor of all experts, by layer and expert."""
        key = (tensor, encoding, with_stats and encoding != SIXTEEN)
        if key not in self._decoded:
            self._decoded[key] = [
                [self._value(layer, expert, *key) for expert in range(self.num_experts)]
                for layer in range(self.num_layers)
            ]
        return self._decoded[key]

    def _value(self, layer: int, expert: int, tensor: str, name: str, with_stats: bool) -> Tensor:
        plain = self._plain(layer, expert, tensor)
        if name == SIXTEEN:
            return plain
        importance = self._importance.of_matrix(layer, expert, tensor) if with_stats else None
        encoding = encoding_of(name, plain.shape[1])
        return decode_fields(encoding, quantise(plain, encoding, importance))

    def _plain(self, layer: int, expert: int, tensor: str) -> Tensor:
        spec = self.model.store.layer_spec(layer)
        span = torch.empty(spec.span_bytes, dtype=torch.uint8)
        self.model.store.read_expert(layer, expert, span)
        return span_values(spec, span)[tensor].float()


def divergence(whole: Tensor, logits: Tensor) -> Tensor:
    """KL divergence of each token's next distribution, nats, float64 [B, T]: of `logits` from `whole`, [B, T, V]."""
    rows = []
    for before, after in zip(whole, logits, strict=True):  # a sequence at a time, for memory
        p, q = before.float().log_softmax(-1), after.float().log_softmax(-1)
        rows.append((p.exp() * (p - q)).sum(-1).double())
    return torch.stack(rows)


def encodings(one: Measurements) -> Iterator[dict[str, Any]]:
    """All experts in one encoding."""
    for name in ENCODINGS:
        for with_stats in (False, True) if name.startswith(FOUR_BITS) else (False,):
            made = Made.of(name, with_stats)
            yield one.measure("encodings", name + ", stats" * with_stats, one.everywhere(made), made.bits)


def down(one: Measurements) -> Iterator[dict[str, Any]]:
    """Another encoding of the second matrix than of the first."""
    for gate_up, second in (("int4", "int8"), ("int8", "int4")):
        made = Made(gate_up, second)
        yield one.measure("down", f"{gate_up}, down {second}", one.everywhere(made), made.bits)


def masks(one: Measurements) -> Iterator[dict[str, Any]]:
    """Fewer experts in more bits, and more in fewer."""
    together = one.scores(list(one.texts), "coverage")
    for name, shares in ((SIXTEEN, (0.5, 0.25)), ("fp8", (0.5, 0.25)), ("int4", (0.75, 0.5, 0.25))):
        for kept in (round(share * one.num_experts) for share in shares):
            own = {kind: allow_best(one.scores([kind], "coverage"), kept) for kind in one.texts}
            same = dict.fromkeys(one.texts, allow_best(together, kept))
            for chosen, masking in (("kind", own), ("all", same)):
                everywhere = one.everywhere(Made.of(name))
                yield one.measure("masks", f"{name}, {chosen}", everywhere, bits_of(name), kept, masking)


def mixes(one: Measurements) -> Iterator[dict[str, Any]]:
    """Some experts, or some layers, in more bits than the others."""
    shape = (one.num_layers, one.num_experts)
    saliency, drawn = one.scores(list(one.texts), "reap-sum"), np.random.default_rng(0).random(shape)
    early = np.broadcast_to(-np.arange(one.num_layers)[:, None] / one.num_layers, shape)
    for first, share in (("fp8", 0.5), (SIXTEEN, 0.25)):
        larger, smaller = Made.of(first), Made.of("int4")
        bits, kept = share * larger.bits + (1 - share) * smaller.bits, round(share * one.num_experts)
        ways = {
            "salient, kind": {kind: allow_best(one.scores([kind], "reap-sum"), kept).allowed for kind in one.texts},
            "salient, all": dict.fromkeys(one.texts, allow_best(saliency, kept).allowed),
            "least salient, all": dict.fromkeys(one.texts, allow_best(-saliency, kept).allowed),
            "random": dict.fromkeys(one.texts, allow_best(drawn, kept).allowed),
            "first layers": dict.fromkeys(one.texts, -early < share),
            "last layers": dict.fromkeys(one.texts, -early >= 1 - share),
        }
        for way, is_first in ways.items():
            choice = one.mixed(larger, smaller, is_first)
            yield one.measure("mixes", f"{share:.0%} {first}, rest int4: {way}", choice, bits)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="append", type=Path, help="default: the bundled one")
    parser.add_argument("--texts", nargs="+", default=sorted(str(path) for path in DATA.glob("*.txt")))
    parser.add_argument("--tokens", type=int, default=2048, help="held-out tokens of a kind")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    functions = {function.__name__: function for function in (encodings, down, masks, mixes)}
    result: dict[str, Any] = {"environment": environment(), "tokens_of_a_kind": arguments.tokens, "checkpoints": {}}
    for checkpoint in arguments.checkpoint or [BUNDLED]:
        rows: list[dict[str, Any]] = []
        result["checkpoints"][checkpoint.name] = rows
        with tempfile.TemporaryDirectory(prefix="deepfew-encodings-") as folder:
            one = Measurements(checkpoint, Path(folder) / "store", arguments.texts, arguments.tokens)
            for part in arguments.parts:
                started = time.monotonic()
                for row in functions[part](one):
                    rows.append(row)
                    print(f"{checkpoint.name}: {row}", flush=True)
                    if arguments.save is not None:
                        write_result(arguments.save, result)  # what there is, should the run be cut off
                print(f"{part} took {time.monotonic() - started:.0f} s", flush=True)
        print(f"\n# {checkpoint.name}\n" + table(COLUMNS, [[row[column] for column in COLUMNS] for row in rows]))
    finish(arguments.save or "encodings", result, save=arguments.save is not None)


if __name__ == "__main__":
    main()
