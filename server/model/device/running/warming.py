"""The first prompts and draws, run at the start so that no request pays for what only the first one needs.

Libraries load the code of each product, attention and sort when it is first run, and for another number of tokens it is
another one: seconds, from a disk that has not read the library lately. Invariant: rows are free afterwards, and pages
as they were.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from router.mask import ExpertMask, MaskError
from server.model.device.running.runner import DeviceRunner

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Tokens of prompts' chunks: the bounds at which libraries take another kernel, and some between."""


def warm_up(runner: DeviceRunner, progress: Callable[[str, float], None] = lambda phase, share: None) -> None:
    """Runs a prompt of each length, alone and after another one, over the experts that are in slots, and prepares the
    drawing of tokens."""
    mask = _resident(runner)
    if mask is None:
        return
    for done, length in enumerate(LENGTHS):
        progress("warming up", done / len(LENGTHS))
        tokens = [(1 + 7919 * at) % runner.shape.vocab for at in range(min(length, runner.max_tokens // 2))]
        row = runner.allocate()
        runner.prefill(row, tokens, mask=mask)
        runner.prefill(row, tokens, mask=mask)
        runner.free(row)
    runner.graphs.prepare_draws()
    if runner.model.device.type == "cuda":
        torch.cuda.synchronize()


def _resident(runner: DeviceRunner) -> ExpertMask | None:
    """The experts in slots that may be served: nothing has to be fetched for them. None where a layer has none."""
    resident = (runner.pages.page_table >= 0).cpu().numpy()
    try:
        return ExpertMask.of(np.logical_and(resident, runner.model.routing.mask.allowed))
    except MaskError:
        return None
