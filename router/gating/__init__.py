"""The gating rules: how top-k and weights follow from router logits when only some experts are available."""

from router.gating.call import GatingRule, Picks, RouterCall
from router.gating.families import REFUSED, RULES, find_gating_rule

__all__ = ["REFUSED", "RULES", "GatingRule", "Picks", "RouterCall", "find_gating_rule"]
