"""Cache-aware routing on the bundled checkpoint: misses saved, and what they cost, for several strengths of the bias.

A text is read token by token by stock transformers in float32 while each layer's least recently used cache is
followed by hand. The rule is that of the device's router (`--resident-bias`, Cache-Prior, arXiv 2412.00099): λ · Δ is
added to the logits of resident experts for the choice alone, Δ being the running range of the layer's logits; weights
come from the logits as they are.

- *hit rate*: picks that were in a slot, of all picks. *deficit*: router mass of the unbiased choice that was not
  served.
- *perplexity ratio*: perplexity of the text over that without the bias.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.harness.reporting import REPOSITORY, environment, finish, table

STRENGTHS = (0.0, 0.05, 0.1, 0.2, 0.4)


class BiasedRouter:
    """A gate's forward hook: biases the choice towards the layer's resident experts, and follows its cache."""

    def __init__(self, num_experts: int, num_slots: int, strength: float) -> None:
        self.strength, self.num_slots = strength, num_slots
        self.recent = list(range(num_slots))  # resident experts, least recently used first
        self.spread = 0.0
        self.hits = self.picks = 0
        self.demanded = self.missed = 0.0
        self.num_experts = num_experts

    def __call__(self, module: Any, inputs: Any, output: Any) -> Any:
        logits, weights, index = output
        resident = torch.zeros(self.num_experts)
        resident[self.recent] = 1.0
        spread = float(logits.max() - logits.min())
        self.spread = 0.9 * self.spread + 0.1 * spread if self.spread else spread
        chosen = (logits + self.strength * self.spread * resident).topk(index.shape[-1], dim=-1).indices
        mass = logits.gather(-1, chosen).softmax(-1)
        served = set(chosen[0].tolist())
        self.demanded += float(weights.sum())
        self.missed += sum(float(w) for w, e in zip(weights[0], index[0].tolist(), strict=True) if e not in served)
        self.hits += len(served & set(self.recent))
        self.picks += len(served)
        self.recent = [expert for expert in self.recent if expert not in served] + sorted(served)
        self.recent = self.recent[-self.num_slots :]
        return logits, mass.to(weights.dtype), chosen


@torch.inference_mode()
def read(model: Any, ids: torch.Tensor, num_slots: int, strength: float) -> dict[str, float]:
    """Hit rate, deficit and mean negative log-likelihood of `ids` [T], one token at a time."""
    routers = [BiasedRouter(model.config.num_experts, num_slots, strength) for _ in model.model.layers]
    hooks = [
        layer.mlp.gate.register_forward_hook(router) for layer, router in zip(model.model.layers, routers, strict=True)
    ]
    loss, cache = 0.0, None
    for at in range(len(ids) - 1):
        result = model(ids[None, at : at + 1], past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        loss -= float(result.logits[0, -1].log_softmax(-1)[ids[at + 1]])
    for hook in hooks:
        hook.remove()
    return {
        "hit_rate": sum(router.hits for router in routers) / sum(router.picks for router in routers),
        "deficit": sum(router.missed for router in routers) / sum(router.demanded for router in routers),
        "loss": loss / (len(ids) - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=REPOSITORY / "models" / "tiny-moe")
    parser.add_argument("--text", type=Path, default=REPOSITORY / "docs" / "architecture.md")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/resident_bias.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    ids = tokenizer(arguments.text.read_text(), return_tensors="pt")["input_ids"][0, : arguments.tokens]
    rows = []
    for num_slots in (model.config.num_experts // 4, model.config.num_experts // 2):
        plain = 0.0
        for strength in STRENGTHS:
            figures = read(model, ids, num_slots, strength)
            plain = plain or figures["loss"]
            ratio = math.exp(figures["loss"] - plain)
            rows.append({"slots": num_slots, "bias": strength, **figures, "perplexity_ratio": ratio})
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    result = {"environment": environment(), "text": arguments.text.name, "tokens": len(ids), "rows": rows}
    finish("resident_bias", result, save=arguments.save)


if __name__ == "__main__":
    main()
