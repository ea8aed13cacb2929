"""The model card of a pruned checkpoint: its source, the experts that were kept, and the cost that is expected of it.

Invariant: every figure is the plan's or the store's; what is not known is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expert_store.adapter import Adapter
from expert_store.manifest import Manifest, format_ids
from extractor.planning.expectation import Expectation
from extractor.planning.plan import Plan

MAX_CARD_BYTES = 2**20


def model_card(
    manifest: Manifest, plan: Plan | None, kept: Sequence[Sequence[int]], top_k: int, adapter: Adapter | None = None
) -> str:
    """README.md of the checkpoint that keeps the experts `kept` of each MoE layer, `top_k` of them for a token."""
    model = manifest.model
    alignment: dict[str, Any] = {"kind": manifest.alignment.kind, **manifest.alignment.statistics}
    if plan is not None:
        alignment = plan.alignment
    licence = _licence(Path(manifest.source.location))
    hub = "@" in manifest.source.location  # a hub's name with a revision, no directory
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [moe, pruned, deepfew]"]
    front += [f"license: {licence}"] * (licence is not None) + [f"base_model: {manifest.source.name}"] * hub
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {manifest.source.name} with {len(kept[0])} of {model.num_experts} experts",
        "",
    ]
    fewer = f" instead of {model.top_k}" * (top_k != model.top_k)
    lines += [
        f"Made by `deepfew export` from {manifest.source.name} (fingerprint `{manifest.source.fingerprint[:16]}`): "
        f"each of the {model.num_layers} MoE layers keeps {len(kept[0])} of {model.num_experts} experts, with their "
        f"rows of the router, and a token takes {top_k} of them{fewer}. " + _trained(manifest, adapter),
        "",
        f"Licence: that of {manifest.source.name}{f', {licence}' * (licence is not None)}.",
        "",
        f"Experts chosen by: {_chosen_by(plan)}; alignment {alignment['kind']}.",
        "",
    ]
    if manifest.made is not None:
        lines += [f"The experts were in {manifest.made.experts_dtype}, and are dequantised here.", ""]
    if adapter is None:  # the plan expects nothing of a changed trunk
        lines += _expected(alignment, len(kept[0]))
    lines += ["## Experts kept", "", "| layer | ids in the source |", "|---|---|"]
    lines += [f"| {spec.model_layer} | {format_ids(ids)} |" for spec, ids in zip(manifest.layers, kept, strict=True)]
    return "\n".join(lines) + "\n"


def _trained(manifest: Manifest, adapter: Adapter | None) -> str:
    experts = ""
    if manifest.trained is not None:
        experts = (
            f" The experts were trained too, on {manifest.trained.tokens:,} tokens, from those of the checkpoint "
            f"`{manifest.trained.fingerprint[:16]}`."
        )
    if adapter is None:
        trunk = "Nothing" if manifest.trained is None else "Nothing but the experts"
        return f"{trunk} was trained: the logits are those of the whole model masked to these experts.{experts}"
    found = [f"{float(share):.4g} of the experts {adapter.told_ratio(share)}" for share in adapter.ratios]
    figures = (
        f" Perplexity on text held out from its training, of the whole model's: {', '.join(found)}." if found else ""
    )
    return (
        "An adapter is merged into the weights: small changes of the trunk, with which the masked model was trained to "
        f"answer as the whole model does.{experts}{figures}"
    )


def _chosen_by(plan: Plan | None) -> str:
    if plan is None:
        return "all that the store has"
    return f"a plan by {plan.extra.get('criterion', 'hand')}"


def _expected(alignment: dict[str, Any], num_kept: int) -> list[str]:
    """A table of what the plan's statistics expect, if they are of as many experts."""
    if alignment.get("num_planned") != num_kept or not alignment.get("expected"):
        return []
    rows = [Expectation.from_json(item) for item in alignment["expected"]]
    lines = [
        "## Expected of it",
        "",
        "| kind of text | router mass kept | perplexity, of the whole model's |",
        "|---|---|---|",
    ]
    for one in rows:
        ratio = "not measured" if one.ratio is None else f"× {one.ratio:.3f}{' or more' * (not one.is_measured)}"
        lines.append(f"| {one.domain} | {one.served_share:.1%} | {ratio} |")
    return [*lines, ""]


def _licence(source: Path) -> str | None:
    """The licence in the front matter of the source's card, if that lies on this machine."""
    card = source / "README.md"
    try:
        if card.stat().st_size > MAX_CARD_BYTES:
            return None
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = front and re.search(r"^license: *([\w.+-]+) *$", front[1], re.MULTILINE)
    return found[1] if found else None
