from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import UsageError
from foveate.interfaces import SitePlan
from foveate.study.plan import build_plan, parse_rows, select_layers
from foveate.testing.tiny import SITE, TinyConfig, TinySource


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, (0, 1, 2, 3, 4, 5)),
        ("-1", (5,)),
        ("0,2", (0, 2)),
        ("4:", (4, 5)),
        (":2", (0, 1)),
        ("-2:", (4, 5)),
        (":-4", (0, 1)),
        ("1:3, -1", (1, 2, 5)),
        ("9", ()),
        ("-9", ()),
        ("9:", ()),
    ],
)
def test_layers(text, expected):
    assert select_layers(range(6), text) == expected


@given(st.integers(1, 12), st.integers(-14, 14) | st.none(), st.integers(-14, 14) | st.none())
def test_ranges_are_pythons_where_layers_are_numbered_from_zero(count, start, stop):
    text = f"{'' if start is None else start}:{'' if stop is None else stop}"
    expected = tuple(range(count))[slice(start, stop)]
    # Python clips a stop below -count to nothing, and so do we.
    if stop is not None and stop < -count:
        expected = ()
    assert select_layers(range(count), text) == expected


def test_true_numbers_of_a_site_that_skips_layers():
    assert select_layers((2, 5, 8), "5:") == (5, 8)
    assert select_layers((2, 5, 8), "3") == ()
    assert select_layers((2, 5, 8), "-1") == (8,)


@pytest.mark.parametrize("text", ["last", "1-3", "", "1:2:3"])
def test_layers_that_are_no_layers(text):
    with pytest.raises(UsageError, match="not a layer number"):
        select_layers(range(3), text)


def test_rows():
    assert parse_rows("readout") == "readout"
    assert parse_rows("0,5") == (0, 5)
    assert parse_rows([3]) == (3,)
    with pytest.raises(UsageError, match="not a rule"):
        parse_rows("cls")


def test_plan_of_a_source():
    source = TinySource(TinyConfig(layers=4))
    plan = build_plan(source, layers="-2:", rows="all", reductions=("entropy",), dtype="float32")
    assert plan.sites == (SitePlan(SITE, (2, 3), "keep", "all", ("entropy",), 16),)
    assert plan.dtype == "float32"
    assert build_plan(source).sites[0].layers is None


def test_unknown_layer_and_site_list_what_exists():
    source = TinySource(TinyConfig(layers=4))
    with pytest.raises(UsageError, match=f"{SITE}: 0 to 3"):
        build_plan(source, layers="7")
    with pytest.raises(UsageError, match=f"did you mean {SITE}"):
        build_plan(source, sites=["vision.encoder"])
