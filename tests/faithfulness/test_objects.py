"""Objects in the faithfulness job: placed, followed two ways, averaged within images, held against their box."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from detector_fakes import WINDOWS, WindowDetector, bound_spots, spots
from foveate.attribution.objective import Objective
from foveate.data.run import Run
from foveate.errors import UsageError
from foveate.faithfulness.curves import Protocol
from foveate.faithfulness.leaderboard import CONTROL, build_leaderboard
from foveate.faithfulness.objects import mean_over_objects
from foveate.faithfulness.readings import read_as, readings_of, vanished_share
from foveate.faithfulness.scoring import Scoring, score_maps
from foveate.faithfulness.tables import caption, to_text
from foveate.geometry import CellGrid
from foveate.interfaces import Target
from foveate.study.attribute import Settings as AttributeSettings
from foveate.study.attribute import attribute_run
from foveate.study.capture import run_capture
from foveate.study.faithfulness import estimate_faithfulness, run_faithfulness
from foveate.study.faithfulness_inputs import bind
from foveate.study.faithfulness_job import Settings
from foveate.testing.tiny import TinySource

SCENES = [(0, 1), (), (2,), (1, 2), (0, 1, 2)]
SCORING = Scoring(Protocol(baselines=("zero",), steps=4), random_orders=4)
CELLS = CellGrid.regular(4, 4, height=32, width=32)


class Detector(WindowDetector):
    """Answers that attention does not explain: the tap must see the tiny model run, so it does."""

    def forward(self, batch, *, grad=False):
        self.module(batch.inputs)
        return super().forward(batch, grad=grad)

    def readout(self, batch, outputs, bound=None):
        return {}

    def fixed_readout(self, batch):
        return {}


@pytest.fixture(scope="module")
def source():
    return Detector()


@pytest.fixture(scope="module")
def run(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("scenes")
    for i, sample in enumerate(spots(SCENES)):
        Image.fromarray(sample.pixels).save(folder / f"{i}.png")
    run_capture(source, folder, folder / "run.zarr")
    made = Run.open(folder / "run.zarr")
    attribute_run(made, ("inputxgrad", "ablation"), source=source, settings=AttributeSettings(batch_size=2))
    return Run.open(folder / "run.zarr")


@pytest.fixture(scope="module")
def report(run, source):
    return run_faithfulness(run, source=source, settings=Settings(SCORING, batch_size=2))


def test_every_object_is_stored_with_its_query_and_box(run):
    stored = run.product("attributions/inputxgrad")
    assert stored.sizes["target"] == 3  # as many as any image has
    for i, queries in enumerate(SCENES):
        found = stored["target_object"].values[i].tolist()
        assert sorted(q for q in found if q >= 0) == sorted(queries)
        for slot, query in enumerate(found):
            if query >= 0:
                np.testing.assert_allclose(stored["target_box"].values[i, slot], WINDOWS[query])
                assert np.isfinite(stored["map"].values[i, slot]).all()
            else:
                assert np.isnan(stored["target_box"].values[i, slot]).all()
                assert np.isnan(stored["map"].values[i, slot]).all()


def test_one_object_can_be_asked_for(run, source):
    asked = AttributeSettings(Target(object=2, scale="logit"), overwrite=True)
    attribute_run(run, ("saliency",), source=source, settings=asked)
    stored = run.product("attributions/saliency")
    assert stored["target_object"].values.tolist() == [[2]] * 5
    with pytest.raises(UsageError, match="different targets"):
        run_faithfulness(run, source=source, settings=Settings(SCORING))
    import shutil

    shutil.rmtree(run.path / "attributions" / "saliency")


def test_objects_are_read_by_query_and_by_match(run, report):
    curves = run.product("faithfulness/curves")
    assert curves["scale"].values.tolist() == ["probability", "logit", "probability@match"]
    by_query = curves["curve"].sel(scale="probability").values
    by_match = curves["curve"].sel(scale="probability@match").values
    single = curves["method"].values != "random"
    followed = np.where(by_query > 0.5, by_query, 0.0)  # the fake loses what is below its threshold
    known = np.isfinite(by_query)
    np.testing.assert_allclose(
        by_match[:, :, single][known[:, :, single]], followed[:, :, single][known[:, :, single]]
    )
    assert known.any(axis=tuple(range(2, known.ndim))).sum(1).tolist() == [len(scene) for scene in SCENES]


def test_vanished_objects_are_counted(run, report):
    scores = run.product("faithfulness/scores")
    curves = run.product("faithfulness/curves")["curve"].sel(scale="probability@match")
    gone = scores["vanished"].sel({"method": "inputxgrad"}).values
    truth = (curves.sel({"method": "inputxgrad"}).values == 0).mean(-1)
    known = np.isfinite(gone)
    np.testing.assert_allclose(gone[known], truth[known])
    assert known[..., 0, 0].sum() == 8
    assert 0 < scores.attrs["vanished_share"] < 1
    assert np.isnan(scores["vanished"].sel({"method": "random"})).all()
    assert any("vanished and scores 0" in line for line in caption(report.board))
    row = next(r for r in report.board.rows if r.method == "inputxgrad")
    area = scores["area"].sel({"method": "inputxgrad", "mode": "deletion", "scale": "probability@match"})
    assert row.deletion_by_match == pytest.approx(np.nanmean(np.nanmean(area.values[[0, 2, 3, 4]], axis=1)))
    assert row.deletion_by_match <= row.deletion
    assert "by match" in to_text(report.board)


def test_the_own_box_is_a_control_and_what_beats_it_is_said(run, report):
    rows = {row.method: row for row in report.board.rows}
    assert rows["own_box"].role == CONTROL
    assert "own_mask" not in rows
    assert "oracle" not in rows
    # the model uses its windows and nothing else: nothing can beat the windows
    assert rows["own_box"].deletion <= min(row.deletion for row in rows.values()) + 1e-6
    assert set(report.board.beyond) == {"own_box"}
    assert set(report.board.beyond["own_box"]) == {"inputxgrad", "ablation"}
    assert any("own box, filled evenly" in line for line in caption(report.board))
    assert rows["own_box"].localisation["roc_auc"].estimate > 0.9
    assert run.product("faithfulness/curves").attrs["localisation_of"] == "own box"


def test_images_count_once_whatever_their_objects(run, report):
    assert report.board.n == 4  # one of five has no object
    scores = run.product("faithfulness/scores")["area"]
    row = next(r for r in report.board.rows if r.method == "inputxgrad")
    values = scores.sel({"method": "inputxgrad", "mode": "deletion", "scale": "probability"}).values[..., 0]
    assert row.deletion == pytest.approx(np.nanmean(np.nanmean(values[[0, 2, 3, 4]], axis=1)))


def test_curves_do_not_depend_on_batches_and_equal_a_direct_computation(run, report, source):
    stored = run.product("attributions/ablation")
    position, slot = 4, 1
    query = int(stored["target_object"].values[position, slot])
    bound = bind(source, [run.load_sample(position)], Target(object=query))
    maps = {"ablation": stored["map"].values[position, slot].reshape(1, -1).astype(float)}
    direct = score_maps(bound.objective, maps, run.grid, SCORING)
    mine = (
        run.product("faithfulness/curves")["curve"].sel({"method": "ablation"}).values[position, slot, ..., :2, :]
    )
    np.testing.assert_allclose(mine, direct.curves[0, 0], atol=1e-6)


def test_the_estimate_counts_objects(run, source):
    cost = estimate_faithfulness(run, source=source, settings=Settings(SCORING))
    maps = len(cost.methods) - 1
    assert cost.forwards == 8 * ((2 * maps + 4) * 3 + 2)


def test_an_object_at_the_threshold_is_left_out_not_mixed_up(source):
    """The maps know objects 1 and 2 of an image whose best object is now 0."""
    stored = np.array([[2, 1, -1]], np.int32)
    sample = spots([(0, 1, 2)])
    bound = bind(source, sample, Target(), stored)
    assert [row.object for row in bound.objective.bound.rows] == [1, 2]
    assert bound.slots == ((0, 1), (0, 0))
    assert bind(source, sample, Target(), np.array([[7, -1, -1]], np.int32)) is None


def test_a_run_without_objects_says_so(tmp_path, source):
    Image.fromarray(spots([()])[0].pixels).save(tmp_path / "0.png")
    run_capture(source, tmp_path, tmp_path / "run.zarr")
    with pytest.raises(UsageError, match="has a target"):
        attribute_run(Run.open(tmp_path / "run.zarr"), ("saliency",), source=source)


def test_readings_change_the_kind_and_nothing_else(source):
    _, bound = bound_spots(source, [(0, 2)])
    followed = read_as(bound, "probability@match")
    assert [row.kind for row in followed.rows] == ["class@match"] * 2
    assert followed.scale == "probability"
    assert [row.object for row in followed.rows] == [row.object for row in bound.rows]
    assert read_as(followed, "probability@match").rows == followed.rows
    assert read_as(bound, "logit") == bound.at("logit") or read_as(bound, "logit").rows == bound.rows
    assert readings_of(source, "class", ("probability", "logit"))[-1] == "probability@match"
    assert readings_of(source, "class", ("value",)) == ("value",)
    assert readings_of(TinySource(), "class", ("probability",)) == ("probability",)
    np.testing.assert_array_equal(vanished_share(np.array([[0.0, 0.5, 0.0, 1.0]])), [0.5])


def test_padding_comes_last_in_every_order(source, monkeypatch):
    import foveate.faithfulness.scoring as scoring

    batch, bound = bound_spots(source, [(1,)])
    visible = np.arange(16)[None] < 10
    seen, real = [], scoring.perturbation_curves
    monkeypatch.setattr(
        scoring, "perturbation_curves", lambda o, orders, *rest: seen.append(orders) or real(o, orders, *rest)
    )
    maps = {"a": np.arange(16.0)[None]}  # would delete the padding first
    score_maps(Objective(source, batch, bound), maps, CELLS, SCORING, visible)
    (orders,) = seen
    assert orders.shape == (5, 1, 16)
    assert (np.sort(orders[..., 10:]) == np.arange(10, 16)).all()
    assert orders[0, 0, :10].tolist() == list(range(9, -1, -1))
    assert len({tuple(one) for one in orders[1:, 0].tolist()}) == 4


def areas(values):
    """(method, sample, target) to the leaderboard's dims."""
    data = xr.DataArray(
        values[..., None, None, None], dims=("method", "sample", "target", "mode", "baseline", "scale")
    )
    names = ["m", "own_box", "random"]
    return data.assign_coords(
        {"method": names, "mode": ["deletion"], "baseline": ["zero"], "scale": ["probability"]}
    )


