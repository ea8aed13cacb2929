"""The gating rules: how top-k and weights follow from router logits when only some experts are available."""

from router.gating.families import REFUSED, RULES, UnsupportedGatingError, find_gating_rule
from router.gating.rules import GatingRule, Picks

__all__ = ["REFUSED", "RULES", "GatingRule", "Picks", "UnsupportedGatingError", "find_gating_rule"]
