"""Which site a picture is drawn from when none is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import xarray as xr

from foveate.errors import UsageError
from foveate.interfaces import TOKEN_KINDS
from foveate.render.selection import site_of


def run_of(**sites: str | None) -> Any:
    """A run whose sites have keys of one kind each; None: no rows were kept."""

    def site(name: str) -> xr.Dataset:
        kind = sites[name]
        rows = {} if kind is None else {"attention": (("query", "key"), [[1.0]])}
        return xr.Dataset(rows, coords={"key_kind": ("key", [TOKEN_KINDS.index(kind or "patch")])})

    return SimpleNamespace(path="run.zarr", site_ids=tuple(sites), site=site)


def test_the_first_site_that_reads_the_picture_is_drawn() -> None:
    assert site_of(run_of(text="text", decoder="object", none=None, cross="patch", last="patch"))[0] == "cross"


def test_keys_without_a_place_are_said_in_words() -> None:
    run = run_of(decoder="object", words="text", none=None)
    for site in (None, "decoder"):
        with pytest.raises(UsageError, match=r"decoder.* have no place in the picture"):
            site_of(run, site)
    with pytest.raises(UsageError, match="no attention rows were kept"):
        site_of(run, "none")
