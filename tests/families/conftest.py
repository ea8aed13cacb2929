"""The release of transformers goes into the test results, from which docs/families.md is written."""

from collections.abc import Callable

import pytest
import transformers


@pytest.fixture(scope="session", autouse=True)
def release(record_testsuite_property: Callable[[str, object], None]) -> None:
    """Say in the results which release they are of."""
    record_testsuite_property("transformers", transformers.__version__)
