"""The constants that tell the kernels of experts how spans and their rows lie in memory."""

from __future__ import annotations

from typing import Any

import torch

from expert_store.encoding import CODE_BITS, RowEncoding
from server.model.device.kernels import packed
from server.model.device.step.parts import ExpertKind
from server.model.device.step.tuning import divisor

_BIASES = {None: "", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_CODES = {"int4": packed.INT4, "int8": packed.INT8, "fp4": packed.FP4, "fp8": packed.FP8}


def codes_a_word(encoding: RowEncoding) -> int:
    """Codes in a word of four bytes, V."""
    return 32 // CODE_BITS[encoding.codes]


def row_constants(encoding: RowEncoding, columns: int) -> dict[str, Any]:
    """Constants of `kernels.packed` for rows of `columns` values: lengths in words, places in bytes."""
    fields, per_word = encoding.fields(columns), codes_a_word(encoding)
    return {
        "V": per_word,
        "RW": encoding.row_bytes(columns) // 4,
        "QW": divisor(encoding.group // per_word, 4),
        "GW": encoding.group // per_word,
        "CODES": _CODES[encoding.codes].value,
        "SCALES": encoding.scales,
        "S_AT": fields["scales"][0],
        "ZEROS": encoding.zeros or "",
        "Z_AT": fields.get("zeros", (0, 0))[0],
        "OVERALL": (None, "factor", "divisor").index(encoding.overall),
        "O_AT": fields.get("overall", (0, 0))[0],
    }


def expert_constants(kind: ExpertKind, *, packed: bool) -> dict[str, Any]:
    """Constants of the experts' first products, plain or packed; BIAS is one of their second ones too."""
    bias = _BIASES[kind.bias] if packed else kind.bias is not None
    return {"ALTERNATES": kind.alternates, "BIAS": bias, "GATE": kind.gate.constants}


def plane_constants(packed: tuple[RowEncoding, RowEncoding] | None) -> dict[str, int]:
    """Constants of `kernels.routing.route`: the planes that it writes for gate_up, one for none."""
    if packed is None:
        return {"PLANES": 1, "PLANE_CODES": 0}
    return {"PLANES": codes_a_word(packed[0]), "PLANE_CODES": _CODES[packed[0].codes].value}
