"""The audit: possible tables always pass, the study's own fails for the known reasons, planted errors fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import UsageError
from foveate.metrics import study
from foveate.metrics.audit.check import audit, audit_file
from foveate.metrics.audit.tables import SummaryTable, read_document, read_tables

SEED = Path(__file__).parents[4] / "shared" / "seeds" / "002_c9f96c88e4343cc6.txt"

PUBLISHED = """
Mean = **95.2 patches** out of 256 total (37%)

| Metric                       | Mean  | Std  | Min  | Max  |
|------------------------------|-------|------|------|------|
| Attention Entropy            | 4.53  | 0.31 | 3.12 | 5.89 |
| Top-10% Concentration        | 66.6% | 8.2% | 42%  | 88%  |
| High Attention Patches       | 95.2  | 18.7 | 38   | 156  |
| Attention Spread (Std Dev)   | 0.041 | 0.009| 0.018| 0.076|
"""


def maps(seed: int, images: int, K: int) -> np.ndarray:
    """Random raw attention rows over patches, (image, key) float32, from nearly uniform to one key."""
    rng = np.random.default_rng(seed)
    width = rng.uniform(0, 6, size=(images, 1))
    logits = width * (rng.standard_normal((images, K)) if seed % 2 else rng.standard_exponential((images, K)))
    rows = np.exp(logits - logits.max(-1, keepdims=True))
    mass = rng.uniform(0.01, 1, size=(images, 1)) if seed % 3 else 1.0
    return (mass * rows / rows.sum(-1, keepdims=True)).astype(np.float32)


def study_frame(rows: np.ndarray) -> pd.DataFrame:
    values = {m.info.name: m().kernel(rows[:, None, :])[:, 0] for m in study.STUDY_METRICS}
    frame = pd.DataFrame({"image_id": [f"im{i}" for i in range(len(rows))], "country": "FR", **values})
    return frame.astype({"num_high_attention_patches": int})


def published(frame: pd.DataFrame, decimals: int) -> str:
    """The frame's summary as a Markdown table, rounded."""
    lines = ["| Metric | Mean | Std | Min | Max |", "|---|---|---|---|---|"]
    for column in study.COLUMNS[2:]:
        numbers = frame[column].agg(["mean", "std", "min", "max"])
        lines.append(f"| {column} | " + " | ".join(f"{v:.{decimals}f}" for v in numbers) + " |")
    return "\n".join(lines)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), K=st.sampled_from([16, 49, 144, 256]), decimals=st.sampled_from([2, 3, 7]))
def test_tables_computed_from_maps_never_fail(
    seed: int, K: int, decimals: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    frame = study_frame(maps(seed, 20, K))
    path = tmp_path_factory.mktemp("audit") / "table.csv"
    frame.round(decimals).to_csv(path, index=False)
    (per_image,) = audit_file(path, [K])
    assert per_image.possible, [str(f) for f in per_image.verdicts[0].findings]
    assert per_image.rows == 20
    (table,) = read_document(published(frame, decimals))
    summary = audit(table, [K])
    assert summary.possible, [str(f) for f in summary.verdicts[0].findings]
    assert summary.statistics == ("entropy", "max", "top10", "top25", "count", "spread")


def test_random_initialisation_passes(tmp_path: Path) -> None:
    """Nearly uniform rows, whose count above the mean is rounding noise."""
    rng = np.random.default_rng(0)
    rows = (1 + 1e-7 * rng.standard_normal((30, 576))).astype(np.float32) / 577
    path = tmp_path / "t.csv"
    study_frame(rows).to_csv(path, index=False)
    (result,) = audit_file(path, [576])
    assert result.possible


def test_the_published_table_is_impossible_for_the_known_reasons() -> None:
    (table,) = read_document(PUBLISHED)
    assert isinstance(table, SummaryTable)
    assert table.tokens == 256
    assert table.statistics["top10"]["mean"].value == pytest.approx(0.666)
    assert table.statistics["top10"]["mean"].half == pytest.approx(0.0005)
    result = audit(table)
    assert not result.possible
    found = {(f.statistic, f.where): f for f in result.verdicts[0].findings if f.severity == "impossible"}
    by_formula = {f.formula: f for f in result.verdicts[0].findings}
    assert by_formula["H <= ln 256"].bound == pytest.approx(np.log(256))
    assert found["spread", "max"].bound == pytest.approx(0.0624, abs=1e-4)
    joint = next(f for f in result.verdicts[0].findings if "linear programme" in f.formula)
    assert 4.407 <= joint.bound < 4.412  # 4.407 at the printed means, a little more within their rounding
    assert joint.reported == 4.53
    from_spread = next(f for f in result.verdicts[0].findings if "given the mean spread" in f.formula)
    assert 2.53 <= from_spread.bound < 2.60


def test_the_published_table_fits_no_grid() -> None:
    (table,) = read_document(PUBLISHED)
    result = audit(table, [256, 576])
    assert [v.possible for v in result.verdicts] == [False, False]
    on_576 = result.verdicts[1].findings
    assert all("ln 576" not in f.formula for f in on_576)  # an entropy of 5.89 is possible there
    assert not any("linear programme" in f.formula for f in on_576)  # and so are the three means
    assert any(f.statistic == "spread" and f.where == "max" for f in on_576)
    assert result.fitting == ()
    assert any("min-max" in note or "its own extremes" in note for note in result.notes)


@pytest.mark.skipif(not SEED.is_file(), reason="the study's document is not here")
def test_the_document_itself() -> None:
    (result,) = audit_file(SEED)
    assert result.stated == 256
    assert not result.possible


def test_the_hypothesis_of_the_reference_is_possible() -> None:
    """Without its spread (a min-max spread, by hypothesis) the table is possible on 24 x 24, not on 16 x 16."""
    (table,) = read_document("\n".join(line for line in PUBLISHED.splitlines() if "Spread" not in line))
    result = audit(table, [256, 576])
    assert [v.possible for v in result.verdicts] == [False, True]
    assert 576 in result.fitting
    assert 256 not in result.fitting


FEASIBLE = "| stat | mean | std | min | max |\n|---|---|---|---|---|\n"


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ("| entropy | 5.00 | 0.10 | 5.10 | 5.30 |", "min <= mean"),
        ("| entropy | 5.0 | 0.9 | 4.5 | 5.4 |", "Bhatia"),
        ("| entropy | 5.0 | 0.1 | 4.9 | 5.6 |", "H <= ln 256"),
        ("| top 10% | 0.05 | 0.01 | 0.04 | 0.06 |", "at least 25/256"),
        ("| top 10% | 40% | 1% | 38% | 42% |\n| top 25% | 35% | 1% | 33% | 37% |", "top 25 %"),
        ("| top 10% | 30% | 1% | 28% | 32% |\n| top 25% | 95% | 1% | 94% | 97% |", "no stronger"),
        ("| high attention patches | 300 | 10 | 280 | 310 |", "no more than 256"),
        ("| top 10% | 90% | 1% | 88% | 92% |\n| high attention patches | 100 | 1 | 98 | 104 |", "count <= 25"),
        (
            "| spread | 0.02 | 0.001 | 0.018 | 0.022 |\n| attention max | 0.05 | 0.01 | 0.04 | 0.06 |",
            "sum of squares",
        ),
        ("| attention max | 0.9 | 0.01 | 0.88 | 0.92 |\n| entropy | 2.0 | 0.1 | 1.8 | 2.2 |", "strongest key"),
    ],
)
def test_each_impossibility_is_found(rows: str, word: str) -> None:
    (table,) = read_document(FEASIBLE + rows)
    result = audit(table, [256])
    assert not result.possible
    assert any(word in f.formula for f in result.verdicts[0].findings), result.verdicts[0].findings


