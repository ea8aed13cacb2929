"""Versions of Python and of libraries against the ranges that the package asks for, and the form of a finding.

Invariant: no library but `packaging` is imported, so that a broken one can be reported.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report: the subject, the state that was found, and a remedy unless the status is ok."""

    subject: str
    status: Status
    found: str
    remedy: str = ""


def examine_versions() -> Iterator[Finding]:
    """The findings of Python and of the libraries that are installed."""
    yield python_finding(importlib.metadata.metadata("deepfew")["Requires-Python"], platform.python_version())
    yield from library_findings(importlib.metadata.requires("deepfew") or [], importlib.metadata.version)


def python_finding(wanted: str, version: str) -> Finding:
    """The finding of Python `version`, of which the package asks for the range `wanted`."""
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding("Python", "ok", version)
    return Finding("Python", "error", f"{version}, wanted {wanted}", f"install Python {wanted}")


def library_findings(requirements: list[str], version_of: Callable[[str], str]) -> Iterator[Finding]:
    """A finding for each library that is missing or out of its range, or one if all are right.

    Args:
        requirements: of the package, as its metadata has them; those of extras are left out.
        version_of: the version of an installed library; raises PackageNotFoundError.
    """
    every = [Requirement(text) for text in requirements]
    wanted = [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = 0
    for requirement in wanted:
        try:
            version = version_of(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            continue
        wrong += 1
        found = f"{version or 'missing'}, wanted {requirement.specifier}"
        yield Finding(requirement.name, "error", found, f"pip install '{requirement.name}{requirement.specifier}'")
    if not wrong:
        yield Finding("libraries", "ok", f"{len(wanted)} in the ranges that deepfew asks for")
