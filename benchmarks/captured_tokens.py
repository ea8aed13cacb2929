"""Holds greedy tokens of captured families against stock transformers in float32, on a CPU.

Metric in words: a tiny random model of the family generates tokens greedily in stock transformers, with its own cache.
The captured step, in Triton's interpreter with half of the experts in slots, reads the same tokens one by one in one
row. At each of their places its most likely token must be the next one of stock. *Ties* are places at which it is
another one, whose logit in stock is at most 1e-4 below the best: rounding decides these. *Difference* is the largest
one of two logits, *deviation* the standard deviation of stock's logits, *distinct* the number of different tokens. A
model has one layer if its layers are alike, else two.

    python -m benchmarks.captured_tokens --tokens 256 --save

With --save the result is written after each family, and a family that it has with as many tokens is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch import Tensor

from benchmarks.harness.reporting import RESULTS, environment, finish, table, write_result
from server.model.device.capture.modules import moe_blocks, text_body
from tests.families.checkpoints import is_installed
from tests.families.composites import TEXT_PARTS
from tests.server.model.device.captured import TUNING, build, run
from tests.server.model.device.families import CAPTURED, model_of

NAME = "captured_tokens"
PROMPT_TOKENS = 4
BLOCK_TOKENS = 32
TIE = 1e-4
TILES = replace(
    TUNING, attention_tile=BLOCK_TOKENS, latent_tile=BLOCK_TOKENS, latent_splits=2, latent_rows=64, latent_columns=64,
    output_rows=64, head_rows=1024, gate_rows=8, up_rows=64, down_rows=64, down_columns=64, delta_values=16,
    copy_elements=4096, fetchers=1,
)  # fmt: skip
"""Few programs a kernel, since the interpreter runs them one after the other; rows are still split in two."""


def families() -> list[str]:
    """The captured families that the installed transformers has; of several models of one the first."""
    first = {captured.family or name: name for name, captured in reversed(CAPTURED.items()) if captured.is_whole}
    return [first[family] for family in sorted(first) if family in TEXT_PARTS or is_installed(family)]


def shortened(model: Any) -> Any:
    """The model with its first layer alone, if all layers have the same modules and the same type."""
    body, config = text_body(model), model.config.get_text_config()
    types = getattr(config, "layer_types", None) or [""] * len(body.layers)
    kinds = {(kind, str(layer)) for kind, layer in zip(types, body.layers, strict=True)}
    if len(kinds) > 1 or len(set(getattr(config, "num_attention_heads_per_layer", None) or [0])) > 1:
        return model
    body.layers = body.layers[:1]
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = types[:1]
    return model


@torch.no_grad()
def stock_tokens(model: Any, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], Tensor]:
    """The prompt and the greedy tokens after it, and the logits [num_tokens, V] that they are the best of."""
    tokens, logits, past = list(prompt), [], None
    given = torch.tensor([tokens])
    for _ in range(num_tokens):
        output = model(input_ids=given, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits.append(output.logits[0, -1])
        tokens.append(int(logits[-1].argmax()))
        given = torch.tensor([tokens[-1:]])
    return tokens, torch.stack(logits)


def held(name: str, num_tokens: int) -> dict[str, Any]:
    """The table's row of a family."""
    model = shortened(model_of(name))
    model.set_experts_implementation("eager")
    vocab, slots = model.get_output_embeddings().out_features, len(moe_blocks(model)[0][1].experts.down_proj) // 2
    prompt = torch.randint(3, vocab, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens, wanted = stock_tokens(model, prompt, num_tokens)
    sizes = {"max_tokens": PROMPT_TOKENS + num_tokens, "block_tokens": BLOCK_TOKENS, "tuning": TILES}
    step = build(model, torch.float32, batch=1, slots=slots, **sizes)
    got = run(step, torch.tensor(tokens[:-1])[:, None], [0])[0][PROMPT_TOKENS - 1 :, 0]
    step.pages.check_integrity(contents=True)
    best = got.argmax(dim=-1)
    below = wanted.amax(dim=-1) - wanted.gather(-1, best[:, None])[:, 0]
    another = best != wanted.argmax(dim=-1)
    return {
        "family": name,
        "layers": step.shape.num_layers,
        "slots": slots,
        "experts": step.shape.num_experts,
        "distinct": len(set(tokens[PROMPT_TOKENS:])),
        "equal": int((~another).sum()),
        "ties": int((another & (below <= TIE)).sum()),
        "difference": float((got - wanted).abs().max()),
        "deviation": float(wanted.std()),
        "commit": environment()["commit"],
    }


def kept_rows(num_tokens: int) -> list[dict[str, Any]]:
    """The rows of the saved result, if it is of as many tokens."""
    path = RESULTS / f"{NAME}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"tokens": 0}
    return list(kept["rows"]) if kept["tokens"] == num_tokens else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="of tests/server/model/device/families.py; all")
    parser.add_argument("--tokens", type=int, default=256, help="greedy tokens of each family")
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{NAME}.json")
    arguments = parser.parse_args()
    rows = kept_rows(arguments.tokens) if arguments.save else []
    result = {"environment": environment(), "tokens": arguments.tokens, "rows": rows}
    for name in arguments.families or families():
        if name not in [row["family"] for row in rows]:
            rows.append(held(name, arguments.tokens))
            print(rows[-1], flush=True)
            if arguments.save:
                write_result(NAME, result)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    finish(NAME, result, save=arguments.save)
    return 0 if all(row["equal"] + row["ties"] == arguments.tokens for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
