"""Training of an adapter: the whole model teaches itself under masks.

The loss of a token is the KL divergence from the distribution of the whole, unchanged model to that of the masked and
changed one, in nats. Teacher and student are one loaded model; experts are frozen and fetched as in serving. Invariant:
a step depends on its number, the seed and the state alone, so a run that was interrupted continues to the same bits.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from expert_store.errors import AdapterError
from expert_store.files import replacing
from server.adapting.corpus import Corpus
from server.adapting.measuring import evaluate_kinds
from server.adapting.parameters import Parameters
from server.adapting.target import Target, drawn_pools
from server.model.runner import SelectiveModel
from server.model.seam.adapters import Part
from server.model.seam.changed import copied_bytes
from server.quality.text_loss import geometric_mean

log = logging.getLogger(__name__)
TRAINED = ""
"""The name of the adapter in the model's routing while it is trained; no adapter of a store has it."""
WARM_UP_SHARE, LAST_RATE_SHARE = 0.04, 0.05
"""The rate rises over this share of the steps, and ends as this share of its height."""
MATRIX_RATE_SHARE = 0.25
"""Whole matrices take this share of the rate: a step of all their numbers adds up over the inputs."""
CLIPPED_NORM = 1.0
SAVE_SECONDS = 60.0
READ_STEPS = 16
"""Losses are read from the device once in so many steps."""
MAX_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 27}
"""Most values in the largest array of the sequences that run at once (logits, or the experts' outputs)."""
DIVERGENCE_ROWS = 8
"""Sequences whose divergence is computed at once."""
EAGER_CALLS = 3
"""Calls before a capture, in which libraries allocate what they keep."""
STEP_COST = 4.0
"""A step takes about so many times as long as the teacher's pass over its tokens."""
STATE_BYTES, UPDATE_BYTES = 16, 4
"""Bytes of a trained number, its gradient and the optimiser's two means, and those that an update takes meanwhile."""
LOSS_COPIES = 5
"""Copies of the logits in float32 while the divergence of `DIVERGENCE_ROWS` sequences is computed."""
PICK_VECTORS = 4
"""Vectors of each pick of an expert in a layer's backward pass: inputs, gradients, and those of both."""


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
    rate: float = 3e-3
    seed: int = 0
    measures: int = 6


