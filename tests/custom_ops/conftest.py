"""What several of these tests make once."""

from __future__ import annotations

import pytest

from tests.tensorrt_harness import Harness, build_harness


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    """The compiled plugins, and what calls them as TensorRT does."""
    return build_harness(tmp_path_factory.mktemp("harness"))
