"""A run round-trips: what was written comes back labelled, with and without foveate."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

from foveate.data.labels import same_tokens
from foveate.data.run import Run
from foveate.errors import SampleError, StoreError, UsageError
from foveate.geometry import CellGrid, Geometry
from run_fakes import SITE, make_run


def test_round_trip(made):
    run = made.run
    site = run.site(SITE)
    np.testing.assert_array_equal(site["attention"].values, made.attention)
    assert site["attention"].dims == ("sample", "layer", "head", "query", "key")
    assert same_tokens(run.tokens(SITE, "key"), made.tokens)
    assert same_tokens(run.tokens(SITE, "query"), made.tokens)
    assert run.geometry(2) == Geometry(20, 30, 32, 32, 1.6, 1.6, 0.0, -8.0)
    assert run.grid == CellGrid(np.array([0.0, 16, 32]), np.array([0.0, 16, 32]))
    assert run.ok.tolist() == [0, 1, 2, 3, 4]
    assert run.predictions["label"].values[1].tolist() == ["cat", "dog"]
    assert run.predictions["class_index"].values[1].tolist() == [3, 4]
    np.testing.assert_allclose(run.predictions["confidence"], 0.75 + np.arange(5) / 100)
    assert run.predictions["correct"].values.tolist() == [-1] * 5
    assert run.site(SITE).sel(sample="3.png", layer=1)["attention"].shape == (3, 17, 17)
    assert len(run) == 5
    assert "5 of 5" in repr(run)


def test_samples_load_again_and_a_changed_file_is_noticed(made, tmp_path):
    run = made.run
    sample = run.load_sample(1)
    np.testing.assert_array_equal(sample.pixels, made.manifest.load(1).pixels)
    assert sample.id == "1.png"
    (tmp_path / "1.png").write_bytes((tmp_path / "2.png").read_bytes())
    with pytest.raises(SampleError, match="SHA-256"):
        run.load_sample(1)


def test_a_run_moves_together_with_its_images(tmp_path):
    home = tmp_path / "here"
    home.mkdir()
    made = make_run(home)
    assert set(made.run.samples["path"].values) == {f"{i}.png" for i in range(5)}
    home.rename(tmp_path / "there")
    assert Run.open(tmp_path / "there" / "run.zarr").load_sample(0).pixels.shape == (20, 30, 3)


def test_opens_without_foveate(made):
    code = f"""
import json, sys
import xarray as xr
tree = xr.open_datatree({str(made.path)!r}, engine="zarr", chunks=None)
site = tree["sites/{SITE}"].to_dataset()
assert not [name for name in sys.modules if name.startswith("foveate")]
row = site.attention.sel(sample="2.png").isel(layer=1, head=2, query=0)
print(json.dumps(dict(
    total=float(row.sum()), kinds=site.key_kind.values.tolist(), meanings=site.key_kind.attrs["flag_meanings"],
    is_coordinate="key_y" in site.coords, path=str(tree["samples"]["path"].values[2]), schema=tree.attrs["schema"],
    unit=site.key_y.attrs["units"], best=str(tree["predictions"].label.values[0, 0]))))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert abs(said["total"] - 1) < 2e-3
    assert said["kinds"] == [1] + [0] * 16
    assert said["meanings"].split()[:2] == ["patch", "cls"]
    assert said["is_coordinate"]
    assert (said["path"], said["schema"], said["unit"], said["best"]) == ("2.png", "1.0", "pixel", "cat")


def test_unknown_names_list_what_exists(made):
    with pytest.raises(UsageError, match=SITE):
        made.run.site("encoder")
    with pytest.raises(StoreError, match="key, query"):
        made.run.tokens(SITE, "value")
    with pytest.raises(UsageError, match="there are: none"):
        made.run.product("metrics/entropy")
    with pytest.raises(StoreError, match="source in memory"):
        made.run.open_source()


