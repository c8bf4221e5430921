"""Mutual information and dispersion against definitions written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.detection.specialisation import centre_dispersion, mutual_information, query_information
from foveate.errors import UsageError

pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=40)


def by_entropies(rows: list[tuple[int, int]]) -> float:
    """I = H(X) + H(Y) - H(X, Y), counted by hand."""

    def entropy(items: list) -> float:
        return -sum(items.count(v) / len(items) * math.log(items.count(v) / len(items)) for v in set(items))

    return entropy([a for a, _ in rows]) + entropy([b for _, b in rows]) - entropy(rows)


@given(pairs)
def test_information_is_the_difference_of_entropies(rows: list[tuple[int, int]]) -> None:
    x, y = zip(*rows, strict=True)
    assert mutual_information(x, y) == pytest.approx(by_entropies(rows), abs=1e-12)
    assert mutual_information(x, y) == pytest.approx(mutual_information(y, x), abs=1e-12)


def test_a_query_that_names_the_class_reaches_the_entropy_and_no_permutation_does() -> None:
    label = np.repeat(np.arange(4), 10)
    found = query_information(label * 7 + 1, label, permutations=200)
    assert found.value == pytest.approx(math.log(4))
    assert found.largest == pytest.approx(math.log(4))
    assert found.p == pytest.approx(1 / 201)
    assert 0 < found.null < found.value / 2


def test_null_of_a_tiny_column_is_the_mean_over_all_orders() -> None:
    query, label = [0, 0, 1, 2], [0, 1, 1, 1]
    every = [by_entropies(list(zip(query, order, strict=True))) for order in itertools.permutations(label)]
    found = query_information(query, label, permutations=4000, seed=3)
    assert found.null == pytest.approx(np.mean(every), abs=0.01)
    assert found.p == pytest.approx(
        np.mean(np.array(every) >= by_entropies([*zip(query, label, strict=True)]) - 1e-12), abs=0.03
    )


def test_independent_columns_are_not_surprising() -> None:
    rng = np.random.default_rng(0)
    p = [
        query_information(rng.integers(5, size=60), rng.integers(3, size=60), permutations=99, seed=i).p
        for i in range(40)
    ]
    assert np.mean(np.array(p) <= 0.1) < 0.3


def test_words_count_as_labels_and_nothing_gives_nan() -> None:
    assert mutual_information([1, 1, 2, 2], ["cat", "cat", "dog", "dog"]) == pytest.approx(math.log(2))
    empty = query_information([], [])
    assert math.isnan(empty.value)
    assert empty.n == 0
    with pytest.raises(UsageError, match="3 queries but 2"):
        query_information([1, 2, 3], [1, 2])


def test_dispersion_against_loops() -> None:
    rng = np.random.default_rng(1)
    query, centres = rng.integers(4, size=30), rng.random((30, 2))
    query[0], centres[5] = 9, np.nan  # one query with a single box, one box without a place
    found = centre_dispersion(query, centres, permutations=50)
    total, count = 0.0, 0
    for name in range(4):
        mine = [c for q, c in zip(query, centres, strict=True) if q == name and not np.isnan(c).any()]
        middle = sum(mine) / len(mine)
        rms = math.sqrt(sum(float(((c - middle) ** 2).sum()) for c in mine) / len(mine))
        assert found.by_query[name] == pytest.approx(rms)
        total, count = total + rms * len(mine), count + len(mine)
    assert 9 not in found.by_query
    assert found.within == pytest.approx(total / count)


def test_queries_with_a_place_of_their_own_are_tighter_than_chance() -> None:
    rng = np.random.default_rng(2)
    query = rng.integers(5, size=80)
    places = rng.random((5, 2))
    tight = centre_dispersion(query, places[query] + 0.01 * rng.standard_normal((80, 2)), permutations=100)
    assert tight.within < 0.1 * tight.null
    assert tight.p == pytest.approx(1 / 101)
    assert math.isnan(centre_dispersion([1, 2], [[0, 0], [1, 1]]).within)
    with pytest.raises(UsageError, match="centres"):
        centre_dispersion([1], [[0, 0], [1, 1]])
