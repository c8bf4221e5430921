"""Agreement with Captum: planted relations between maps, ceilings, and what may not count."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from foveate.faithfulness.agreement import by_pair, captum_agreement, captum_ceiling, excess

N, CELLS = 30, 49


def planted():
    """Two Captum-like maps that share evidence, one method that shares it, one that only shares a habit."""
    rng = np.random.default_rng(0)
    habit, evidence = 3 * rng.random(CELLS), rng.random((N, CELLS))

    def noisy(strength):
        return (habit + strength * evidence + 0.3 * rng.random((N, CELLS)))[:, None]

    maps = {"ig": noisy(1), "saliency": noisy(1), "rollout": noisy(1), "stuck": noisy(0)}
    return maps | {"uniform": np.ones((N, 1, CELLS))}


def table(maps=None):
    return captum_agreement(maps or planted(), ["ig", "saliency"], [f"i{k}" for k in range(N)])


def test_own_agreement_is_scipys_and_self_agreement_is_left_out():
    maps = planted()
    one = table(maps).own.sel({"measure": "spearman", "method": "rollout", "captum": "ig"})
    np.testing.assert_allclose(
        one, [spearmanr(a[0], b[0]).statistic for a, b in zip(maps["rollout"], maps["ig"], strict=True)]
    )
    assert table().own.sel({"method": "ig", "captum": "ig"}).isnull().all()


def test_only_what_belongs_to_the_image_counts():
    agreed = table()
    stuck, rollout = excess(agreed, "stuck"), excess(agreed, "rollout")
    assert float(agreed.own.sel({"measure": "spearman", "method": "stuck"}).mean()) > 0.5
    assert stuck.low < 0 < stuck.high
    assert rollout.low > 0.02
    assert rollout.n == N
    assert excess(agreed, "uniform").estimate == pytest.approx(0.0)


def test_a_method_that_shares_the_evidence_reaches_captums_own_ceiling():
    agreed = table()
    ceiling = captum_ceiling(agreed)
    assert ceiling.low > 0
    assert excess(agreed, "rollout").estimate == pytest.approx(ceiling.estimate, abs=0.03)


def test_missing_maps_and_targets_do_not_count():
    maps = planted()
    maps["rollout"] = maps["rollout"].copy()
    maps["rollout"][3] = np.nan
    agreed = table(maps)
    assert np.isnan(agreed.own.sel({"method": "rollout", "captum": "ig", "measure": "spearman"})[3])
    assert excess(agreed, "rollout").n == N - 1
    doubled = {k: np.concatenate([v, np.full_like(v, np.nan)], axis=1) for k, v in maps.items()}
    np.testing.assert_allclose(table(doubled).own, agreed.own)


def test_top_overlap_of_unrelated_maps_is_the_chance_level():
    rng = np.random.default_rng(4)
    maps = {"ig": rng.random((N, 1, CELLS)), "noise": rng.random((N, 1, CELLS))}
    agreed = captum_agreement(maps, ["ig"], [str(i) for i in range(N)])
    assert float(agreed.null.sel({"measure": "top_overlap", "method": "noise"}).mean()) == pytest.approx(
        5 / 49, abs=0.02
    )


def test_pairs_are_the_means_over_images_and_a_method_is_not_paired_with_itself():
    agreed = table()
    pairs = by_pair(agreed)
    assert len(pairs) == 2 * (5 * 2 - 2)
    one = next(p for p in pairs if (p["measure"], p["method"], p["captum"]) == ("spearman", "rollout", "ig"))
    chosen = agreed.sel({"measure": "spearman", "method": "rollout", "captum": "ig"})
    assert one["own"] == pytest.approx(float(chosen.own.mean()))
    assert one["excess"] == pytest.approx(float((chosen.own - chosen.null).mean()))
    assert one["low"] < one["excess"] < one["high"]
