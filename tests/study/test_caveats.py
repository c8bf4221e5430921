"""Each caveat appears exactly when its fact holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foveate.geometry import Geometry
from foveate.interfaces import ModelCard, Prediction
from foveate.study.caveats import Facts, caveats
from foveate.study.quick_check import Check

FINE = Facts(
    card=ModelCard("m", "s", "a", weights_sha256="ab"),
    geometry=Geometry.identity(64, 64),
    predictions=(Prediction("cat", 0.9), Prediction("dog", 0.1)),
    evenness=0.6,
    outside=0.05,
    rollout_evenness=0.8,
    sinks=0,
    sink_share=0.0,
    check=Check(0.3, 0.5, 0.4, 0.6, 8),
)


def test_an_unremarkable_look_has_one_caveat_that_attention_is_not_cause() -> None:
    (only,) = caveats(FINE)
    assert "not what decides" in only
    assert "area 0.30, random orders 0.50 (0.40 to 0.60, 8 of them): lower" in only
    assert "one picture proves nothing" in only


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"card": ModelCard("m", "s", "a", weights_sha256="random:ViT:0")}, "weights are random"),
        ({"check": Check(0.7, 0.5, 0.4, 0.6, 8)}, "higher"),
        ({"check": Check(0.5, 0.5, 0.4, 0.6, 8)}, "inside that range"),
        ({"check": Check(skipped="too slow")}, "was not run (too slow)"),
        ({"predictions": ()}, "gives no answer"),
        ({"predictions": (Prediction("cat", 1.0),)}, "only one answer was possible (cat)"),
        ({"predictions": (Prediction("cat", 0.4), Prediction("dog", 0.2))}, "unsure: cat at 0.40"),
        ({"predictions": (Prediction("cat", 0.52), Prediction("dog", 0.48))}, "close call between cat and dog"),
        ({"geometry": Geometry(64, 128, 64, 64, 1.0, 1.0, 0.0, -32.0)}, "did not see 50%"),
        ({"geometry": Geometry(64, 128, 64, 64, 1.0, 0.5)}, "squeezed in width by 2.00"),
        ({"geometry": Geometry(128, 64, 64, 64, 0.5, 1.0)}, "squeezed in height by 2.00"),
        ({"geometry": Geometry(16, 16, 64, 64, 4.0, 4.0)}, "enlarged 4.0 times"),
        ({"outside": 0.4}, "40% of the row"),
        ({"evenness": 0.99}, "nearly uniform (H / ln K = 0.990)"),
        ({"sinks": 1, "sink_share": 0.4}, "1 token receives 40%"),
        ({"sinks": 3, "sink_share": 0.4}, "3 tokens receive 40%"),
        ({"rollout_evenness": 0.99}, "rollout has nearly collapsed"),
    ],
)
def test_a_fact_brings_its_sentence(change: dict[str, object], words: str) -> None:
    assert any(words in sentence for sentence in caveats(replace(FINE, **change)))
    assert not any(words in sentence for sentence in caveats(FINE))


def test_what_could_not_be_measured_is_not_claimed() -> None:
    unknown = replace(FINE, evenness=float("nan"), outside=float("nan"), rollout_evenness=float("nan"))
    assert caveats(unknown) == caveats(FINE)
