"""The encodings of a store's experts, by the names that commands take."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, cast

from expert_store.encoding import RowEncoding
from expert_store.manifest import Manifest
from extractor.errors import CheckpointError, ExtractError

ExpertsDtype = Literal["shipped", "16bit", "fp8", "int8", "int4", "int4-int8", "int4-g64", "mxfp4", "nvfp4"]
"""The experts of a store: the checkpoint's bytes, dequantised to the config's dtype, or made in one of `MADE`."""
TrunkDtype = Literal["shipped", "16bit", "fp8"]
"""The linear layers of a store's trunk: those in FP8 as the checkpoint has them, all dequantised, or all in FP8."""
ENCODINGS = {
    "fp8": RowEncoding("fp8", 128, "F32"),
    "int8": RowEncoding("int8", 128, "F16"),
    "int4": RowEncoding("int4", 32, "F16", zeros="U8"),
    "int4-g64": RowEncoding("int4", 64, "F16", zeros="U8"),
    "mxfp4": RowEncoding("fp4", 32, "F8_E8M0"),
    "nvfp4": RowEncoding("fp4", 16, "F8_E4M3", overall="factor"),
}
"""The encodings that extraction can make, each with its groups where these divide the columns of a matrix."""
MADE = {name: (name, name) for name in ENCODINGS} | {"int4-int8": ("int4", "int8")}
"""The encodings of an expert's first matrix and of its second, `down_proj`. An error of the second reaches the output
as it is, so that its bits count more: docs/selection.md has the figures."""


def is_second(parameter: str) -> bool:
    """Whether a parameter of the experts is their second matrix."""
    return parameter == "down_proj"


def encoding_of(name: str, columns: int) -> RowEncoding:
    """The encoding `name` of `ENCODINGS` for rows of so many columns, in smaller groups if its own do not divide them.

    Raises:
        ExtractError: no group of eight columns or more divides them.
    """
    encoding = ENCODINGS[name]
    fitting = replace(encoding, group=math.gcd(encoding.group, columns))
    try:
        fitting.fields(columns)
    except ValueError as error:
        raise ExtractError(f"{name} cannot hold {error}: take 16bit") from None
    return fitting


def experts_dtype_of(manifest: Manifest) -> ExpertsDtype:
    """The choice that gives the experts of a store again. Raises CheckpointError if a later deepfew made it."""
    if manifest.made is None:
        return "shipped" if any(layer.is_encoded for layer in manifest.layers) else "16bit"
    if manifest.made.experts_dtype not in MADE:
        raise CheckpointError(
            f"the store's experts were made {manifest.made.experts_dtype}, which this program cannot make (it can: "
            f"{', '.join(MADE)}): use the deepfew that made the store"
        )
    return cast("ExpertsDtype", manifest.made.experts_dtype)
