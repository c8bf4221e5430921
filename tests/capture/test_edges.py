"""Edges chosen by label: every condition against a loop over all pairs of tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.capture.edges import Edges, edge_mask, needs_labels, parse_edges
from foveate.errors import UsageError
from foveate.interfaces import TOKEN_KINDS, TokenAxis

KINDS = ("cls", "patch", "track", "register")


def axis(kinds, frames, levels, labels):
    count = len(kinds)
    nowhere = np.full(count, np.nan, np.float32)
    codes = np.asarray([TOKEN_KINDS.index(kind) for kind in kinds], np.uint8)
    numbers = (np.asarray(levels, np.int32), np.asarray(frames, np.int32))
    return TokenAxis(codes, nowhere, nowhere, nowhere, nowhere, *numbers, tuple(labels))


@st.composite
def axes(draw):
    count = draw(st.integers(1, 7))

    def several(values):
        return draw(st.lists(values, min_size=count, max_size=count))

    frames, levels = several(st.integers(-1, 3)), several(st.integers(-1, 1))
    labels = several(st.sampled_from(["", "dog", "cat"]))
    # at least one token has each of them: conditions on labels that nobody has are errors
    frames[0], levels[0], labels[0] = max(frames[0], 0), max(levels[0], 0), labels[0] or "dog"
    return axis(several(st.sampled_from(KINDS)), frames, levels, labels)


CONDITIONS = {
    "patch": lambda q, k, i, j: TOKEN_KINDS[k.kind[j]] == "patch",
    "all": lambda q, k, i, j: True,
    "at:0": lambda q, k, i, j: j == 0,
    "self": lambda q, k, i, j: i == j,
    "frame:2": lambda q, k, i, j: k.frame[j] == 2,
    "level:1": lambda q, k, i, j: k.level[j] == 1,
    "label:dog": lambda q, k, i, j: k.label[j] == "dog",
    "frame:previous": lambda q, k, i, j: k.frame[j] >= 0 and k.frame[j] == q.frame[i] - 1,
    "frame:next": lambda q, k, i, j: q.frame[i] >= 0 and k.frame[j] == q.frame[i] + 1,
    "frame:same": lambda q, k, i, j: k.frame[j] >= 0 and k.frame[j] == q.frame[i],
    "frame:other": lambda q, k, i, j: min(q.frame[i], k.frame[j]) >= 0 and k.frame[j] != q.frame[i],
    "frame:past": lambda q, k, i, j: 0 <= k.frame[j] < q.frame[i],
    "frame:future": lambda q, k, i, j: 0 <= q.frame[i] < k.frame[j],
    "level:same": lambda q, k, i, j: k.level[j] >= 0 and k.level[j] == q.level[i],
    "level:other": lambda q, k, i, j: min(q.level[i], k.level[j]) >= 0 and k.level[j] != q.level[i],
    "label:same": lambda q, k, i, j: bool(k.label[j]) and k.label[j] == q.label[i],
    "label:other": lambda q, k, i, j: bool(k.label[j]) and bool(q.label[i]) and k.label[j] != q.label[i],
}
BETWEEN = ("previous", "next", "same", "other", "past", "future")
RELATIVE = {"self", *(name for name in CONDITIONS if name.endswith(BETWEEN))}
PART = st.tuples(st.booleans(), st.sampled_from(sorted(CONDITIONS)))


@given(axes(), axes(), st.tuples(PART, PART, PART, PART))
def test_every_choice_equals_a_loop_over_pairs(query, key, parts):
    words = [("! " if negated else "") + name for negated, name in parts]
    text = f"{words[0]} & {words[1]} | {words[2]}&{words[3]}"
    found = edge_mask(parse_edges(f"query=all -> key={text}"), query, key)

    def one(part, i, j):
        return CONDITIONS[part[1]](query, key, i, j) != part[0]

    for i in range(len(query)):
        for j in range(len(key)):
            a, b, c, d = (one(part, i, j) for part in parts)
            assert found[i, j] == ((a and b) or (c and d))


@given(axes(), axes(), st.sampled_from(sorted(set(CONDITIONS) - RELATIVE)))
def test_the_query_side_chooses_rows(query, key, name):
    found = edge_mask(Edges(name), query, key)
    for i in range(len(query)):
        assert (found[i] == CONDITIONS[name](None, query, None, i)).all()


def test_tracks_read_from_the_previous_frame():
    query = axis(["track", "track", "cls"], [1, 2, -1], [-1] * 3, [""] * 3)
    key = axis(["patch"] * 4, [0, 0, 1, 2], [0] * 4, [""] * 4)
    found = edge_mask(parse_edges("query=track -> key=frame:previous"), query, key)
    assert found.tolist() == [[True, True, False, False], [False, False, True, False], [False] * 4]


def test_positions_and_arrays_are_choices():
    tokens = TokenAxis.of_kind("object", 5)
    assert edge_mask(Edges([0, -1], 2), tokens, tokens).nonzero()[0].tolist() == [0, 4]
    mask = np.asarray([True, False, False, True, False])
    assert np.array_equal(edge_mask(Edges(mask, "at:1-3"), tokens, tokens).sum(1), 3 * mask)
    assert not edge_mask(Edges([], "all"), tokens, tokens).any()


def test_which_choices_need_labels():
    assert needs_labels("patch")
    assert needs_labels("at:1 | frame:2")
    assert not any(map(needs_labels, ("all", "at:0,3-4", "!self & all", 3, [1, 2], np.ones(3, bool))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cls to patch", "cannot read"),
        ("query=cls -> patch", "cannot read"),
        ("query=clss -> key=patch", "no condition 'clss'"),
        ("query=self -> key=patch", "relative to the query"),
        ("query=frame:previous -> key=patch", "relative to the query"),
        ("query=cls -> key=frame:previus", "needs a number"),
        ("query=cls -> key=label:", "no condition 'label'"),
        ("query=cls -> key=at:3-x", "cannot read positions"),
        ("query= -> key=patch", "no condition ''"),
        ("query=cls & -> key=patch", "no condition ''"),
    ],
)
def test_what_cannot_be_read_is_a_usage_error(text, message):
    with pytest.raises(UsageError, match=message):
        parse_edges(text)


def test_conditions_that_no_token_can_satisfy_by_nature_are_errors():
    tokens = TokenAxis.of_kind("track", 3)
    for text in ("frame:previous", "level:0", "label:dog"):
        with pytest.raises(UsageError, match="no token on the key axis has a"):
            edge_mask(Edges("all", text), tokens, tokens)
    with pytest.raises(UsageError, match=r"mask has shape \(2,\), expected \(3,\)"):
        edge_mask(Edges(np.ones(2, bool)), tokens, tokens)
