"""Runs whole token sequences through a model, several at once, for calibration and evaluation.

Invariant: a batch holds sequences of one length, and each sequence gets the logits that it would get alone. No KV
memory is kept: transformers' own attention sees each sequence as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from router.ledger import StepRecord
from router.mask import ExpertMask
from server.model.runner import SelectiveModel
from server.model.seam.routing import RowShare
from server.quality.texts import MIN_SEQUENCE_TOKENS, Domain, TextOptions, TextsError, documents, pack_sequences

MAX_ELEMENTS = 1 << 26
"""Most values in the largest array of a batch (logits, or the experts' outputs)."""

Tokens = Sequence[int]
Progress = Callable[[str, int, int | None], None]
"""Called with the step under way, how much of it is done, and the total (None: unknown)."""


@dataclass(frozen=True)
class BatchOutput:
    """The result of one batch.

    Attributes:
        logits: [B, T, V].
        record: routing of the B × T tokens, sequence after sequence.
        share: demanded and missed router mass of each sequence.
    """

    logits: Tensor
    record: StepRecord
    share: RowShare

    def record_of(self, sequence: int) -> StepRecord:
        """The routing of one sequence."""
        length = self.logits.shape[1]
        record = self.record.select(range(sequence * length, (sequence + 1) * length))
        return record if record.missed_mass is None else replace(record, missed_mass=self.share.missed[sequence])


def encoder(model: SelectiveModel) -> Callable[[str], list[int]]:
    """A function from text to token ids, without special tokens."""
    return lambda text: list(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def token_sequences(model: SelectiveModel, domain: Domain, options: TextOptions) -> list[list[int]]:
    """A domain's packed token sequences, at most `options.max_tokens` tokens.

    Raises:
        TextsError: the domain has too little text for one sequence.
    """
    taken: list[list[int]] = []
    texts = documents(domain, options.half)
    for tokens in pack_sequences(texts, encoder(model), model.tokenizer.eos_token_id, options.context):
        taken.append(tokens)
        if len(taken) * options.context >= options.max_tokens:
            break
    if not taken:
        raise TextsError(f"domain {domain.name} has fewer than {MIN_SEQUENCE_TOKENS} tokens: give it more text")
    return taken


def batches(model: SelectiveModel, sequences: Sequence[Tokens]) -> Iterator[list[Tokens]]:
    """The sequences in order, in batches of one length that fit into memory."""
    config = model.model.config.get_text_config()
    width = max(model.vocab_size, int(config.hidden_size) * model.store.manifest.model.top_k)
    batch: list[Tokens] = []
    for sequence in sequences:
        if batch and (len(sequence) != len(batch[0]) or (len(batch) + 1) * len(sequence) * width > MAX_ELEMENTS):
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


@torch.inference_mode()
def run_batch(
    model: SelectiveModel, sequences: Sequence[Tokens], mask: ExpertMask | None = None, adapter: str | None = None
) -> BatchOutput:
    """Run sequences of one length from their first token, under a mask (None: the model's own), with an adapter that
    the model knows."""
    ids = torch.tensor([list(sequence) for sequence in sequences], device=model.device)
    model.routing.begin(
        len(sequences),
        ids.shape[1],
        None if mask is None else [mask] * len(sequences),
        adapters=None if adapter is None else [adapter] * len(sequences),
    )
    try:
        logits = model.model(input_ids=ids, use_cache=False).logits
        record, share = model.routing.finish()
    except BaseException:
        model.routing.abandon()
        raise
    return BatchOutput(logits, record, share)


def losses(logits: Tensor, sequences: Sequence[Tokens]) -> npt.NDArray[np.float64]:
    """Loss of each token but the first, nats, float64 [B, T-1], from logits [B, T, V]."""
    targets = torch.tensor([list(sequence[1:]) for sequence in sequences], device=logits.device)
    values = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    return np.asarray(values.view(targets.shape).double().cpu().numpy())
