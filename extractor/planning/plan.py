"""The plan file: the deep experts to extract, best first, with the expert of every layer.

    {"format": "deepfew-plan", "version": 1, "alignment": {"kind": "profile", …}, "num_layers": L, "num_experts": E,
     "deep_experts": [{"experts": [id of layer 0, …], "score": …}, …], …}

Invariant of a `Plan`: every deep expert has one existing expert of every layer, and no expert is in two deep experts.
Unknown keys are kept in `extra` and written back; an unknown version is refused. A plan with a `fingerprint` is valid
for that checkpoint alone.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from expert_store.files import replacing
from extractor.encoding.names import ExpertsDtype
from extractor.errors import SelectionError

FORMAT = "deepfew-plan"
VERSION = 1
MAX_PLAN_BYTES = 256 * 2**20


@dataclass(frozen=True)
class PlannedExpert:
    """One deep expert of a plan: `experts[layer]`, its score if there is one, and unknown keys."""

    experts: tuple[int, ...]
    score: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The content of a plan file. `alignment` has at least the key "kind"; `deep_experts` are best first.

    Raises SelectionError when two deep experts share an expert of a layer.
    """

    num_layers: int
    num_experts: int
    alignment: dict[str, Any]
    deep_experts: tuple[PlannedExpert, ...]
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_distinct([deep.experts for deep in self.deep_experts])

    @property
    def experts_dtype(self) -> ExpertsDtype | None:
        """The encoding that the plan chose for its experts; None if it chose none."""
        named: ExpertsDtype | None = self.extra.get("experts_dtype")
        return named


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read and check a plan file. Raises SelectionError, naming the file and what is wrong."""
    try:
        size = Path(path).stat().st_size
        if size > MAX_PLAN_BYTES:
            raise SelectionError(f"{path} has {size} bytes, more than a plan can have; name a plan file")
        document = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise SelectionError(f"{path} cannot be read: {error.strerror}; name a plan file") from error
    except (ValueError, RecursionError) as error:
        raise SelectionError(f"{path} is not JSON ({error}); name a plan file") from None
    try:
        return parse_plan(document)
    except SelectionError as error:
        raise SelectionError(f"{path}: {error}; make the plan again") from None


def write_plan(path: str | os.PathLike[str], plan: Plan) -> None:
    """Write `plan`, replacing the file as a whole; its folder is made.

    Raises SelectionError, writing nothing, for an impossible plan; OSError.
    """
    document = plan_document(plan)
    parse_plan(document)
    head = ",\n ".join(
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items() if key != "deep_experts"
    )
    lines = ",\n  ".join(json.dumps(deep) for deep in document["deep_experts"])
    with replacing(Path(path)) as file:
        file.write(f'{{\n {head},\n "deep_experts": [\n  {lines}\n ]\n}}\n'.encode())


def plan_document(plan: Plan) -> dict[str, Any]:
    """`plan` as the JSON object of its file."""
    deep_experts = []
    for deep in plan.deep_experts:
        item: dict[str, Any] = {"experts": list(deep.experts)}
        if deep.score is not None:
            item["score"] = deep.score
        deep_experts.append(item | deep.extra)
    return {
        "format": FORMAT,
        "version": VERSION,
        "alignment": plan.alignment,
        "num_layers": plan.num_layers,
        "num_experts": plan.num_experts,
        **plan.extra,
        "deep_experts": deep_experts,
    }


def parse_plan(document: Any) -> Plan:
    """The plan in a parsed JSON document, checked. Raises SelectionError."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise SelectionError(f'it is no plan: wanted an object with "format": "{FORMAT}"')
    if document.get("version") != VERSION:
        raise SelectionError(f"its version is {document.get('version')!r}, this program reads version {VERSION}")
    alignment = document.get("alignment")
    if not isinstance(alignment, dict) or not isinstance(alignment.get("kind"), str):
        raise SelectionError('alignment is missing, wanted an object with a "kind"')
    num_layers, num_experts = (_positive(document, key) for key in ("num_layers", "num_experts"))
    items = document.get("deep_experts")
    if not isinstance(items, list) or not items:
        raise SelectionError("deep_experts is missing or empty, wanted a list of at least one")
    deep_experts = tuple(_planned(item, position, num_layers, num_experts) for position, item in enumerate(items))
    known = {"format", "version", "alignment", "num_layers", "num_experts", "deep_experts"}
    extra = {key: value for key, value in document.items() if key not in known}
    if extra.get("experts_dtype") not in (None, *get_args(ExpertsDtype)):
        raise SelectionError(
            f"experts_dtype is {extra['experts_dtype']!r}, wanted one of {', '.join(get_args(ExpertsDtype))}"
        )
    return Plan(num_layers, num_experts, alignment, deep_experts, extra)


def check_distinct(deep_experts: list[tuple[int, ...]]) -> None:
    """Raise SelectionError when two deep experts share an expert of a layer."""
    seen: dict[tuple[int, int], int] = {}
    for position, experts in enumerate(deep_experts):
        for layer, expert in enumerate(experts):
            other = seen.setdefault((layer, expert), position)
            if other != position:
                raise SelectionError(f"deep experts {other} and {position} both have expert {expert} of layer {layer}")


def _planned(item: Any, position: int, num_layers: int, num_experts: int) -> PlannedExpert:
    where = f"deep_experts[{position}]"
    experts = item.get("experts") if isinstance(item, dict) else None
    if not isinstance(experts, list) or len(experts) != num_layers:
        raise SelectionError(f"{where}.experts wants one expert id for each of the {num_layers} layers")
    for layer, expert in enumerate(experts):
        if type(expert) is not int or not 0 <= expert < num_experts:
            raise SelectionError(f"{where}.experts[{layer}] is {expert!r}, wanted an id from 0 to {num_experts - 1}")
    score = item.get("score")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
        raise SelectionError(f"{where}.score is {score!r}, wanted a number")
    extra = {key: value for key, value in item.items() if key not in ("experts", "score")}
    return PlannedExpert(tuple(experts), score, extra)


def _positive(document: dict[str, Any], key: str) -> int:
    value = document.get(key)
    if type(value) is not int or value < 1:
        raise SelectionError(f"{key} is {value!r}, wanted a positive number")
    return value
