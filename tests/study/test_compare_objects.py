"""Two detectors are compared on the object that both found, whatever their queries are called."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from detector_fakes import WINDOWS, WindowDetector, spots
from foveate.data.run import Run
from foveate.errors import UsageError
from foveate.interfaces import Target
from foveate.study.attribute import Settings, attribute_run
from foveate.study.capture import run_capture
from foveate.study.compare import compare_runs
from foveate.study.compare_objects import SIDES, common_objects, of_queries, surest_objects
from foveate.study.faithfulness import run_faithfulness

NAN = float("nan")


def explained(rows):
    """One image's targets: (query, label, score, box); None is an unused slot."""
    rows = [(-1, "", NAN, (NAN,) * 4) if row is None else row for row in rows]
    query, label, score, box = zip(*rows, strict=True)
    dims = ("sample", "target")
    return xr.Dataset(
        {
            "target_object": (dims, np.array([query])),
            "target_label": (dims, np.array([label], object)),
            "score": (dims, np.array([score])),
            "target_box": ((*dims, "edge"), np.array([box])),
        }
    )


BOX, FAR = (0.0, 0.0, 10.0, 10.0), (20.0, 20.0, 30.0, 30.0)


def test_the_surest_object_that_both_found_is_compared():
    a = explained([(7, "cat", 3.0, FAR), (2, "cat", 2.0, BOX), (4, "dog", 1.0, BOX)])
    b = explained([(0, "dog", 9.0, (1.0, 0.0, 10.0, 10.0)), (1, "cat", 2.0, (0.0, 0.0, 9.0, 10.0)), None])
    assert common_objects(a, b) == (np.array([1]), np.array([1]))


@pytest.mark.parametrize(
    "other",
    [
        (0, "dog", 1.0, BOX),  # another label
        (0, "cat", 1.0, (0.0, 6.0, 10.0, 16.0)),  # too far
        (0, "cat", 1.0, (NAN,) * 4),
        None,
    ],
)
def test_images_without_a_common_object_have_none(other):
    found = common_objects(explained([(3, "cat", 1.0, BOX)]), explained([other]))
    assert [int(one[0]) for one in found] == [-1, -1]


class Renamed(WindowDetector):
    """The same detector, whose answers come in another order because it is unsure of the first window."""

    def forward(self, batch, *, grad=False):
        self.module(batch.inputs)
        p = super().forward(batch, grad=grad)
        weight = p.new_tensor(self.weights)
        return p * weight

    weights = (1.0, 1.0, 1.0)

    def readout(self, batch, outputs, bound=None):
        return {}

    def fixed_readout(self, batch):
        return {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, sample in enumerate(spots([(0, 1), (2,), (), (0, 2), (1, 2)])):
        Image.fromarray(sample.pixels).save(folder / f"{i}.png")
    made = []
    for name, weights in (("a", (1.0, 1.0, 1.0)), ("b", (0.7, 1.0, 0.0))):  # b never sees window 2
        source = Renamed()
        source.weights = weights
        out = tmp_path_factory.mktemp(name) / "run.zarr"
        run_capture(source, folder, out)
        run = Run.open(out)
        attribute_run(run, ("inputxgrad_abs",), source=source)
        made.append((Run.open(out), source))
    return made


def test_compare_runs_of_two_detectors(runs):
    (a, _), (b, _) = runs
    report = compare_runs(a, b, method="inputxgrad_abs")
    assert len(report.result.kept) == 3  # images 0, 3 and 4 have a window that both see
    first, second = report.maps
    for i in report.result.kept:
        assert first.labels[i] == second.labels[i] == "0"
    spearman = report.to_dict()["measures"]["spearman"]
    assert spearman["own"]["n"] == 3
    assert spearman["own"]["estimate"] > 0.5 > spearman["null"]["high"]  # below 1: most cells tie at zero


def test_an_edge_of_a_box_has_no_leaderboard(runs):
    run, source = runs[0]
    source.targets = (*WindowDetector.targets, "box_top")
    settings = Settings(Target("box_top", scale="logit"), overwrite=True)
    attribute_run(run, ("saliency",), source=source, settings=settings)
    with pytest.raises(UsageError, match="either way"):
        run_faithfulness(run, source=source, methods=["saliency"])


def test_windows_of_one_class_do_not_overlap():
    """What the tests above rest on."""
    (t0, l0, b0, r0), (t1, l1, b1, r1) = WINDOWS[:2]
    assert b0 <= t1 or b1 <= t0 or r0 <= l1 or r1 <= l0


def answers(label, box, query=0):
    data = {"label": (("sample", "rank"), np.array([[label]], object)), "object": (("sample", "rank"), [[query]])}
    data |= {f"box_{side}": (("sample", "rank"), [[edge]]) for side, edge in zip(SIDES, box, strict=True)}
    return xr.Dataset(data)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (("cat", (0.0, 0.0, 9.0, 10.0)), True),
        (("cat", FAR), False),
        (("dog", BOX), False),
        (("cat", (NAN,) * 4), True),  # a segmenter has no boxes: the label is all that is known
    ],
)
def test_readout_rows_are_of_one_object_where_label_and_box_agree(other, same):
    a, b = surest_objects(answers("cat", BOX), answers(*other))
    assert (a == b) is same


def test_only_detectors_have_object_queries():
    assert of_queries(answers("cat", BOX, 3))
    assert not of_queries(answers("cat", BOX, -1))