def test_missing_run_foreign_store_and_newer_version(tmp_path, made):
    import zarr

    with pytest.raises(StoreError, match="no such run"):
        Run.open(tmp_path / "gone.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="not a zarr store"):
        Run.open(tmp_path / "folder")
    zarr.create_group(tmp_path / "other.zarr", zarr_format=3)
    with pytest.raises(StoreError, match="not a foveate run"):
        Run.open(tmp_path / "other.zarr")
    zarr.open_group(made.path, mode="r+", use_consolidated=False).attrs["schema"] = "2.0"
    with pytest.raises(StoreError, match=r"schema 2\.0(.|\n)*upgrade"):
        Run.open(made.path)


def test_products_are_written_whole_replaced_and_listed(made):
    run = made.run
    values = np.random.default_rng(0).random((5, 3)).astype(np.float32)
    names = xr.DataArray(np.array(["a", "b", "c"]), dims="method")
    dataset = xr.Dataset({"score": (("sample", "method"), values)}, coords={"method": names})
    run.write_product("faithfulness/scores", dataset, {"seed": 3, "steps": (0, 1)})
    run.write_product(f"metrics/{SITE}/entropy", dataset["score"].isel(method=0).to_dataset(name="entropy"))
    assert run.products() == ["faithfulness/scores", f"metrics/{SITE}/entropy"]
    back = Run.open(made.path).product("faithfulness/scores")
    np.testing.assert_array_equal(back["score"].values, values)
    assert back["method"].values.tolist() == ["a", "b", "c"]
    assert back["sample"].values.tolist() == list(made.manifest.ids)
    assert (back.attrs["seed"], back.attrs["steps"]) == (3, [0, 1])
    run.write_product("faithfulness/scores", dataset.isel(method=[1]))
    assert run.product("faithfulness/scores").sizes["method"] == 1
    assert "seed" not in run.product("faithfulness/scores").attrs
    tree = xr.open_datatree(made.path, engine="zarr", chunks=None)
    assert tree["faithfulness/scores"].sizes["method"] == 1
    with pytest.raises(UsageError, match="not a name for a product"):
        run.write_product("samples", dataset)


def test_a_writer_that_dies_leaves_no_metadata_that_lies(made, monkeypatch):
    run = made.run
    run.write_product("maps/v", xr.Dataset({"v": ("sample", np.arange(5.0))}))
    with monkeypatch.context() as patched:
        patched.setattr("foveate.data.store.consolidate", lambda store: None)  # killed just before
        run.write_product("maps/v", xr.Dataset({"v": (("sample", "y"), np.ones((5, 2)))}))
    with pytest.warns(RuntimeWarning, match="consolidated"):
        tree = xr.open_datatree(made.path, engine="zarr", chunks=None)
    assert tree["maps/v"]["v"].shape == (5, 2)


def test_product_writer_gathers_blocks_of_any_size_and_order(tmp_path):
    run = make_run(tmp_path, count=21, batch=4).run
    values = np.random.default_rng(1).random((21, 2, 3)).astype(np.float32)
    variables = {"map": (("sample", "y", "x"), (21, 2, 3), "float32"), "said": (("sample",), (21,), str)}
    words = np.array([f"w{i}" for i in range(21)], dtype=object)
    with run.product_writer("attributions/a", variables, coords={"y": [0, 1]}, attrs={"seed": 1}) as out:
        for at in ([20, 3, 4], [5, 6, 7, 8, 9, 10], [0, 1], [19, 18, 17, 16], [11, 12, 13, 14, 15]):
            out.write(at, {"map": values[at], "said": words[at]})
    back = run.product("attributions/a")
    expected = values.copy()
    expected[2] = np.nan
    np.testing.assert_array_equal(back["map"].values, expected)
    assert back["said"].values.tolist() == [w if i != 2 else "" for i, w in enumerate(words)]
    assert back["y"].values.tolist() == [0, 1]


def test_product_writer_resumes_where_it_was_cut_off(tmp_path):
    run = make_run(tmp_path, count=10, batch=4).run
    variables = {"v": (("sample",), (10,), "float64")}

    def cut_off():
        with run.product_writer("maps/v", variables, attrs={"seed": 1}) as out:
            out.write(0, {"v": np.arange(3.0)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    with run.product_writer("maps/v", variables, attrs={"seed": 1}) as out:
        assert out.pending(range(10)).tolist() == [3, 4, 5, 6, 7, 8, 9]
        out.write([9, 4], {"v": np.array([9.0, 4.0])})
    expected = [0, 1, 2, np.nan, 4, np.nan, np.nan, np.nan, np.nan, 9]
    np.testing.assert_array_equal(run.product("maps/v")["v"].values, expected)
    with pytest.raises(StoreError, match="other settings"):
        run.product_writer("maps/v", variables, attrs={"seed": 2})
    with run.product_writer("maps/v", variables, attrs={"seed": 2}, overwrite=True) as out:
        assert out.pending([1, 2]).tolist() == [1, 2]
    assert np.isnan(run.product("maps/v")["v"].values).all()


@pytest.mark.parametrize(
    ("at", "blocks", "message"),
    [
        (0, {"w": np.zeros(2)}, "expected blocks"),
        (9, {"v": np.zeros(2)}, "not within 10"),
        (0, {"v": np.zeros((2, 1))}, "expected shape"),
    ],
)
def test_product_writer_refuses_what_does_not_fit(tmp_path, at, blocks, message):
    run = make_run(tmp_path, count=10, batch=4).run
    out = run.product_writer("maps/v", {"v": (("sample",), (10,), "float64")})
    with out, pytest.raises(UsageError, match=message):
        out.write(at, blocks)
