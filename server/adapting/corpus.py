"""The text that an adapter is trained on, in sequences of one length, and the text that measures it.

Invariant: no sequence that measures is trained on; the demand of a domain is that of its training text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from server.adapting.target import Demand
from server.model.runner import SelectiveModel
from server.quality.batches import Progress, Tokens, batches, run_batch
from server.quality.texts import TextsError

HELD_OUT_EVERY = 8
"""One of so many sequences of a domain measures, and is not trained on."""
DEMAND_TOKENS = 4096
"""The demand of a domain is that of so many of its tokens."""


@dataclass(frozen=True)
class Corpus:
    """Texts by domain.

    Attributes:
        train: (domain, tokens), all of one length.
        held_out: of each domain that has enough text.
        demand: of each domain.
    """

    train: Sequence[tuple[str, Tokens]]
    held_out: Mapping[str, Sequence[Tokens]]
    demand: Mapping[str, Demand]

    @property
    def num_tokens(self) -> int:
        """Tokens of the training text."""
        return sum(len(tokens) for _, tokens in self.train)


def read_corpus(
    model: SelectiveModel,
    texts: Mapping[str, Sequence[Tokens]],
    context: int,
    held_out_tokens: int,
    notify: Progress = lambda doing, done, total: None,
) -> Corpus:
    """Divide the texts, and run a part of each domain through the whole model for its demand.

    Args:
        texts: sequences of each domain.
        context: tokens of a sequence that is trained on; shorter ones only measure.
        held_out_tokens: most tokens of a domain that measure.

    Raises:
        TextsError: too little text to train on, or to measure with.
    """
    train: list[tuple[str, Tokens]] = []
    held_out: dict[str, Sequence[Tokens]] = {}
    for name, sequences in texts.items():
        measured = range(len(sequences) - 1, 0, -HELD_OUT_EVERY)[: max(1, held_out_tokens // context)]
        if measured:
            held_out[name] = [sequences[at] for at in measured]
        kept = [tokens for at, tokens in enumerate(sequences) if at not in measured and len(tokens) == context]
        train += [(name, tokens) for tokens in kept]
    if not train or not held_out:
        raise TextsError(
            f"the texts have too little to train on and to measure with: give at least two sequences of "
            f"{context} tokens (or fewer tokens to a sequence, with --context)"
        )
    return Corpus(train, held_out, _demand(model, train, held_out, notify))


def _demand(
    model: SelectiveModel,
    train: Sequence[tuple[str, Tokens]],
    held_out: Mapping[str, Sequence[Tokens]],
    notify: Progress,
) -> dict[str, Demand]:
    spec = model.store.manifest.model
    found = {}
    names = dict.fromkeys([*(name for name, _ in train), *held_out])
    for number, name in enumerate(names):
        notify(f"reading {name}", number, len(names))
        own = [tokens for domain, tokens in train if domain == name] or list(held_out[name])
        demand = np.zeros((spec.num_layers, spec.num_experts))
        count = max(1, DEMAND_TOKENS // len(own[0]))
        for batch in batches(model, own[:: max(1, len(own) // count)][:count]):
            demand += run_batch(model, batch).record.demand_mass_of(slice(None), spec.num_experts)
        found[name] = demand
    return found
