"""Artefact tokens against a loop with statistics.median; maps without them against explicit sums."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import UsageError
from foveate.interfaces import TokenAxis
from foveate.metrics.artefacts import find_artefacts, without_tokens

TOKENS = TokenAxis.concat(
    TokenAxis.of_kind("cls", 1), TokenAxis.of_kind("register", 2), TokenAxis.patches(5, 5, height=50, width=50)
)


def planted(seed=0, samples=3):
    """Column means and norms of 25 patches after three special tokens; patches 4 and 20 stick out in both."""
    random = np.random.default_rng(seed)
    received = random.gamma(20.0, 0.001, (samples, 28))
    norms = random.normal(10.0, 1.0, (samples, 28))
    received[:, [7, 23]] = 0.3
    norms[:, [7, 23]] = 80.0
    received[:, 11] = 0.4  # a sink with an ordinary norm
    norms[:, 15] = 90.0  # a large norm that nobody looks at
    received[:, 0], norms[:, 0] = 0.9, 200.0  # the class token is meant to be different
    return received, norms


def scores(values):
    middle = statistics.median(values)
    spread = statistics.median(abs(v - middle) for v in values)
    return [(v - middle) / (1.4826 * spread) for v in values]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_tokens_are_flagged_by_both_signs_on_patches_alone(kind):
    received, norms = planted()
    arrays = (received, norms) if kind == "numpy" else (torch.from_numpy(received), torch.from_numpy(norms))
    found = find_artefacts(*arrays, key=TOKENS)
    assert np.argwhere(np.asarray(found.flagged)).tolist() == [[s, t] for s in range(3) for t in (7, 23)]
    for name, values in (("received_z", received), ("norm_z", norms)):
        result = np.asarray(getattr(found, name))
        assert np.isnan(result[:, :3]).all()
        for sample in range(3):
            np.testing.assert_allclose(result[sample, 3:], scores(values[sample, 3:].tolist()), rtol=1e-9)
    summary = found.summary()
    assert summary["flagged"] == [2, 2, 2]
    expected = received[:, [7, 23]].sum(1) / received[:, 3:].sum(1)
    np.testing.assert_allclose(summary["received_share"], expected)
    assert "patch tokens" in summary["rule"]
    assert "norm" in summary["rule"]


def test_without_norms_sinks_alone_are_flagged():
    received, _ = planted()
    found = find_artefacts(received, key=TOKENS)
    assert np.flatnonzero(found.flagged[0]).tolist() == [7, 11, 23]
    assert "norm" not in found.rule
    assert find_artefacts(received).flagged[0, 0]  # without labels every token is asked about


@given(st.integers(0, 10_000), st.booleans())
def test_rows_without_tokens_keep_their_total(seed, as_torch):
    random = np.random.default_rng(seed)
    rows = random.dirichlet(np.ones(6), (2, 3, 4))
    rows[0, 1, 2, 5] = np.nan
    flagged = random.random((2, 1, 6)) < 0.3
    given_rows, given_flags = (torch.from_numpy(a) if as_torch else a for a in (rows, flagged))
    left, removed = (np.asarray(a) for a in without_tokens(given_rows, given_flags))
    for s, h, q in np.ndindex(2, 3, 4):
        row = [0.0 if math.isnan(v) else v for v in rows[s, h, q]]
        gone = [bool(f) for f in flagged[s, 0]]
        lost = sum(v for v, f in zip(row, gone, strict=True) if f)
        assert removed[s, h, q] == pytest.approx(lost, abs=1e-12)
        kept = sum(row) - lost
        for k in range(6):
            if gone[k] or math.isnan(rows[s, h, q, k]) or all(gone):
                assert math.isnan(left[s, h, q, k])
            else:
                assert left[s, h, q, k] == pytest.approx(row[k] * sum(row) / kept)


def test_nothing_flagged_changes_nothing_and_everything_flagged_leaves_nothing():
    rows = np.random.default_rng(1).dirichlet(np.ones(5), (2, 3))
    same, removed = without_tokens(rows, np.zeros((2, 5), bool))
    np.testing.assert_allclose(same, rows)
    assert (removed == 0).all()
    none, removed = without_tokens(rows, np.ones((2, 5), bool))
    assert np.isnan(none).all()
    np.testing.assert_allclose(removed, 1.0)


def test_what_does_not_fit_is_an_error():
    received, norms = planted()
    with pytest.raises(UsageError, match="28 columns of attention, 27 token norms"):
        find_artefacts(received, norms[:, 1:])
    with pytest.raises(UsageError, match="27 values for 28 tokens"):
        find_artefacts(received[:, 1:], key=TOKENS)
    with pytest.raises(UsageError, match="no token is of kind track"):
        find_artefacts(received, key=TOKENS, kinds=("track",))
