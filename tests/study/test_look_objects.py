"""Looking at one object of a detector: its own query's row, and its answer first."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.errors import UsageError
from foveate.interfaces import Target
from foveate.study.caveats import CLOSE
from foveate.study.look import look
from foveate.testing.tiny import tiny_samples
from foveate.testing.tiny_detector import CROSS, DetectorConfig, TinyDetector


class Detector(TinyDetector):
    """Says so when there is no such query."""

    def bind(self, outputs, batch, target):
        if target.object is not None and not 0 <= target.object < self.queries:
            raise UsageError(f"no object query {target.object}")
        return super().bind(outputs, batch, target)


@pytest.fixture(scope="module")
def source():
    return Detector(DetectorConfig(queries=4))


@pytest.fixture(scope="module")
def pixels():
    return tiny_samples(1, seed=3)[0].pixels


def test_each_object_has_its_own_map_and_answer(source, pixels):
    from foveate.capture.trace import trace
    from foveate.interfaces import CallKey, Sample

    traced = trace(source, source.encode([Sample("a", pixels)]))
    rows = traced.record(CallKey(CROSS, 1)).rows(slice(None))[0].mean(0)
    for query in range(4):
        seen = look(source, pixels, object=query, check=False)
        np.testing.assert_allclose(seen.maps["attention"].values.ravel(), rows[query], atol=1e-6)
        assert seen.predictions[0].object == query
        assert f"object query {query}" in str(seen)
        assert f"{seen.predictions[0].label}  (object query {query})" in str(seen)
    assert sorted(p.object for p in seen.predictions) == [0, 1, 2, 3]


def test_without_one_the_first_object_is_shown(source, pixels):
    batch = source.encode(tiny_samples(1, seed=3))
    first = source.bind(source.forward(batch), batch, Target()).rows[0]
    assert look(source, pixels, check=False).predictions[0].object == first.object


def test_two_objects_are_not_a_close_call(source, pixels):
    seen = look(source, pixels, check=False)
    scores = [p.score for p in seen.predictions]
    assert min(abs(scores[0] - s) for s in scores[1:]) < CLOSE
    assert not any("close call" in caveat for caveat in seen.caveats)


def test_an_unknown_object_is_refused(source, pixels):
    with pytest.raises(UsageError, match="no object query 9"):
        look(source, pixels, object=9)
