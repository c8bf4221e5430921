"""Measuring a run: products equal the metrics on the arrays, labels survive, jobs continue, needs are said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from PIL import Image

from foveate.data.run import Run
from foveate.errors import StoreError, UsageError
from foveate.interfaces import Metric, TokenAxis
from foveate.metrics import labelled
from foveate.metrics.entropy import Entropy
from foveate.metrics.sparsity import Gini
from foveate.study.capture import run_capture
from foveate.study.measure import MeasureReport, measure_run
from foveate.study.plan import build_plan
from foveate.testing.tiny import TinySource

SITE = "encoder.self"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no image")
    return folder


def capture(images: Path, out: Path, **plan: object) -> Run:
    source = TinySource()
    run_capture(source, images, out, plan=build_plan(source, **plan), batch_size=2)  # type: ignore[arg-type]
    return Run.open(out)


@pytest.fixture(scope="module")
def full(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return capture(images, tmp_path_factory.mktemp("full") / "run.zarr", rows="all", dtype="float32")


def names(report: MeasureReport) -> set[str]:
    return {measured.metric for measured in report.written}


def test_every_metric_of_full_rows(full: Run) -> None:
    report = measure_run(full)
    assert not report.skipped
    site = full.site_ids[0]
    rows = full.site(site)["attention"]
    query, key = full.tokens(site, "query"), full.tokens(site, "key")
    from_rows = [m for m in report.written if m.computed_from == "stored float32"]
    assert {"entropy", "gini", "attention_distance", "head_diversity", "prefix_mass"} <= {
        m.metric for m in from_rows
    }
    from foveate.plugins.manager import plugin_manager

    metrics: list[Metric] = [plugin_manager().spec("metric", m.metric).create() for m in from_rows]
    direct = labelled.measure(rows, metrics, query=query, key=key, all_rows=True)
    for measured in from_rows:
        product = full.product(measured.product)[measured.metric]
        np.testing.assert_allclose(product, direct[measured.metric], rtol=1e-6, err_msg=measured.metric)
        assert product.dims == direct[measured.metric].dims
        assert product.attrs["K"] == direct[measured.metric].attrs["K"]
        assert np.isnan(product[3]).all()  # the image that could not be read
        assert np.isfinite(product[[0, 1, 2, 4]].values).any()


def test_reductions_over_every_row_are_preferred_and_agree(full: Run) -> None:
    report = measure_run(full)
    site = full.site_ids[0]
    sources = {m.metric: m.computed_from for m in report.written}
    assert sources["received_mass"] == "float32 at capture, every row"
    received = full.product(f"metrics/{site}/received_mass")["received_mass"]
    expected = full.site(site)["attention"].mean("query")
    patches = full.tokens(site, "key").where("patch")
    np.testing.assert_allclose(
        received[[0, 1]][..., patches], expected[[0, 1]][..., patches], rtol=1e-4, atol=1e-6
    )


def test_opens_without_foveate_and_keeps_labels(full: Run) -> None:
    measure_run(full, ["entropy_normalised"])
    site = full.site_ids[0]
    tree = xr.open_datatree(full.path, engine="zarr", consolidated=False)
    product = tree[f"metrics/{site}/entropy_normalised"].to_dataset()
    assert product.sizes["sample"] == 5
    assert product["layer"].values.tolist() == full.site(site)["layer"].values.tolist()
    assert "query_y" in product.coords
    assert product["entropy_normalised"].attrs["over_keys"] == "patch"


def test_readout_rows_give_what_they_can_and_say_what_not(images: Path, tmp_path: Path) -> None:
    run = capture(images, tmp_path / "run.zarr")
    report = measure_run(run)
    reasons = {skipped.metric: skipped.reason for skipped in report.skipped}
    assert "place" in reasons["attention_distance"]
    assert {"entropy", "received_mass", "sink_mass", "attention_entropy"} <= names(report)
    site = run.site_ids[0]
    rows = run.site(site)["attention"].astype(np.float64).values
    patches = run.tokens(site, "key").where("patch")
    p = rows[..., patches] / rows[..., patches].sum(-1, keepdims=True)
    expected = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    got = run.product(f"metrics/{site}/entropy")["entropy"]
    np.testing.assert_allclose(got[[0, 4]], expected[[0, 4]], rtol=1e-5)
    assert got.attrs["computed_from"] == "stored float16"


def test_without_the_reduction_all_rows_are_needed(images: Path, tmp_path: Path) -> None:
    run = capture(images, tmp_path / "run.zarr", reductions=())
    reasons = {s.metric: s.reason for s in measure_run(run, ["entropy", "received_mass"]).skipped}
    assert "every query" in reasons["received_mass"]
    with pytest.raises(UsageError, match="every query"):
        measure_run(run, ["received_mass"])


def test_all_keys_read_the_entropy_of_every_row_as_captured(images: Path, tmp_path: Path) -> None:
    run = capture(images, tmp_path / "run.zarr", rows="none")
    report = measure_run(run, keys="all")
    assert {"entropy", "entropy_normalised", "effective_number", "received_mass"} <= names(report)
    site = run.site_ids[0]
    product = run.product(f"metrics/{site}/entropy_normalised")["entropy_normalised"]
    assert product.dims == ("sample", "layer", "head", "token")
    K = len(run.tokens(site, "key"))
    np.testing.assert_allclose(product[0], run.site(site)["entropy"][0] / np.log(K), rtol=1e-6)
    assert product.attrs["K"] == K
    assert "no attention rows" in {s.metric: s.reason for s in report.skipped}["gini"]


def test_other_settings_do_not_overwrite_silently(images: Path, tmp_path: Path) -> None:
    run = capture(images, tmp_path / "run.zarr")
    measure_run(run, ["gini"])
    with pytest.raises(StoreError, match="other settings"):
        measure_run(run, ["gini"], keys="all")
    measure_run(run, ["gini"], keys="all", overwrite=True)
    assert run.product(f"metrics/{run.site_ids[0]}/gini")["gini"].attrs["over_keys"] == "all"


def test_a_job_that_was_cut_off_continues(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = capture(images, tmp_path / "run.zarr")
    monkeypatch.setattr(labelled.blocks, "__kwdefaults__", {**labelled.blocks.__kwdefaults__, "block_bytes": 1})
    done: list[int] = []

    def stop_after_two(count: int) -> None:
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_run(run, ["gini"], progress=stop_after_two)
    resumed: list[int] = []
    measure_run(run, ["gini"], progress=resumed.append)
    assert sum(done) + sum(resumed) == run.ok.size == 4
    again = measure_run(run, ["gini"], progress=resumed.append)
    assert sum(done) + sum(resumed) == 4
    assert names(again) == {"gini"}
    site = run.site_ids[0]
    monkeypatch.undo()
    rows = run.site(site)["attention"]
    from foveate.metrics.sparsity import Gini

    whole = labelled.measure(rows, [Gini()], query=run.tokens(site, "query"), key=run.tokens(site, "key"))
    np.testing.assert_array_equal(run.product(f"metrics/{site}/gini")["gini"], whole["gini"])


def test_unknown_names(full: Run) -> None:
    with pytest.raises(UsageError, match="entropie"):
        measure_run(full, ["entropie"])
    with pytest.raises(UsageError, match="no site"):
        measure_run(full, ["entropy"], sites=["nowhere"])


def test_a_metric_of_ones_own(full: Run) -> None:
    class Mine(Entropy):
        info = Entropy.info.__class__("mine", "entropy again", "nat", "this test")

    assert names(measure_run(full, [Mine()])) == {"mine"}
    assert isinstance(full.tokens(full.site_ids[0]), TokenAxis)


def causal(site: xr.Dataset) -> xr.Dataset:
    """The site as if its model read from left to right."""
    rows = site["attention"].values.astype(np.float64)
    lower = np.tril(np.ones(rows.shape[-2:], bool))
    rows = np.where(lower, rows, 0.0)
    rows = rows / rows.sum(-1, keepdims=True)
    p = np.where(rows > 0, rows, 1.0)
    entropy = -(rows * np.log(p)).sum(-1)
    return site.assign(
        attention=(site["attention"].dims, rows.astype(np.float32)),
        entropy=(site["entropy"].dims, entropy.astype(np.float32)),
    ).assign_attrs(masks=["causal"])


@pytest.mark.parametrize("from_reduction", [True, False])
def test_keys_that_a_causal_mask_blocks_do_not_count(
    full: Run, monkeypatch: pytest.MonkeyPatch, from_reduction: bool
) -> None:
    site = full.site_ids[0]
    masked = causal(full.site(site))
    monkeypatch.setattr(Run, "site", lambda self, name: masked if from_reduction else masked.drop_vars("entropy"))
    measure_run(full, ["entropy_normalised"], keys="all", overwrite=True)
    product = full.product(f"metrics/{site}/entropy_normalised")["entropy_normalised"]
    assert product.attrs["K"] == "varies"
    row = masked["attention"][0, 0, 0].values.astype(np.float64)
    expected = [scipy.stats.entropy(row[i, : i + 1]) / np.log(i + 1) for i in range(1, len(row))]
    np.testing.assert_allclose(product[0, 0, 0, 1:], expected, rtol=1e-4)
    assert np.isnan(product[0, 0, 0, 0])  # one key leaves nothing to spread over


def test_overwrite_computes_a_changed_metric_anew(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same name, same settings, another formula: without ``overwrite`` what is there stays."""
    run = capture(images, tmp_path / "run.zarr")
    measure_run(run, ["gini"])
    product = f"metrics/{run.site_ids[0]}/gini"
    before = run.product(product)["gini"].values
    kernel = Gini.kernel
    monkeypatch.setattr(Gini, "kernel", lambda self, rows, **axes: kernel(self, rows, **axes) / 2)
    measure_run(run, ["gini"])
    np.testing.assert_array_equal(run.product(product)["gini"].values, before)
    measure_run(run, ["gini"], overwrite=True)
    np.testing.assert_allclose(run.product(product)["gini"].values, before / 2, rtol=1e-6)
