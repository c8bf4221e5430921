"""The harness runs end to end on a toy tower and its table can be read; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory needs Linux's /proc"
)


def python(*arguments: str) -> str:
    """Standard output of ``python -m`` in the checkout's root."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(page: str) -> dict[str, list[str]]:
    """First cell of each table row -> the others."""
    lines = (line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| "))
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


@pytest.mark.slow
def test_table_of_a_tiny_tower(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    page = python("benchmarks.engine", "--tiny", "--skip", "memory", "peers", "--out", str(out))
    found = rows(page)
    assert out.read_text() == page.removesuffix("\n")
    for method in ("plain", "rows", "rollout", "legrad", "eager rollout", "eager relevance"):
        ratio, least = found[method][1].split(" ")
        assert float(ratio) > 0, method
        assert float(least.strip("()")) > 0, method
    assert float(found["rows"][2]) > 0  # foveate's own share
    assert float(found["peakedness"][0]) < 0.6  # median row entropy over ln K: not uniform
    assert float(found["rows: float64 softmax of the same q and k"][0]) < 1e-6
    for oracle in ("rows: a separate eager run", "relevance: eager autograd", "LeGrad: eager autograd"):
        assert float(found[oracle][0]) < 1e-5, oracle
    kept = json.loads(out.with_suffix(".json").read_text())
    assert len(kept["tiny-32x2"]["time"]["seconds"]["rows"]) == 2


@pytest.mark.slow
def test_memory_of_eager_grows_with_its_matrices() -> None:
    """At 1025 tokens the matrices of two layers and two heads are 17 MB; one row of each is nothing."""
    row, eager = (
        json.loads(python("benchmarks.workers", "memory", "tiny-256", name))["megabytes"]
        for name in ("rows", "eager attentions")
    )
    assert eager > row + 10


def test_eager_that_does_not_fit_is_skipped_with_its_size() -> None:
    page = python("benchmarks.engine", "--case", "l14-1022x1", "--limit", "20")
    assert "eager attentions: skipped, needs 46 GB of attention matrices." in page


@pytest.mark.parametrize(
    ("seconds", "megabytes", "said"), [(1.02, 310, "met"), (1.04, 310, "missed"), (1.02, 340, "missed")]
)
def test_limits_are_judged(seconds: float, megabytes: float, said: str) -> None:
    """The median of the rounds' ratios counts, not the ratio of the means: one slow round changes nothing."""
    from benchmarks.report import table

    case = {
        "time": {"seconds": {"plain": [1.0, 1.0, 2.0], "rows": [seconds, 3.0, 2 * seconds]}, "load": 1.0},
        "memory": {"plain": {"megabytes": 300.0}, "rows": {"megabytes": megabytes}},
        "skipped": {},
    }
    page = table({"date": "today", "machine": {}, "l14-336x8": case})
    limits = page.split("## l14")[0]
    assert rows(limits)["l14-336x8"] == ["rows", f"{seconds:.3f}", "1.03", f"{megabytes:.0f}", "330", said]
