"""The version of the installed package."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """The version; 0+unknown where the code runs without being installed."""
    try:
        return version("deepfew")
    except PackageNotFoundError:
        return "0+unknown"
