"""The checkpoint's generation config as defaults of requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from extractor.checkpoint.checkpoint import checkpoint_name
from server.errors import SettingsError
from server.serving.generation_defaults import read_generation_defaults


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"eos_token_id": [0, 4]}, {"do_sample": False}),
        (
            {
                "do_sample": True,
                "temperature": 0.6,
                "top_k": 20,
                "top_p": 0.95,
                "min_p": 0.0,
                "transformers_version": "5",
            },
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0},
        ),
        ({"top_k": 0, "typical_p": 1.0, "temperature": None}, {"typical_p": 1.0, "do_sample": False}),
        ({"temperature": 0.0, "max_new_tokens": 7}, {"temperature": 0.0, "max_new_tokens": 7, "do_sample": False}),
    ],
)
def test_only_what_stands_in_the_file_counts(tmp_path: Path, config: dict[str, Any], found: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert read_generation_defaults(tmp_path) == found


def test_without_a_file_there_are_no_defaults(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"temperature": "1"}', "temperature is '1', wanted a number"),
        ('{"top_k": 2.5}', "top_k is 2.5, wanted an integer"),
        ('{"temperature": -1}', "temperature is -1"),
        ('{"top_p": NaN}', "top_p is nan"),
        ('{"max_new_tokens": 0}', "max_new_tokens is 0"),
    ],
)
def test_a_value_that_the_engine_does_not_take_is_refused_with_what_to_do(
    tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(SettingsError, match=r"--no-use-generation-config") as refusal:
        read_generation_defaults(tmp_path)
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("/c/models--Qwen--Qwen3-30B-A3B/snapshots/" + "0a" * 20, "Qwen/Qwen3-30B-A3B"),
        ("/c/models--gpt2/snapshots/main/", "gpt2"),
        ("/c/snapshots/" + "0a" * 20, "folder"),
        ("/c/models--a--b/other", "folder"),
        ("https://example.org/x", "folder"),
    ],
)
def test_a_snapshot_of_the_hub_has_the_hubs_name(location: str, name: str) -> None:
    assert checkpoint_name(location, "folder") == name
