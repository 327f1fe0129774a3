"""The engines of a gallery that the tests run with."""

import pytest

ENGINES = ["embedded", pytest.param("server", marks=pytest.mark.slow)]
