"""The engines of a gallery that the tests run with."""

import pytest

# A machine runs one server, so all its tests belong to one process of the test runner.
SERVER_MARKS = [pytest.mark.slow, pytest.mark.xdist_group("milvus")]
ENGINES = ["embedded", pytest.param("server", marks=SERVER_MARKS)]
