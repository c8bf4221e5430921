"""Identities carried by attention: masks decide which query a track became."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.errors import UsageError
from foveate.temporal.identity import mask_overlap, switches, transport

RNG = np.random.default_rng(4)


def test_overlap_against_loops() -> None:
    a, b = RNG.random((3, 6, 5)) < 0.4, RNG.random((4, 6, 5)) < 0.4
    a[0] = b[1] = False
    found = mask_overlap(a, b)
    for i in range(3):
        for j in range(4):
            union = (a[i] | b[j]).sum()
            assert found[i, j] == pytest.approx((a[i] & b[j]).sum() / union if union else 0.0)
    with pytest.raises(UsageError, match="masks of"):
        mask_overlap(a, b[:, :5])


def test_the_query_with_the_track_s_mask_is_its_own() -> None:
    masks = np.zeros((3, 4, 4), bool)
    masks[0, :2], masks[1, 2:, :2], masks[2, 2:, 2:] = True, True, True
    rows = np.array([[0.1, 0.7, 0.2], [0.6, 0.3, 0.1]])
    found = transport(rows, masks[[1, 2]], masks)
    np.testing.assert_allclose(found.own, [0.7, 0.1])
    np.testing.assert_allclose(found.overlap, 1.0)
    np.testing.assert_allclose(found.agrees, [1.0, 0.0])
    assert found.chance == pytest.approx(1 / 3)
    order = [2, 0, 1]
    moved = transport(rows[:, order], masks[[1, 2]], masks[order])
    np.testing.assert_allclose(moved.own, found.own)


def test_a_track_that_is_not_there_is_unknown() -> None:
    masks = np.ones((2, 3, 3), bool)
    tracks = np.stack([np.zeros((3, 3), bool), masks[0]])
    rows = np.array([[0.5, 0.5], [0.0, 0.0]])
    found = transport(rows, tracks, masks)
    assert np.isnan(found.own).all()  # an empty mask; a row that does not exist
    assert np.isnan(found.agrees).all()
    nobody = transport(np.zeros((0, 2)), np.zeros((0, 3, 3), bool), masks)
    assert nobody.own.shape == (0,)
    with pytest.raises(UsageError, match="for 2 tracks and 2 queries"):
        transport(np.ones((3, 2)), tracks, masks)


def test_switches_of_clear_cases() -> None:
    table = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, -1, 0, 0], [0, -1, 1, 0], [-1, -1, -1, -1]])
    assert switches(table).tolist() == [0, 1, 0, 2, 0]
    assert switches(np.zeros((0, 5), int)).tolist() == []
    with pytest.raises(UsageError, match="object, frame"):
        switches(np.zeros(4))
