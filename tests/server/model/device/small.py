"""The device of the runners under test, sizes of `small_store`, kernels tuned for the interpreter, greedy tokens."""

from __future__ import annotations

import torch

from router.mask import ExpertMask
from server.model.device.step.tuning import Tuning
from server.model.runner import RowStep, Runner

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


LAYERS, EXPERTS, TOP_K = 2, 8, 2  # of `small_store`
EVERYTHING = ExpertMask.same_in_every_layer(range(EXPERTS), LAYERS, EXPERTS)


# Few programs a kernel: the interpreter runs them one after the other.
TUNING = Tuning(
    qkv_rows=64, output_rows=32, head_rows=1024, gate_rows=8, up_rows=16, down_rows=32, down_columns=32,
    packed_up_rows=32, packed_down_rows=64,
    attention_splits=1, latent_splits=2, fetchers=1, packed_fetchers=1, copy_elements=2048,
)  # fmt: skip


def greedy(
    runner: Runner,
    prompts: list[list[int]],
    num_tokens: int,
    masks: list[ExpertMask | None],
    fetching: list[bool] | None = None,
) -> list[list[int]]:
    """Tokens of all prompts, decoded together; `masks` and `fetching` have one value a row."""
    held = [runner.allocate() for _ in prompts]
    wishes = list(zip(held, masks, fetching or [False] * len(held), strict=True))
    tokens = []
    for (row, mask, fetches), prompt in zip(wishes, prompts, strict=True):
        output = runner.prefill(row, prompt, mask=mask, fetches=fetches)
        tokens.append([int(output.logits[-1].argmax())])
    for _ in range(num_tokens - 1):
        steps = [
            RowStep(row, mine[-1], mask=mask, fetches=fetches)
            for (row, mask, fetches), mine in zip(wishes, tokens, strict=True)
        ]
        output = runner.decode(steps)
        for mine, logits in zip(tokens, output.logits, strict=True):
            mine.append(int(logits.argmax()))
    for row in held:
        runner.free(row)
    return tokens
