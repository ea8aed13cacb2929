"""The metrics of several replicas in one text."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.serving.exposition import merge_expositions

ONE = """# HELP deepfew_tokens_total Tokens.
# TYPE deepfew_tokens_total counter
deepfew_tokens_total{kind="prompt"} 3.0
# HELP deepfew_up Up.
# TYPE deepfew_up gauge
deepfew_up 1.0
# HELP deepfew_wait_seconds Wait.
# TYPE deepfew_wait_seconds histogram
deepfew_wait_seconds_bucket{le="1.0"} 2.0
deepfew_wait_seconds_bucket{le="+Inf"} 2.0
deepfew_wait_seconds_count 2.0
deepfew_wait_seconds_sum 0.5
"""


def test_each_family_is_there_once_with_the_samples_of_all() -> None:
    merged = merge_expositions({"all-x": ONE, "all-y": ONE.replace("3.0", "4.0")})
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert list(families) == ["deepfew_tokens", "deepfew_up", "deepfew_wait_seconds"]
    tokens = {sample.labels["replica"]: sample.value for sample in families["deepfew_tokens"].samples}
    assert tokens == {"all-x": 3.0, "all-y": 4.0}
    assert len(families["deepfew_wait_seconds"].samples) == 8
    assert merged.count("# TYPE deepfew_up gauge") == 1


@pytest.mark.parametrize("texts", [{}, {"a": ""}])
def test_nothing_gives_nothing(texts: dict[str, str]) -> None:
    assert merge_expositions(texts).strip() == ""