def usual_batch(tokens: int) -> int:
    """Tokens of a step for a training of so many tokens: it makes about 300 steps of 1,024 to 16,384."""
    return min(16384, max(1024, tokens // 300))


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


class Repeated:
    """A function of fixed tensors, which is called again and again.

    Args:
        graph: whether to capture it in a CUDA graph after some calls. A function that cannot be captured, as those of
            families whose forward waits for the device, is called as it is, with a warning.
    """

    def __init__(self, function: Callable[[], None], graph: bool) -> None:
        self._function, self._calls = function, 0
        self._stream = torch.cuda.Stream() if graph else None  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Call it, or replay its graph."""
        if self._stream is None:
            self._function()
            return
        self._calls += 1
        if self._calls == EAGER_CALLS + 1:
            self._graph = self._captured()
        if self._graph is not None:
            self._graph.replay()
            return
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._function()
        current.wait_stream(self._stream)

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has memory of its own
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._function()
        except RuntimeError as error:
            log.warning("steps run without a CUDA graph, which is slower: %s", str(error).partition("\n")[0])
            return None
        return graph


class Training:
    """Trains `parameters`, which are hooked into `model`.

    Args:
        work: what is trained, JSON; a saved state of other work is refused.
        graph: capture a step in CUDA graphs, for which the experts are `batched_experts`.
    """

    def __init__(
        self,
        model: SelectiveModel,
        target: Target,
        corpus: Corpus,
        parameters: Parameters,
        options: TrainingOptions,
        work: dict[str, Any],
        graph: bool = False,
    ) -> None:
        self.model, self.target, self.corpus, self.options = model, target, corpus, options
        self.parameters, self._work = parameters, work
        self.done = Trained(0, 0.0, [], [], [])
        self._set_text(corpus)
        self._named = {f"{name}.{part}": one for name, parts in parameters.items() for part, one in parts.items()}
        whole = [one for name, one in self._named.items() if name.endswith(".delta")]
        others = [one for name, one in self._named.items() if not name.endswith(".delta")]
        groups = [{"params": others, "share": 1.0}, {"params": whole, "share": MATRIX_RATE_SHARE}]
        groups = [{**group, "lr": self._rate()} for group in groups if group["params"]]
        self._optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.95), weight_decay=0.0, capturable=model.device.type == "cuda", foreach=True
        )
        self._unmasked: dict[str, float] = {}
        self._losses: list[Tensor] = []
        self._gradients = Repeated(self._add_gradients, graph)
        self._update = Repeated(self._change_parameters, graph)
        model.model.requires_grad_(False)
        for parameter in self._named.values():
            parameter.requires_grad_(True)
            parameter.grad = torch.zeros_like(parameter)
        model.routing.adapters.add(TRAINED, parameters, model.device, None)

    def _set_text(self, corpus: Corpus) -> None:
        """Put texts, demand and the inputs of a step on the device."""
        device, length = self.model.device, len(corpus.train[0][1])
        names = list(corpus.demand)
        self._text = torch.from_numpy(np.array([tokens for _, tokens in corpus.train], dtype=np.int32)).to(device)
        self._domains = [names.index(name) for name, _ in corpus.train]
        demand = np.stack([corpus.demand[name] for name in names], axis=1)
        self._demand = torch.from_numpy(demand).float().to(device)  # [L, D, E]
        mask = self.target.mask
        self._masks = None if mask is None else torch.from_numpy(np.array(mask.allowed)[:, None]).to(device)
        most = max(1, self.options.batch_tokens // length)
        config = self.model.model.config.get_text_config()
        width = max(self.model.vocab_size, int(config.hidden_size) * self.model.store.manifest.model.top_k)
        self._rows = min(most, max(1, MAX_ELEMENTS[device.type] // (length * width)))
        self._batch = most // self._rows * self._rows
        self.num_steps = max(1, math.ceil(self.options.tokens / (self._batch * length)))
        self._orders: dict[int, npt.NDArray[np.int64]] = {}
        self._inputs = torch.zeros(self._rows, 6, dtype=torch.float64, device=device)
        self._loss = torch.zeros((), device=device)

    def _rate(self) -> float | Tensor:
        """A rate that a graph reads from the device."""
        is_cuda = self.model.device.type == "cuda"
        return torch.tensor(self.options.rate, device=self.model.device) if is_cuda else self.options.rate

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
            self._losses.append(self._step(done.step))
            done.step += 1
            measures = done.step % every == 0 or done.step == self.num_steps
            saves = state is not None and time.monotonic() - saved_at > SAVE_SECONDS
            if measures or saves or len(self._losses) == READ_STEPS or done.step == last:
                self._read_losses()
            done.seconds += time.monotonic() - started
            if measures:
                done.losses.append((done.step, round(sum(done.recent) / len(done.recent), 5)))
                done.ratios.append((done.step, self.held_out()))
                done.recent.clear()
            notify(done)
            if saves and state is not None:
                self.save(state)
                saved_at = time.monotonic()
        return done

    def _read_losses(self) -> None:
        """Wait for the steps under way, and note their losses."""
        self.done.recent += torch.stack(self._losses).tolist() if self._losses else []
        self._losses.clear()

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self._batch * self._text.shape[1]

    @property
    def changes(self) -> dict[str, dict[str, Tensor]]:
        """The adapter's tensors as they are now, float32 on the CPU."""
        return {
            name: {part: one.detach().float().cpu().clone() for part, one in parts.items()}
            for name, parts in self.parameters.items()
        }

    def forecast(self) -> tuple[float, int]:
        """Seconds and bytes (beside the model) that the training takes about; runs a few batches to measure them."""
        ids = self._text[: self._rows]
        with torch.no_grad():
            self._teach(ids)
            started = time.monotonic()
            self._teach(ids).sum().item()
        seconds = STEP_COST * (time.monotonic() - started) / ids.numel() * self.options.tokens
        return seconds, self._forecast_bytes()

    def _forecast_bytes(self) -> int:
        """Bytes at the fullest moment of a step, beside the model; runs forwards of one and two sequences."""
        of_sequence = self._kept_bytes(2) - self._kept_bytes(1)
        tokens, itemsize = self._rows * self._text.shape[1], self.model.dtype.itemsize
        of_rows = min(self._rows, DIVERGENCE_ROWS) * self._text.shape[1]
        divergence = self.model.vocab_size * (2 * tokens * itemsize + LOSS_COPIES * of_rows * 4)
        hidden_size = int(self.model.model.config.get_text_config().hidden_size)
        backward = PICK_VECTORS * tokens * self.model.store.manifest.model.top_k * hidden_size * itemsize
        experts = copied_bytes(self.model.model)  # as they were; the step has them as they are, too
        step = experts + self._rows * of_sequence + max(divergence, backward)
        num_parameters = sum(parameter.numel() for parameter in self._named.values())
        held = self._text.nbytes + experts + STATE_BYTES * num_parameters
        return held + max(step, UPDATE_BYTES * num_parameters)

    def _kept_bytes(self, rows: int) -> int:
        """Bytes that the loss of so many sequences keeps for its gradient, with the weights and parameters."""
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        inputs = self._inputs.new_zeros(rows, self._inputs.shape[1])
        inputs[:, 2] = self.model.store.manifest.model.num_experts
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._loss_of(inputs)
        return sum(kept.values())

    def held_out(self, adapter: str | None = TRAINED) -> dict[str, float]:
        """Perplexity of held-out text under the target's masks ÷ that of the whole model, by share of the experts."""
        held_out = self.corpus.held_out
        if not self._unmasked:
            self._unmasked = evaluate_kinds(self.model, held_out, None, None)
        masks = {domain: self.target.measured(self.corpus.demand[domain]) for domain in held_out}
        ratios = {}
        for at, (share, _) in enumerate(next(iter(masks.values()))):
            under = {domain: own[at][1] for domain, own in masks.items()}
            losses = evaluate_kinds(self.model, held_out, under, adapter)
            found = [math.exp(loss - self._unmasked[domain]) for domain, loss in losses.items()]
            ratios[f"{share:.4g}"] = round(geometric_mean(found), 4)
        return ratios

    def _step(self, number: int) -> Tensor:
        """One step of the optimiser; returns its mean loss, nats a token, which is not waited for."""
        random = np.random.default_rng([self.options.seed, 1, number])
        chosen = self._sequences(number)
        draws = [self.target.draw(random) for _ in chosen]
        length, num_experts = self._text.shape[1], self.model.store.manifest.model.num_experts
        inputs = np.array(
            [
                [at, self._domains[at], max(1, round(draw.share * num_experts)), draw.mixture, int(draw.start * length)]
                for at, draw in zip(chosen, draws, strict=True)
            ]
        )
        inputs = np.column_stack([inputs, np.full(len(chosen), 1 / (len(chosen) * length - inputs[:, 4].sum()))])
        for group in self._optimizer.param_groups:
            rate = self.options.rate * group["share"] * _rate_share(number, self.num_steps)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._loss.zero_()
        for start in range(0, len(chosen), self._rows):
            self._inputs.copy_(torch.from_numpy(inputs[start : start + self._rows]), non_blocking=True)
            self._gradients()
        self._update()
        return self._loss.clone()

    def _sequences(self, number: int) -> list[int]:
        """The sequences of a step: every sequence comes once before one comes again."""
        count, found = len(self.corpus.train), []
        for place in range(number * self._batch, (number + 1) * self._batch):
            if place // count not in self._orders:
                self._orders = {
                    place // count: np.random.default_rng([self.options.seed, 2, place // count]).permutation(count)
                }
            found.append(int(self._orders[place // count][place % count]))
        return found

    def _teach(self, ids: Tensor) -> Tensor:
        """Logits [B, T, V] of the whole model; its step goes on, for the demand."""
        self.model.routing.begin(*ids.shape)
        return self.model.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

    def _add_gradients(self) -> None:
        """Add the gradients and the loss of the sequences that `_inputs` names."""
        loss = self._loss_of(self._inputs)
        torch.autograd.backward(loss)
        self._loss += loss.detach()

    def _loss_of(self, inputs: Tensor) -> Tensor:
        """The loss of B sequences, differentiable by the parameters.

        Args:
            inputs: [B, 6]: number of the sequence, number of its domain, experts of its pool, weight of its own demand
                in the choice of these, tokens before its mask, weight of each masked token's divergence.
        """
        routing, length = self.model.routing, self._text.shape[1]
        at, domain, counts, mixture, starts, weight = inputs.unbind(dim=1)
        ids = self._text[at.long()]
        with torch.no_grad():
            teacher = self._teach(ids)
            pools = self._masks
            if pools is None:
                pools = drawn_pools(routing.demand_mass(), self._demand[:, domain.long()], counts, mixture)
        is_masked = torch.arange(length, device=ids.device) >= starts[:, None]  # [B, T]
        table = (pools[:, :, None] | ~is_masked[None, :, :, None]).expand(-1, len(ids), length, -1).flatten(1, 2)
        share = None if self.target.mask is not None else is_masked.reshape(-1, 1)
        routing.begin_tokens(len(ids), length, table, [Part(self.parameters, None, share)])
        try:
            student = self.model.model(input_ids=ids, use_cache=False).logits
        finally:
            routing.abandon()
        return divergence(teacher, student, is_masked * weight[:, None].float())

    def _change_parameters(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._named.values(), CLIPPED_NORM, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)

    def save(self, path: Path) -> None:
        """Save parameters, optimiser and figures to `path`, which is replaced as a whole. Raises OSError."""
        self._read_losses()
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
                    key: tensors[f"{key}/{name}"].to("cpu" if key == "step" and not one.is_cuda else one.device)
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


def divergence(wanted: Tensor, got: Tensor, weights: Tensor) -> Tensor:
    """Σ weight · KL divergence from the distribution of `wanted` to that of `got`, in nats; differentiable by `got`.

    Args:
        wanted, got: logits [B, T, V].
        weights: [B, T].
    """
    loss: Tensor = _Divergence.apply(wanted, got, weights)  # type: ignore[no-untyped-call]
    return loss


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wanted: Tensor, got: Tensor, weights: Tensor) -> Tensor:
        loss, of_got = torch.zeros((), device=got.device), torch.empty_like(got)
        for start in range(0, len(got), DIVERGENCE_ROWS):  # float32 copies of all logits would take much memory
            rows = slice(start, start + DIVERGENCE_ROWS)
            log_wanted = wanted[rows].log_softmax(dim=-1, dtype=torch.float32)
            log_got = got[rows].log_softmax(dim=-1, dtype=torch.float32)
            shares, weight = log_wanted.exp(), weights[rows]
            loss += ((shares * (log_wanted - log_got)).sum(dim=-1) * weight).sum()
            of_got[rows] = (log_got.exp_() - shares) * weight[..., None]
        ctx.save_for_backward(of_got)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (of_got,) = ctx.saved_tensors
        return None, of_got * grads[0].to(of_got.dtype), None


def _rate_share(step: int, num_steps: int) -> float:
    """The rate of a step as a share of the highest: a straight rise, then half a cosine."""
    warm_up = max(1, round(WARM_UP_SHARE * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    way = (step - warm_up) / max(1, num_steps - warm_up)
    return LAST_RATE_SHARE + (1 - LAST_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * way))