def test_a_sample_standard_deviation_of_two_images_is_no_error() -> None:
    (table,) = read_document(FEASIBLE + "| entropy | 4.0 | 1.41421 | 3.0 | 5.0 |")
    result = audit(table, [256])
    assert result.possible
    assert [f.severity for f in result.verdicts[0].findings] == ["suspicious"]


def test_one_wrong_image_among_many_is_named(tmp_path: Path) -> None:
    frame = study_frame(maps(1, 50, 256))
    frame.loc[17, "attention_entropy"] = 5.6
    path = tmp_path / "t.csv"
    frame.to_csv(path, index=False)
    (result,) = audit_file(path, [256])
    assert not result.possible
    assert {f.where for f in result.verdicts[0].findings} == {"im17"}


def test_rows_of_zeros_are_suspicious_and_hide_nothing(tmp_path: Path) -> None:
    frame = study_frame(maps(1, 5, 64))
    frame.loc[2, list(study.COLUMNS[2:])] = 0
    path = tmp_path / "t.csv"
    frame.to_csv(path, index=False)
    (result,) = audit_file(path, [64])
    assert result.possible
    assert [(f.severity, f.where, f.rows) for f in result.verdicts[0].findings] == [("suspicious", "im2", 1)]


def test_number_of_keys_unknown_then_any_that_fits_will_do(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    study_frame(maps(3, 30, 576)).to_csv(path, index=False)
    (result,) = audit_file(path)
    assert result.stated is None
    assert {v.tokens: v.possible for v in result.verdicts}[576]
    assert 576 in result.fitting


def test_provenance_beside_a_table_states_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    study_frame(maps(3, 3, 49)).to_csv(path, index=False)
    (tmp_path / "t.csv.provenance.json").write_text('{"K": 49}')
    assert read_tables(path)[0].tokens == 49


def test_parquet_and_describe_layout(tmp_path: Path) -> None:
    frame = study_frame(maps(5, 40, 64))
    frame.to_parquet(tmp_path / "t.parquet")
    (from_parquet,) = audit_file(tmp_path / "t.parquet", [64])
    assert from_parquet.possible
    assert from_parquet.rows == 40
    frame.describe().to_csv(tmp_path / "d.csv")
    (described,) = audit_file(tmp_path / "d.csv", [64])
    assert (described.kind, described.possible) == ("summary", True)
    assert described.statistics == ("entropy", "max", "top10", "top25", "count", "spread")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("no.md", "just prose | with a bar"),
        ("no.csv", "a,b\n1,2\n"),
        ("empty.csv", ""),
        ("other.md", "|a|b|\n|-|-|\n|1|2|"),
    ],
)
def test_files_without_such_a_table(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=name):
        audit_file(tmp_path / name)


def test_no_file_and_too_few_keys(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        audit_file(tmp_path / "absent.csv")
    with pytest.raises(UsageError, match="at least 2"):
        audit(read_document(PUBLISHED)[0], [1])
