"""Greedy tokens and their logits: from a runner, and from stock transformers."""

import torch
from torch import Tensor, nn

from router.mask import ExpertMask
from server.model.runner import RowStep, Runner


def greedy(runner: Runner, ids: list[int], count: int, mask: ExpertMask | None = None) -> tuple[list[int], Tensor]:
    """Token ids, and the logits [count, V] that each was chosen from."""
    row = runner.allocate()
    logits = [runner.prefill(row, ids, mask=mask).logits[-1]]
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < count:
        logits.append(runner.decode([RowStep(row, tokens[-1], mask=mask)]).logits[0])
        tokens.append(int(logits[-1].argmax()))
    runner.free(row)
    return tokens, torch.stack(logits)


@torch.inference_mode()
def stock_greedy(model: nn.Module, ids: list[int], count: int) -> tuple[list[int], Tensor]:
    out = model.generate(
        torch.tensor([ids]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits).float()
