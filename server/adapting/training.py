"""Training of an adapter: the whole model teaches itself under masks.

The loss of a token is the KL divergence from the distribution of the whole, unchanged model to that of the masked and
changed one, in nats. Teacher and student are one loaded model; experts are frozen and fetched as in serving. Invariant:
a step depends on its number, the seed and the state alone, so a run that was interrupted continues to the same bits.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from expert_store.errors import AdapterError
from expert_store.files import replacing
from router.mask import ExpertMask
from server.adapting.corpus import Corpus
from server.adapting.parameters import Parameters
from server.adapting.target import Demand, Target
from server.model.runner import SelectiveModel
from server.model.seam.adapters import Part
from server.quality.batches import Tokens, batches
from server.quality.text_loss import evaluate_text, geometric_mean

TRAINED = ""
"""The name of the adapter in the model's routing while it is trained; no adapter of a store has it."""
WARM_UP_SHARE, LAST_RATE_SHARE = 0.04, 0.05
"""The rate rises over this share of the steps, and ends as this share of its height."""
MATRIX_RATE_SHARE = 0.25
"""Whole matrices take this share of the rate: a step of all their numbers adds up over the inputs."""
CLIPPED_NORM = 1.0
SAVE_SECONDS = 60.0
STEP_COST = 4.0
"""A step takes about so many times as long as the teacher's pass over its tokens."""
KEPT_VECTORS, KEPT_LOGITS = 24, 6
"""Hidden vectors a layer, and copies of the logits, that a step keeps about for each token."""


@dataclass(frozen=True)
class TrainingOptions:
    """The work of one training.

    Attributes:
        tokens: of all steps together; text is read again when it ends.
        batch_tokens: of one step.
        rate: highest rate of AdamW.
        seed: of all random choices.
        measures: times that held-out text is measured, evenly over the steps.
    """

    tokens: int
    batch_tokens: int = 4096
    rate: float = 2e-3
    seed: int = 0
    measures: int = 6


@dataclass
class Trained:
    """A training at one of its steps.

    Attributes:
        step: steps done.
        seconds: that they took, without measuring.
        losses: (step, mean loss since the last entry), nats a token.
        ratios: (step, share of the experts → perplexity ÷ the unmasked model's, geometric mean over the domains).
        recent: loss of each step since the last entry of `losses`.
    """

    step: int
    seconds: float
    losses: list[tuple[int, float]]
    ratios: list[tuple[int, dict[str, float]]]
    recent: list[float]


