"""Maps of other tools: where they lie is respected, mass is not invented, bad files are named."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.attribution.external import ExternalMaps, load_external, to_cells
from foveate.errors import UsageError
from foveate.geometry import CellGrid, Geometry

CELLS = CellGrid.regular(4, 4, height=32, width=32)
CROP = Geometry(40, 60, 32, 32, 0.8, 0.8, 0.0, -8.0)


@pytest.fixture
def heat():
    return np.random.default_rng(0).random((2, 8, 8))


def test_input_space_is_a_plain_block_mean(heat):
    got = to_cells(heat[0], CROP, CELLS, space="input")
    np.testing.assert_allclose(got, heat[0].reshape(4, 2, 4, 2).mean((1, 3)))


def test_original_space_follows_the_crop():
    """One hot original pixel lights the cell where the geometry puts it, by its area."""
    heat = np.zeros((40, 60))
    heat[17, 44] = 1.0
    got = to_cells(heat, CROP, CELLS, space="original")
    y, x = CROP.to_input(17.5, 44.5)
    want = np.zeros((4, 4))
    want[int(y // 8), int(x // 8)] = 1 / 100  # a cell is 10 x 10 original pixels
    np.testing.assert_allclose(got, want, atol=1e-12)
    cropped_away = np.zeros((40, 60))
    cropped_away[:, :10] = 1.0
    assert not to_cells(cropped_away, CROP, CELLS, space="original").any()


def test_nan_does_not_count():
    heat = np.ones((4, 4))
    heat[0, 0] = np.nan
    got = to_cells(heat, CROP, CELLS, space="input")
    assert np.isnan(got[0, 0])
    assert (got.ravel()[1:] == 1.0).all()


@pytest.mark.parametrize("suffix", ["npy", "named", "stacked"])
def test_round_trip_through_files(tmp_path, heat, suffix):
    ids = ("a", "b/ü.png")
    path = tmp_path / ("maps.npy" if suffix == "npy" else "maps.npz")
    if suffix == "npy":
        np.save(path, heat)
    elif suffix == "named":
        np.savez(path, **dict(zip(ids, heat, strict=True)), space="input", signed=True)
    else:
        np.savez(path, maps=heat[::-1], ids=np.array(ids[::-1]), space="input")
    loaded = load_external(path, name="tool", ids=ids, space="input" if suffix == "npy" else None)
    made = loaded.on_cells(ids, (CROP, CROP), CELLS)
    np.testing.assert_allclose(made.values, heat.reshape(2, 4, 2, 4, 2).mean((2, 4)), rtol=1e-6)
    assert made.values.dtype == np.float32
    assert made.method == "tool"
    assert made.signed is (suffix == "named")
    assert made.info["space"] == "input"


def test_samples_without_a_map_are_nan(heat):
    made = ExternalMaps("tool", {"a": heat[0]}).on_cells(("a", "b"), (CROP, CROP), CELLS)
    assert np.isfinite(made.values[0]).all()
    assert np.isnan(made.values[1]).all()
    with pytest.raises(UsageError, match="none of the samples"):
        ExternalMaps("tool", {"z": heat[0]}).on_cells(("a", "b"), (CROP, CROP), CELLS)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.zeros((3, 8, 8)), r"expected a numeric array \(y, x\)"),
        (np.zeros((0, 8)), "expected a numeric"),
        (np.array([["a"]]), "expected a numeric"),
        (np.full((4, 4), np.nan), "0 finite"),
        (np.array([[1.0, np.inf]]), "1 infinite"),
    ],
)
def test_bad_arrays(values, says):
    with pytest.raises(UsageError, match=says):
        to_cells(values, CROP, CELLS)


def test_bad_files(tmp_path, heat):
    ids = ("a", "b", "c")
    np.save(tmp_path / "short.npy", heat)
    with pytest.raises(UsageError, match="for 3 samples"):
        load_external(tmp_path / "short.npy", name="tool", ids=ids)
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UsageError, match="cannot read"):
        load_external(tmp_path / "objects.npy", name="tool", ids=ids)
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(UsageError, match="cannot read"):
        load_external(tmp_path / "text.npz", name="tool", ids=ids)
    with pytest.raises(UsageError, match="cannot read"):
        load_external(tmp_path / "absent.npz", name="tool", ids=ids)
    with pytest.raises(UsageError, match="space must be"):
        to_cells(heat[0], CROP, CELLS, space="latent")
