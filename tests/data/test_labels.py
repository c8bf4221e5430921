"""A token axis becomes coordinates and comes back from them unchanged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from foveate.data.labels import pad, same_tokens, token_coordinates, tokens_of
from foveate.errors import StoreError
from foveate.interfaces import TOKEN_KINDS, TokenAxis


def axis():
    words = TokenAxis.of_kind("text", 2, label=("a", "b"))
    return TokenAxis.concat(TokenAxis.of_kind("cls", 1), TokenAxis.patches(2, 3, height=20, width=30), words)


def dataset(tokens, name="key"):
    coordinates = token_coordinates(name, tokens)
    return xr.Dataset(coords={key: (c.dims, c.values, c.attrs) for key, c in coordinates.items()})


def test_round_trip():
    tokens = axis()
    back = tokens_of(dataset(tokens), "key")
    assert same_tokens(back, tokens)
    assert back.label == ("", "", "", "", "", "", "", "a", "b")
    assert dataset(tokens)["key_kind"].attrs["flag_meanings"].split() == list(TOKEN_KINDS)


def test_tokens_that_differ_between_samples():
    one, two = axis(), TokenAxis.patches(1, 4, height=20, width=30)
    table = dataset([one, pad(two, len(one))])
    assert table["key_y"].dims == ("sample", "key")
    assert same_tokens(tokens_of(table, "key", sample=0), one)
    kinds = tokens_of(table, "key", sample=1).kind
    assert kinds.tolist() == [0] * 4 + [TOKEN_KINDS.index("padding")] * 5
    with pytest.raises(StoreError, match="differs between samples"):
        tokens_of(table, "key")


def test_overflow_says_the_capacity_needed():
    with pytest.raises(StoreError, match=r"9 do not fit a capacity of 8(.|\n)*at least 9 .*max_tracks, 1 more"):
        pad(axis(), 8)


@pytest.mark.parametrize("name", ["kind", "y", "x", "height", "width", "level", "frame", "label"])
def test_any_difference_is_a_difference(name):
    tokens = axis()
    values = getattr(tokens, name)
    other = ("x", *values[1:]) if name == "label" else np.concatenate([values[:2], values[2:3] + 1, values[3:]])
    assert same_tokens(tokens, replace(tokens))
    assert not same_tokens(tokens, replace(tokens, **{name: other}))
    assert not same_tokens(tokens, tokens.take(range(5)))
