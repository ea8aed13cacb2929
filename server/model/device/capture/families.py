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
    neighbours: an element of a head is rotated with the one beside it.
    norms_rotated: queries and keys are normalised after they were rotated.
    softplus: the output gate of attention is a softplus, not a sigmoid.
    """

    unrotated: str = ""
    neighbours: bool = False
    norms_rotated: bool = False
    softplus: bool = False


_FAMILIES = {
    "afmoe": FamilyParts(unrotated="full_attention"),
    "bailing_hybrid": FamilyParts(neighbours=True),
    "cohere2_moe": FamilyParts(unrotated="full_attention", neighbours=True),
    "ernie4_5_moe": FamilyParts(neighbours=True),
    "exaone_moe": FamilyParts(unrotated="full_attention"),
    "flint": FamilyParts(unrotated="full_attention"),
    "hunyuan_v1_moe": FamilyParts(norms_rotated=True),
    "kolibri1": FamilyParts(unrotated="full_attention"),
    "laguna": FamilyParts(softplus=True),
}


def family_parts(model_type: str) -> FamilyParts:
    """The record of a family; that of most is empty."""
    return _FAMILIES.get(model_type, FamilyParts())
