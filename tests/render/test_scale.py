"""Colours mean the same in every picture, or the picture says that they do not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import UsageError
from foveate.render.scale import check_name, lift, linear, per_image, shared, signed


def test_lift_is_log2_of_times_uniform_on_a_fixed_scale() -> None:
    scale = lift()
    np.testing.assert_allclose(scale.paint([0.01, 0.02, 0.08, 0.32], 0.01), [0, 1, 3, 5])
    assert (scale.norm.vmin, scale.norm.vmax) == (-3, 5)
    assert scale.paint([0.0], 0.01)[0] < -3  # below the scale, not missing
    assert np.isnan(scale.paint([np.nan], 0.01))[0]


@given(st.lists(st.floats(1e-6, 1.0), min_size=4, max_size=4), st.floats(0.1, 10))
def test_lift_does_not_stretch_to_the_data(values: list[float], factor: float) -> None:
    """A map and its uniform level scaled together look the same; the scale never follows the data."""
    one, other = lift().paint(values, 0.25), lift().paint(np.array(values) * factor, 0.25 * factor)
    np.testing.assert_allclose(one, other, atol=1e-9)


def test_an_almost_uniform_map_looks_almost_uniform() -> None:
    noisy = 1 / 64 * (1 + 0.05 * np.sin(np.arange(64)))
    assert np.ptp(lift().share(noisy, 1 / 64)) < 0.03
    assert np.ptp(per_image(noisy).share(noisy, 1 / 64)) > 0.99  # what the default must not do


def test_linear_starts_at_zero_and_is_shared() -> None:
    scale = shared("linear", [[0.2, 0.3], [0.5, np.nan]])
    assert (scale.norm.vmin, scale.norm.vmax) == (0, 0.5)
    assert "shared" in scale.words


def test_signed_is_centred_at_zero() -> None:
    scale = shared("signed", [[-3.0, 1.0]])
    assert (scale.norm.vmin, scale.norm.vmax) == (-3, 3)
    assert float(scale.norm(0.0)) == 0.5


def test_per_image_says_so() -> None:
    scale = per_image([2.0, 4.0, np.nan])
    assert (scale.norm.vmin, scale.norm.vmax) == (2, 4)
    assert "PER-IMAGE" in scale.words
    assert "own range" in scale.label


@pytest.mark.parametrize("values", [[np.nan], [], [0.0, 0.0]])
def test_scales_of_nothing_are_still_scales(values: list[float]) -> None:
    for scale in (linear(shared("linear", [values]).norm.vmax), signed(0.0), per_image(values)):
        assert scale.norm.vmax > scale.norm.vmin


def test_a_map_without_a_uniform_level_has_no_lift() -> None:
    assert np.isnan(lift().paint([1.0], 0.0)).all()


def test_unknown_scales_are_refused() -> None:
    with pytest.raises(UsageError, match=r"rainbow.*lift"):
        check_name("rainbow")
    with pytest.raises(UsageError, match="per-image"):
        shared("per-image", [[1.0]])
