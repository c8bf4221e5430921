"""Means over what is known, against numpy on the entries that are."""

from __future__ import annotations

import warnings

import numpy as np

from foveate.stats.known import mean_known


def test_against_numpy_on_known_entries() -> None:
    table = np.random.default_rng(0).normal(size=(4, 5, 6))
    table[np.random.default_rng(1).random(table.shape) < 0.3] = np.nan
    table[2, :, 3] = np.nan
    table[0, 0, 0] = np.inf
    finite = np.where(np.isfinite(table), table, np.nan)
    for axis in (0, 1, -1, (0, 2), None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = np.nanmean(finite, axis=axis)
        np.testing.assert_allclose(mean_known(table, axis), expected)


def test_nothing_known_is_nan_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(mean_known([]))
        assert np.isnan(mean_known([np.nan, np.inf]))
        assert np.isnan(mean_known(np.full((2, 3), np.nan), 0)).all()
