"""The metrics of several replicas in one text, told apart by a label.

Invariant: each family is there once, with the samples of all replicas below its help and its type, as Prometheus wants.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

LABEL = "replica"
_SAMPLE = re.compile(r"([^\s{]+)(\{)?(.*)")


def merge_expositions(texts: Mapping[str, str]) -> str:
    """One exposition of those of several replicas.

    Args:
        texts: exposition of each replica, by its name, which is the value of the label `replica`.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for name, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                head = heads.setdefault(family, [])
                if line not in head:
                    head.append(line)
            elif line:
                samples.setdefault(family, []).append(_labelled(line, name))
    lines = [line for family, head in heads.items() for line in (*head, *samples.get(family, ()))]
    return "\n".join([*lines, ""])


def _labelled(sample: str, replica: str) -> str:
    found = _SAMPLE.fullmatch(sample)
    assert found is not None
    metric, has_labels, rest = found.groups()
    label = f'{LABEL}="{replica}"'
    return f"{metric}{{{label},{rest}" if has_labels else f"{metric}{{{label}}}{rest}"
