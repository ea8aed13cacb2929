"""A trial at start: a few tokens through the captured step and through transformers' own forward must say the same.

Modules' names and shapes cannot tell everything that a family does on the way; its outputs do. Rounding differs between
the two ways, and a router that nearly ties may choose otherwise, so half precision gets room; a missing scale, norm or
branch moves the logits by about their own size.
"""

from __future__ import annotations

import torch

from router.mask import ExpertMask
from server.model.device.capture.refusal import NotCapturableError
from server.model.device.running.runner import DeviceRunner

NUM_TOKENS = 4
LIMITS = {torch.float32: 1e-2}
HALF_LIMIT = 0.4


def try_out(runner: DeviceRunner) -> float:
    """The largest relative distance of the captured step's logits from transformers', over a few tokens.

    Leaves rows free, and pages with other residents but without a count of the trial. Raises NotCapturableError where
    the distance is more than rounding explains.
    """
    vocab = runner.shape.vocab
    tokens = [(1 + 7919 * at) % vocab for at in range(min(NUM_TOKENS, runner.max_tokens))]
    served = runner.model.routing.mask
    in_reach = served.allowed & runner.pages.servable.numpy()  # the others could not be read
    mask = None if (in_reach == served.allowed).all() else ExpertMask.of(in_reach)
    row = runner.allocate()
    wanted = runner.prefill(row, tokens, mask=mask, all_logits=True).logits
    runner.free(row)
    row = runner.allocate()
    runner.prefill(row, tokens[:1], mask=mask)
    got = [runner.decode([row], [token], masks=[mask]).logits[0].clone() for token in tokens[1:]]
    runner.free(row)
    runner.pages.stats.zero_()
    runner.pages.use_count.zero_()
    distances = (torch.stack(got) - wanted[1:]).norm(dim=-1) / wanted[1:].norm(dim=-1)
    distance = float(distances.max())
    limit = LIMITS.get(runner.shape.dtype, HALF_LIMIT)
    if not distance <= limit:
        raise NotCapturableError(
            f"the captured step's logits are {distance:.3g} of their norm away from transformers' own, wanted {limit}: "
            "the model does something that the step does not"
        )
    return distance
