from __future__ import annotations

import pytest

from run_fakes import Made, make_run


@pytest.fixture
def made(tmp_path) -> Made:
    return make_run(tmp_path)
