"""Text that the whole model writes by itself, to train an adapter without a corpus.

Invariant: the same beginnings, seed and model give the same text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from server.model.host.assembly import HostModel
from server.model.host.sequence_runner import make_runner
from server.model.runner import RowStep
from server.quality.batches import Progress, Tokens

ROWS = 16
"""Texts that are written side by side."""


def write_texts(
    model: HostModel, beginnings: Sequence[Tokens], num_tokens: int, seed: int, notify: Progress
) -> list[list[int]]:
    """Continue each beginning to `num_tokens` tokens, drawn at temperature 1 from the whole model.

    Args:
        beginnings: at least one token each, fewer than `num_tokens`.
    """
    generator = torch.Generator().manual_seed(seed)
    runner = make_runner(model, max_rows=ROWS, max_tokens=num_tokens)
    written: list[list[int]] = []
    for start in range(0, len(beginnings), ROWS):
        notify("writing text", len(written) * num_tokens, len(beginnings) * num_tokens)
        texts = [list(tokens) for tokens in beginnings[start : start + ROWS]]
        rows = [runner.allocate() for _ in texts]
        try:
            for row, text in zip(rows, texts, strict=True):
                text.append(_drawn(runner.prefill(row, text).logits, generator)[0])
            while unfinished := [at for at, text in enumerate(texts) if len(text) < num_tokens]:
                output = runner.decode([RowStep(rows[at], texts[at][-1]) for at in unfinished])
                for at, token in zip(unfinished, _drawn(output.logits, generator), strict=True):
                    texts[at].append(token)
        finally:
            for row in rows:
                runner.free(row)
        written += texts
    return written


def _drawn(logits: torch.Tensor, generator: torch.Generator) -> list[int]:
    """A token for each row of logits [B, V]."""
    drawn: list[int] = torch.multinomial(logits.cpu().softmax(dim=-1), 1, generator=generator).flatten().tolist()
    return drawn
