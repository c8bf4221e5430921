"""Tables of a run: exactly the study's columns and numbers, provenance, and no impossible table."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from foveate.data.export import ImpossibleTableError, study_table, wide_table, write_table
from foveate.data.export_rows import select
from foveate.data.run import Run
from foveate.errors import UsageError
from foveate.metrics.audit.check import audit_file
from foveate.metrics.declare import foveate_metrics
from foveate.study.capture import run_capture
from foveate.study.plan import build_plan
from foveate.testing.tiny import TinyConfig, TinySource

EVERY = [spec.create() for spec in foveate_metrics()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six images with countries, one of them broken; all rows, float32, 6 x 6 patches."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    lines = ["path,country,camera"]
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (50, 60, 3), dtype=np.uint8)).save(folder / f"im{i}.png")
        lines.append(f"im{i}.png,{'FR' if i % 2 else 'AU'},cam{i}")
    (folder / "im4.png").write_bytes(b"broken")
    (folder / "manifest.csv").write_text("\n".join(lines))
    source = TinySource(TinyConfig(image=48))
    plan = build_plan(source, rows="all", dtype="float32")
    run_capture(source, folder / "manifest.csv", folder / "run.zarr", plan=plan)
    return Run.open(folder / "run.zarr")


def seed_statistics(cls_attn: np.ndarray) -> list[float]:
    """The study's code on one row."""
    norm = cls_attn / (cls_attn.sum() + 1e-8)
    ordered = np.sort(norm)[::-1]
    return [
        -(norm * np.log(norm + 1e-10)).sum(),
        cls_attn.max(),
        ordered[: int(len(ordered) * 0.1)].sum(),
        ordered[: int(len(ordered) * 0.25)].sum(),
        (cls_attn > cls_attn.mean()).sum(),
        cls_attn.std(),
    ]


def test_the_studys_csv(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "stats.csv"
    sidecar = write_table(run, study_table(run, select(run)), path)
    assert path.read_text().splitlines()[0] == (
        "image_id,country,attention_entropy,attention_max,attention_concentration_top10,"
        "attention_concentration_top25,num_high_attention_patches,attention_spread"
    )
    frame = pd.read_csv(path)
    assert frame["image_id"].tolist() == [f"im{i}.png" for i in (0, 1, 2, 3, 5)]
    assert frame["country"].tolist() == ["AU", "FR", "AU", "FR", "FR"]
    attention = run.site(run.site_ids[0])["attention"]
    for row, position in enumerate(run.ok):
        cls_attn = attention[position, -1].values.astype(np.float64).mean(0)[0, 1:]
        np.testing.assert_allclose(frame.iloc[row, 2:].astype(float), seed_statistics(cls_attn), rtol=1e-5)
    assert frame["num_high_attention_patches"].dtype == np.int64
    told = json.loads(sidecar.read_text())
    assert (told["K"], told["grid"], told["images"], told["left_out"]) == (36, [6, 6], 5, 1)
    assert told["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert told["model"]["id"] == "tiny"
    assert told["layer"] == int(attention["layer"][-1])
    assert "mean" in told["head"]
    assert set(told["definitions"]) == set(frame.columns[2:])
    (audited,) = audit_file(path)
    assert (audited.stated, audited.possible) == (36, True)


def test_another_layer_and_head(run: Run) -> None:
    attention = run.site(run.site_ids[0])["attention"]
    first = int(attention["layer"][0])
    table = study_table(run, select(run, layer=first, head=1))
    row = attention[0, 0, 1, 0, 1:].values.astype(np.float64)
    np.testing.assert_allclose(table.frame.iloc[0, 2:].astype(float), seed_statistics(row), rtol=1e-5)
    by_position = study_table(run, select(run, layer=-2, head=1, query=0))
    pd.testing.assert_frame_equal(table.frame, by_position.frame)


def test_wide_table_csv_and_parquet(run: Run, tmp_path: Path) -> None:
    table = wide_table(run, select(run), EVERY)
    write_table(run, table, tmp_path / "wide.parquet")
    write_table(run, table, tmp_path / "wide.csv")
    frame = pd.read_parquet(tmp_path / "wide.parquet")
    assert {"image_id", "country", "camera", "confidence", "K", "entropy_normalised", "head_diversity"} <= set(
        frame
    )
    assert not set(frame) & {"attention_entropy", "received_mass", "attention_distance"}
    row = run.site(run.site_ids[0])["attention"][0, -1].values.astype(np.float64).mean(0)[0]
    assert frame["prefix_mass"][0] == pytest.approx(row[0], rel=1e-5)
    p = row[1:] / row[1:].sum()
    assert frame["entropy_normalised"][0] == pytest.approx(-(p * np.log(p)).sum() / np.log(36), rel=1e-5)
    csv = pd.read_csv(tmp_path / "wide.csv")
    np.testing.assert_allclose(csv["gini"], frame["gini"], rtol=1e-8)


def test_a_row_that_is_not_there(run: Run) -> None:
    with pytest.raises(UsageError, match="no layer 9"):
        select(run, layer=9)
    with pytest.raises(UsageError, match="no head 7"):
        select(run, head=7)
    with pytest.raises(UsageError, match="no query 99"):
        select(run, query=99)
    with pytest.raises(UsageError, match="no site"):
        select(run, site="nowhere")


def test_an_impossible_table_is_not_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = study_table(run, select(run))
    table.frame.loc[2, "attention_entropy"] = 9.0
    with pytest.raises(ImpossibleTableError, match="im2") as caught:
        write_table(run, table, tmp_path / "stats.csv")
    assert caught.value.exit_code == 6
    assert not list(tmp_path.iterdir())


def test_other_suffixes(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.csv or \.parquet"):
        write_table(run, study_table(run, select(run)), tmp_path / "stats.xlsx")
    assert not list(tmp_path.iterdir())
