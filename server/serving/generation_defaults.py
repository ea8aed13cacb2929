"""Defaults of sampling parameters from the checkpoint's generation_config.json, as transformers and vLLM use them.

Invariant: the engine accepts every value. Only values in the file count, not transformers' own defaults.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from server.engine.request import InvalidRequestError, SamplingParams
from server.errors import SettingsError

NAMES = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "max_new_tokens")


def read_generation_defaults(trunk_path: Path) -> dict[str, Any]:
    """The file's values by the names of `SamplingParams`; empty where there is no file.

    Raises:
        SettingsError: the file is no JSON object, or a value is none that the engine takes.
    """
    path = trunk_path / "generation_config.json"
    remedy = (
        "serve with --no-use-generation-config, or correct the checkpoint's file and extract into an empty directory"
    )
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{path} is not JSON: {remedy}") from error
    if not isinstance(config, dict):
        raise SettingsError(f"{path} is not a JSON object: {remedy}")
    found = {name: config[name] for name in NAMES if config.get(name) is not None}
    for name, value in found.items():
        is_count = name in ("top_k", "max_new_tokens")
        if isinstance(value, bool) or not isinstance(value, int if is_count else (int, float)):
            raise SettingsError(
                f"{path}: {name} is {value!r}, wanted {'an integer' if is_count else 'a number'}: {remedy}"
            )
    if found.get("top_k") == 0:  # transformers' word for none
        del found["top_k"]
    checked = {name: value for name, value in found.items() if (name, value) != ("temperature", 0)}
    try:
        SamplingParams(**checked)
    except InvalidRequestError as error:
        raise SettingsError(f"{path}: {error}: {remedy}") from error
    return {**found, "do_sample": config.get("do_sample") is True}
