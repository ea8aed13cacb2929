"""The gating rules: they compute top-k and weights from router logits when only some experts are available."""

from router.gating.call import GatingRule, Picks, RouterCall
from router.gating.families import RULES, find_gating_rule

__all__ = ["RULES", "GatingRule", "Picks", "RouterCall", "find_gating_rule"]
