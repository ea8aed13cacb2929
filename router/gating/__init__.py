"""The gating rules: how top-k and weights follow from router logits when only some experts are available."""

from router.gating.families import UnsupportedGatingError, find_gating_rule
from router.gating.rules import GatingRule

__all__ = ["GatingRule", "UnsupportedGatingError", "find_gating_rule"]