def test_objects_that_a_method_lacks_do_not_count_for_the_others_either():
    values = np.random.default_rng(0).random((3, 6, 4))
    values[0, 0, 1:] = np.nan  # m explains only the first object of image 0
    values[0, 1] = np.nan  # and nothing of image 1
    found = mean_over_objects(areas(values)).values[..., 0, 0, 0]
    np.testing.assert_allclose(found[:, 0], values[:, 0, 0])
    assert np.isnan(found[0, 1])
    np.testing.assert_allclose(found[1:, 1], values[1:, 1].mean(-1))
    np.testing.assert_allclose(found[:, 2:], values[:, 2:].mean(-1))


def test_a_method_that_only_finds_the_box_is_told_from_one_that_explains_more():
    rng = np.random.default_rng(1)
    random = 0.6 + 0.05 * rng.random((30, 2))
    box = random - 0.2
    scores = xr.Dataset(
        {
            "area": areas(np.stack([box - 0.1 - 0.01 * rng.random((30, 2)), box, random])),
            "role": ("method", ["method", CONTROL, CONTROL]),
            "converged": ("method", [1.0, 1.0, 1.0]),
        }
    )
    assert build_leaderboard(scores).beyond["own_box"]["m"].verdict == "better"
    scores["area"][0] = scores["area"][1] + 0.001 * rng.standard_normal((30, 2, 1, 1, 1))
    board = build_leaderboard(scores)
    assert board.rows[0].versus_random.verdict == "better"
    assert board.beyond["own_box"]["m"].verdict == "inconclusive"
