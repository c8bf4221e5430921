"""The leaderboard on planted scores: verdicts, ranks over protocols, what is not ranked, what the words claim."""

import csv
import io
import json

import numpy as np
import pytest
import xarray as xr

from foveate.errors import UsageError
from foveate.faithfulness.agreement import captum_agreement
from foveate.faithfulness.leaderboard import ProtocolKey, build_leaderboard, ranks_of
from foveate.faithfulness.tables import caption, to_csv, to_dict, to_markdown, to_text

METHODS = ("good", "flat", "bad", "wild", "random", "uniform", "oracle")
EFFECT = {"good": -0.2, "flat": 0.0, "bad": 0.15, "wild": -0.3, "random": 0.0, "uniform": 0.0, "oracle": -0.4}


def scores(n=40, *, seed=1, targets=False, flip=False):
    """Areas with a shared difficulty per image, a planted effect per method, and small noise."""
    rng = np.random.default_rng(seed)
    image = rng.normal(0.5, 0.2, n)[:, None, None, None]
    area = np.stack([image + 0.05 * rng.normal(size=(n, 2, 2, 2)) for _ in METHODS])
    for m, name in enumerate(METHODS):
        effect = EFFECT[name]
        area[m, :, 0] += effect
        area[m, :, 1] -= effect
    if flip:  # under logits the first two change places
        area[0, ..., 1], area[1, ..., 1] = area[1, ..., 1].copy(), area[0, ..., 1].copy()
    dims = ("method", "sample", "mode", "baseline", "scale")
    if targets:
        area, dims = np.stack([area, area + 0.1], 2), ("method", "sample", "target", *dims[2:])
    return xr.Dataset(
        {
            "area": (dims, area),
            "role": ("method", ["method"] * 4 + ["control"] * 3),
            "converged": ("method", [1.0, 1.0, 1.0, 0.4, 1.0, 1.0, 1.0]),
            "seed_spearman": ("method", [np.nan, np.nan, np.nan, 0.31, np.nan, np.nan, np.nan]),
            "localisation": (("method", "sample", "measure"), rng.random((7, n, 2))),
        },
        coords={
            "method": list(METHODS),
            "mode": ["deletion", "insertion"],
            "baseline": ["mean", "blur"],
            "scale": ["probability", "logit"],
            "measure": ["pointing", "roc_auc"],
        },
        attrs={"model": "planted", "target": "class", "random_orders": 20},
    )


def row(board, name):
    return next(r for r in board.rows if r.method == name)


def test_verdicts_are_the_planted_ones():
    board = build_leaderboard(scores())
    verdicts = {r.method: r.versus_random.verdict for r in board.rows if r.versus_random}
    assert verdicts == {
        "good": "better",
        "wild": "better",
        "oracle": "better",
        "bad": "worse",
        "flat": "inconclusive",
        "uniform": "inconclusive",
    }
    assert row(board, "random").versus_random is None
    assert (row(board, "good").protocols_better, row(board, "bad").protocols_worse) == (8, 8)


def test_means_and_differences_are_plain_arithmetic():
    data = scores()
    board = build_leaderboard(data)
    good = data["area"].sel({"method": "good", "mode": "deletion", "baseline": "mean", "scale": "probability"})
    rand = data["area"].sel({"method": "random", "mode": "deletion", "baseline": "mean", "scale": "probability"})
    assert row(board, "good").deletion == pytest.approx(float(good.mean()))
    assert row(board, "good").versus_random.difference.estimate == pytest.approx(float((good - rand).mean()))
    assert row(board, "good").versus_random.superiority == pytest.approx(float((good < rand).mean()))


def test_controls_and_what_did_not_converge_are_not_ranked():
    board = build_leaderboard(scores())
    assert [r.method for r in board.ranked] == ["good", "flat", "bad"]
    assert [r.method for r in board.unranked] == ["wild"]
    assert {r.method for r in board.controls} == {"random", "uniform", "oracle"}
    assert row(board, "wild").ranks is None
    assert row(board, "good").ranks == (1, 1)


def test_a_ranking_that_a_protocol_turns_round_says_so():
    board = build_leaderboard(scores(flip=True))
    assert row(board, "good").ranks == (1, 2)
    assert row(board, "flat").ranks == (1, 2)
    assert row(board, "bad").ranks == (3, 3)
    other = build_leaderboard(scores(flip=True), main=ProtocolKey("deletion", "mean", "logit"))
    assert other.ranked[0].method == "flat"


def test_ranks_of_saturated_scores_tie():
    losses = np.array([0.5, 0.5 + 1e-5, 0.2, 0.8])
    np.testing.assert_array_equal(ranks_of(losses), [2, 2, 1, 4])
    np.testing.assert_array_equal(ranks_of(np.full(3, 0.4)), [1, 1, 1])


def test_insertion_as_main_protocol_wants_large_areas():
    board = build_leaderboard(scores(), main=ProtocolKey("insertion", "blur", "logit"))
    assert board.ranked[0].method == "good"
    assert row(board, "good").versus_random.verdict == "better"
    assert row(board, "good").versus_random.difference.estimate > 0