class Training:
    """Trains `parameters`, which are hooked into `model`.

    Args:
        work: what is trained, JSON; a saved state of other work is refused.
    """

    def __init__(
        self,
        model: SelectiveModel,
        target: Target,
        corpus: Corpus,
        parameters: Parameters,
        options: TrainingOptions,
        work: dict[str, Any],
    ) -> None:
        self.model, self.target, self.corpus, self.options = model, target, corpus, options
        self.parameters, self._work = parameters, work
        self.done = Trained(0, 0.0, [], [], [])
        self._batch = max(1, options.batch_tokens // len(corpus.train[0][1]))
        self.num_steps = max(1, math.ceil(options.tokens / (self._batch * len(corpus.train[0][1]))))
        self._named = {f"{name}.{part}": one for name, parts in parameters.items() for part, one in parts.items()}
        whole = [one for name, one in self._named.items() if name.endswith(".delta")]
        others = [one for name, one in self._named.items() if not name.endswith(".delta")]
        groups = [{"params": others, "share": 1.0}, {"params": whole, "share": MATRIX_RATE_SHARE}]
        self._optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._unmasked: dict[str, float] = {}
        model.model.requires_grad_(False)
        for parameter in self._named.values():
            parameter.requires_grad_(True)
        model.routing.adapters.add(TRAINED, parameters, model.device, None)

    def run(
        self, state: Path | None, notify: Callable[[Trained], None] = lambda done: None, last: int | None = None
    ) -> Trained:
        """Train to the end, or to step `last`.

        Args:
            state: file that the state is saved to now and then; a run continues from it.
            notify: called after each step.
        """
        done = self.done
        saved_at = time.monotonic()
        every = max(1, self.num_steps // self.options.measures)
        last = self.num_steps if last is None else last
        while done.step < last:
            started = time.monotonic()
            done.recent.append(self._step(done.step))
            done.step += 1
            done.seconds += time.monotonic() - started
            if done.step % every == 0 or done.step == self.num_steps:
                done.losses.append((done.step, round(sum(done.recent) / len(done.recent), 5)))
                done.ratios.append((done.step, self.held_out()))
                done.recent.clear()
            notify(done)
            if state is not None and time.monotonic() - saved_at > SAVE_SECONDS:
                self.save(state)
                saved_at = time.monotonic()
        return done

    def forecast(self) -> tuple[float, int]:
        """Seconds and bytes (beside the model) that the training takes about; runs a batch to measure the time."""
        batch = next(batches(self.model, [tokens for _, tokens in self.corpus.train[: self._batch]]))
        started = time.monotonic()
        self._teach(batch)
        num_tokens = len(batch) * len(batch[0])
        seconds = STEP_COST * (time.monotonic() - started) / num_tokens * self.options.tokens
        config = self.model.model.config.get_text_config()
        of_layers = KEPT_VECTORS * config.hidden_size * config.num_hidden_layers * self.model.dtype.itemsize
        of_parameters = 16 * sum(one.numel() for one in self._named.values())
        return seconds, of_parameters + num_tokens * (of_layers + KEPT_LOGITS * 4 * self.model.vocab_size)

    def held_out(self, adapter: str | None = TRAINED) -> dict[str, float]:
        """Perplexity of held-out text under the target's masks ÷ that of the whole model, by share of the experts."""
        ratios: dict[str, list[float]] = {}
        for domain, sequences in self.corpus.held_out.items():
            if domain not in self._unmasked:
                self._unmasked[domain] = evaluate_text(self.model, sequences).loss
            for share, mask in self.target.measured(self.corpus.demand[domain]):
                loss = evaluate_text(self.model, sequences, mask, adapter).loss
                ratios.setdefault(f"{share:.4g}", []).append(math.exp(loss - self._unmasked[domain]))
        return {share: round(geometric_mean(values), 4) for share, values in ratios.items()}

    def _step(self, number: int) -> float:
        """One step of the optimiser; returns its mean loss, nats a token."""
        random = np.random.default_rng([self.options.seed, 1, number])
        chosen = [self.corpus.train[at] for at in self._sequences(number)]
        length = len(chosen[0][1])
        starts = [int(self.target.draw_start(random) * length) for _ in chosen]
        total, loss, at = sum(length - start for start in starts), 0.0, 0
        for batch in batches(self.model, [tokens for _, tokens in chosen]):
            logits, demands = self._teach(batch)
            names = [name for name, _ in chosen[at : at + len(batch)]]
            masks = [
                self.target.draw(random, demand, self.corpus.demand[name])
                for name, demand in zip(names, demands, strict=True)
            ]
            loss += self._learn(batch, logits, masks, starts[at : at + len(batch)], total)
            at += len(batch)
        torch.nn.utils.clip_grad_norm_(self._named.values(), CLIPPED_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = self.options.rate * group["share"] * _rate_share(number, self.num_steps)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def _sequences(self, number: int) -> list[int]:
        """The sequences of a step: every sequence comes once before one comes again."""
        count, found = len(self.corpus.train), []
        for place in range(number * self._batch, (number + 1) * self._batch):
            order = np.random.default_rng([self.options.seed, 2, place // count]).permutation(count)
            found.append(int(order[place % count]))
        return found

    @torch.no_grad()
    def _teach(self, batch: Sequence[Tokens]) -> tuple[Tensor, list[Demand]]:
        """Logits [B, T, V] of the whole model, and the demand of each sequence."""
        ids = torch.tensor([list(tokens) for tokens in batch], device=self.model.device)
        self.model.routing.begin(*ids.shape)
        logits = self.model.model(input_ids=ids, use_cache=False).logits
        record, _ = self.model.routing.finish()
        length, num_experts = ids.shape[1], self.model.store.manifest.model.num_experts
        spans = [slice(row * length, (row + 1) * length) for row in range(len(batch))]
        return logits, [record.demand_mass_of(span, num_experts) for span in spans]

    def _learn(
        self, batch: Sequence[Tokens], teacher: Tensor, masks: Sequence[ExpertMask], starts: Sequence[int], total: int
    ) -> float:
        """Add the gradients of some sequences; returns their part of the step's mean loss.

        Args:
            masks: of each sequence; starts: its first tokens that are under the mask.
            total: tokens of the step that are under a mask.
        """
        device = self.model.device
        ids = torch.tensor([list(tokens) for tokens in batch], device=device)
        length = ids.shape[1]
        is_masked = torch.arange(length, device=device) >= torch.tensor(starts, device=device)[:, None]  # [B, T]
        table = (
            torch.from_numpy(np.stack([mask.allowed for mask in masks], axis=1))
            .to(device)
            .repeat_interleave(length, dim=1)
        )  # [L, B·T, E]
        table |= ~is_masked.flatten()[None, :, None]
        tokens = None if bool(is_masked.all()) else is_masked.flatten().nonzero().flatten()
        self.model.routing.begin_tokens(len(batch), length, table, [Part(self.parameters, tokens)])
        try:
            student = self.model.model(input_ids=ids, use_cache=False).logits
            if tokens is not None:
                teacher, student = teacher[is_masked], student[is_masked]
            loss = _divergence(teacher.float(), student.float()).sum() / total
            torch.autograd.backward(loss)
        finally:
            self.model.routing.abandon()
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Save parameters, optimiser and figures to `path`, which is replaced as a whole. Raises OSError."""
        tensors = {f"parameter/{name}": one.detach() for name, one in self._named.items()}
        for name, one in self._named.items():
            for key in ("exp_avg", "exp_avg_sq", "step"):
                tensors[f"{key}/{name}"] = self._optimizer.state[one][key]
        about = {"work": self._work, "done": self.done.__dict__}
        with replacing(path) as file:
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            file.write(save(held, {"state": json.dumps(about)}))

    def resume(self, path: Path) -> None:
        """Continue from the state at `path`.

        Raises:
            AdapterError: it cannot be read, or it is of other work.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise AdapterError(
                f"{path}: the interrupted run cannot be read ({error}): delete it to start anew"
            ) from None
        if about["work"] != json.loads(json.dumps(self._work)):
            raise AdapterError(f"{path} is of a run with other texts or options: delete it, or give it the same ones")
        with torch.no_grad():
            for name, one in self._named.items():
                one.copy_(tensors[f"parameter/{name}"])
                self._optimizer.state[one] = {
                    key: tensors[f"{key}/{name}"].to(one.device if key != "step" else "cpu")
                    for key in ("exp_avg", "exp_avg_sq", "step")
                }
        done = about["done"]
        self.done = Trained(
            done["step"],
            done["seconds"],
            [(step, loss) for step, loss in done["losses"]],
            [(step, ratios) for step, ratios in done["ratios"]],
            done["recent"],
        )


def _divergence(wanted: Tensor, got: Tensor) -> Tensor:
    """KL divergence from the distribution of `wanted` to that of `got`, logits [.., V], in nats [..]."""
    shares = wanted.softmax(dim=-1)
    return (shares * (wanted - got)).sum(dim=-1) - wanted.logsumexp(dim=-1) + got.logsumexp(dim=-1)


def _rate_share(step: int, num_steps: int) -> float:
    """The rate of a step as a share of the highest: a straight rise, then half a cosine."""
    warm_up = max(1, round(WARM_UP_SHARE * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    way = (step - warm_up) / max(1, num_steps - warm_up)
    return LAST_RATE_SHARE + (1 - LAST_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * way))
