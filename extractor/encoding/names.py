"""The encodings that experts can be made in, by the names that commands take."""

from __future__ import annotations

import math
from dataclasses import replace

from expert_store.encoding import RowEncoding
from extractor.errors import ExtractError

ENCODINGS = {
    "fp8": RowEncoding("fp8", 128, "F32"),
    "int8": RowEncoding("int8", 128, "F16"),
    "int4": RowEncoding("int4", 32, "F16", zeros="U8"),
    "int4-g64": RowEncoding("int4", 64, "F16", zeros="U8"),
    "mxfp4": RowEncoding("fp4", 32, "F8_E8M0"),
    "nvfp4": RowEncoding("fp4", 16, "F8_E4M3", overall="factor"),
}
"""Each with its groups where these divide the columns of a matrix."""


def encoding_of(name: str, columns: int) -> RowEncoding:
    """The encoding `name` for rows of so many columns: groups are smaller where they do not divide the columns.

    Raises:
        ExtractError: no group divides the columns.
    """
    encoding = ENCODINGS[name]
    group = math.gcd(encoding.group, columns)
    try:
        fitting = replace(encoding, group=group)
        fitting.fields(columns)
    except ValueError as error:
        raise ExtractError(str(error)) from None
    return fitting