def test_the_unit_is_the_image_however_many_targets_it_has():
    one, two = build_leaderboard(scores()), build_leaderboard(scores(targets=True))
    assert two.n == one.n == 40
    assert row(two, "good").versus_random.difference == pytest.approx(row(one, "good").versus_random.difference)
    assert row(two, "good").deletion == pytest.approx(row(one, "good").deletion + 0.05)


def test_the_order_of_images_does_not_change_the_table():
    data = scores()
    mixed = data.isel(sample=np.random.default_rng(1).permutation(40))
    a, b = build_leaderboard(data), build_leaderboard(mixed)
    assert [r.method for r in a.rows] == [r.method for r in b.rows]
    for x, y in zip(a.rows, b.rows, strict=True):
        assert (x.deletion, x.insertion) == pytest.approx((y.deletion, y.insertion))
        assert x.ranks == y.ranks
        if x.versus_random:
            assert x.versus_random.p_holm == pytest.approx(y.versus_random.p_holm)


def test_missing_images_do_not_count():
    data = scores()
    data["area"][0, :4] = np.nan
    board = build_leaderboard(data)
    assert row(board, "good").n == 36
    assert row(board, "good").versus_random.difference.n == 36
    assert board.n == 40


def test_best_is_compared_with_every_other_row_but_the_oracle():
    board = build_leaderboard(scores())
    assert set(board.pairwise) == {"flat", "bad", "wild", "random", "uniform"}
    assert board.pairwise["flat"].verdict == "better"
    assert board.pairwise["wild"].verdict == "worse"


def test_text_says_what_beats_what_and_what_does_not_hold():
    board = build_leaderboard(scores())
    words = " ".join(to_text(board).split())
    assert "planted, target class, 40 images" in words
    assert "Better than random: good. Worse: bad. Inconclusive: flat." in words
    assert "good is first; it beats" in words
    assert "Not ranked: wild, only 40% of its maps converged (seed-to-seed Spearman 0.310)." in words
    assert "(random)" in words
    assert "wild [not converged]" in words
    lines = to_text(board).splitlines()
    assert lines[2].split()[:3] == ["rank", "range", "method"]
    assert max(len(line) for line in lines[2:12]) < 160
    body = [line for line in lines if line.startswith("1 ")]
    assert len(body) == 1
    assert "good" in body[0]


def test_one_image_gives_numbers_but_no_verdict():
    board = build_leaderboard(scores(1))
    assert row(board, "good").versus_random.verdict == "no interval"
    assert "One image: no interval, no test, no verdict." in caption(board)
    assert "[" not in next(line for line in to_text(board).splitlines() if line.startswith("1 "))
    assert "Only 5 images" in " ".join(caption(build_leaderboard(scores(5))))


def test_agreement_stands_beside_the_ranking_and_does_not_move_it():
    rng = np.random.default_rng(0)
    maps = {name: rng.random((40, 1, 25)) for name in METHODS}
    maps["bad"] = maps["flat"].copy()
    table = captum_agreement(maps, ["flat", "wild"], [str(i) for i in range(40)])
    plain, with_it = build_leaderboard(scores()), build_leaderboard(scores(), table)
    assert [r.method for r in plain.rows] == [r.method for r in with_it.rows]
    assert row(with_it, "bad").agreement["spearman"].estimate == pytest.approx(0.5, abs=0.1)
    assert set(with_it.ceilings) == {"captum", "seeds"}
    assert "never part of the ranking" in " ".join(caption(with_it))
    assert "Captum rho" in to_text(with_it)
    assert "Captum rho" not in to_text(plain)


def test_all_forms_hold_the_same_rows():
    board = build_leaderboard(scores())
    table = list(csv.DictReader(io.StringIO(to_csv(board))))
    data = json.loads(json.dumps(to_dict(board), allow_nan=False))
    assert [r["method"] for r in table] == [r["method"] for r in data["rows"]] == [r.method for r in board.rows]
    assert float(table[0]["deletion"]) == data["rows"][0]["deletion"] == board.rows[0].deletion
    assert len(to_markdown(board).split("| rank")[1].split("\n\n")[0].splitlines()) == 2 + len(METHODS)


def test_bad_input_is_named():
    with pytest.raises(UsageError, match="random"):
        build_leaderboard(scores().isel({"method": slice(0, 3)}))
    with pytest.raises(UsageError, match="no scores for"):
        build_leaderboard(scores(), main=ProtocolKey("deletion", "black", "logit"))


def test_rows_over_fewer_images_say_over_how_many():
    whole = to_text(build_leaderboard(scores())).splitlines()
    assert " n " not in whole[2]
    data = scores()
    data["area"][0, :4] = np.nan
    board = build_leaderboard(data)
    lines = to_text(board).splitlines()
    assert lines[2].split()[:4] == ["rank", "range", "method", "n"]
    for line in lines[3 : 3 + len(board.rows) + 1]:
        words = line.split()
        for one in board.rows:
            if one.is_ranked and one.method in words:
                assert words[words.index(one.method) + 1] == str(one.n) == ("36" if one.method == "good" else "40")
    assert any("good" in line and " 36 " in line for line in lines)
