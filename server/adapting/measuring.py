"""The loss of several kinds of text at once, each under a mask of its own.

Invariant: the losses are those of `server.quality.text_loss.evaluate_text`, but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional

from router.mask import ExpertMask
from server.model.runner import SelectiveModel
from server.quality.batches import Tokens, batches


@torch.inference_mode()
def evaluate_kinds(
    model: SelectiveModel,
    texts: Mapping[str, Sequence[Tokens]],
    masks: Mapping[str, ExpertMask] | None,
    adapter: str | None,
) -> dict[str, float]:
    """Loss of each kind's text in nats a token, under its mask (None: the model's own), with an adapter that the model
    knows. Few forwards: sequences of one length run together, whatever their kind."""
    kinds = sorted((len(tokens), kind, at) for kind, sequences in texts.items() for at, tokens in enumerate(sequences))
    ordered = [(kind, texts[kind][at]) for _, kind, at in kinds]
    sums = {kind: torch.zeros((), dtype=torch.float64, device=model.device) for kind in texts}
    place = 0
    for batch in batches(model, [tokens for _, tokens in ordered]):
        names = [kind for kind, _ in ordered[place : place + len(batch)]]
        place += len(batch)
        under = None if masks is None else [masks[kind] for kind in names]
        ids = torch.tensor([list(tokens) for tokens in batch], device=model.device)
        adapters = None if adapter is None else [adapter] * len(batch)
        model.routing.begin(len(batch), ids.shape[1], under, adapters=adapters)
        try:
            logits = model.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        finally:
            model.routing.abandon()
        losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        for kind, loss in zip(names, losses.view(len(batch), -1).double().sum(dim=1), strict=True):
            sums[kind] += loss
    counts = {kind: sum(len(tokens) - 1 for tokens in sequences) for kind, sequences in texts.items()}
    return {kind: float(total) / counts[kind] for kind, total in sums.items()}
