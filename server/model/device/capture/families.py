"""The few parts of a family that neither its modules nor its config show.

Invariant: a record only says what a forward does; the proof at start compares it with the forward.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FamilyParts:
    """Attributes:
    unrotated: the type of the layers (in the config's `layer_types`) that do not rotate queries and keys, where the
        config has a sliding window; empty: all do.
    """

    unrotated: str = ""


_FAMILIES = {
    "exaone_moe": FamilyParts(unrotated="full_attention"),
    "flint": FamilyParts(unrotated="full_attention"),
}


def family_parts(model_type: str) -> FamilyParts:
    """The record of a family; that of most is empty."""
    return _FAMILIES.get(model_type, FamilyParts())
