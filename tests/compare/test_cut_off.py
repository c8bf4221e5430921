"""A run that was cut off before its first sample is named, with what continues it."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.errors import StoreError
from foveate.study.compare import compare_runs
from run_fakes import make_run


def test_comparing_a_run_without_samples(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole, empty = make_run(tmp_path / "a").run, make_run(tmp_path / "b", fill=False).run
    with pytest.raises(StoreError, match="no captured sample of 5") as caught:
        compare_runs(whole, empty)
    assert "continues" in caught.value.remedy
