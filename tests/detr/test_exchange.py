"""Grounding DINO's exchange of words and picture: one module, two softmaxes, two sites."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from detr_models import photos, tiny
from foveate.capture.certify import certify
from foveate.capture.engine import capture_batch
from foveate.capture.intervening import intervene
from foveate.capture.interventions import AblateHeads, Knockout
from foveate.capture.owners import Places
from foveate.capture.trace import trace
from foveate.interfaces import CallKey, CapturePlan, SitePlan

WORDS, PICTURE = "encoder.words", "encoder.picture"


def opened() -> tuple[Any, Any]:
    source: Any = tiny("Grounding DINO", dtype="float64")
    return source, source.encode(photos((64, 96), (80, 70)))


def by_hand(source: Any, batch: Any) -> dict[CallKey, torch.Tensor]:
    """Both attention matrices of every fusion layer from what its module was given (float64).

    Liu et al. 2023 (arXiv:2303.05499), after GLIP: one product of projected picture and words; its rows give what
    the picture reads, its columns what the words read.
    """
    found: dict[CallKey, torch.Tensor] = {}
    hooks = []

    def listen(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            names = ("vision_features", "text_features", "vision_attention_mask", "text_attention_mask")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            picture, words, hidden, absent = (given.get(name) for name in names)
            q, k = (
                p(x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
                for p, x in ((module.vision_proj, picture), (module.text_proj, words))
            )
            scores = torch.einsum("bhid,bhtd->bhit", q, k) / module.head_dim**0.5
            of_picture, of_words = scores, scores.transpose(-1, -2)
            if hidden is not None:
                of_words = of_words.masked_fill(hidden[:, None, None], -torch.inf)
            if absent is not None:
                of_picture = of_picture.masked_fill(absent[:, None, None], -torch.inf)
            found[CallKey(PICTURE, layer)] = of_picture.softmax(-1)
            found[CallKey(WORDS, layer)] = of_words.softmax(-1)

        return hook

    for layer, block in enumerate(source.module.model.encoder.layers):
        hooks.append(block.fusion_layer.attn.register_forward_pre_hook(listen(layer), with_kwargs=True))
    try:
        with torch.no_grad():
            source.forward(batch)
    finally:
        for one in hooks:
            one.remove()
    return found


def test_both_directions_equal_the_definition() -> None:
    source, batch = opened()
    truth = by_hand(source, batch)
    with torch.no_grad():
        found = trace(source, batch)
    assert len(truth) == 4
    for call, expected in truth.items():
        torch.testing.assert_close(found.records[call].rows(slice(None)), expected, atol=1e-12, rtol=0)
        assert expected.std(-1).max() > 1e-3, "not uniform"
    words = found.labels(CallKey(WORDS, 0))
    assert (len(words.query), len(words.key)) == (len(source._ids), 340)
    assert found.certificate.passed
    assert certify(source, batch).passed


def test_padding_is_marked_where_the_words_read() -> None:
    source, batch = opened()
    plan = CapturePlan(tuple(SitePlan(s, rows="all") for s in (WORDS, PICTURE)), dtype="float32")
    kept = capture_batch(source, batch, plan).sites
    free = torch.from_numpy(kept[WORDS].arrays["allowed"])
    assert not free.all()
    assert torch.equal(free[:, 0, 0], source._valid(batch))
    assert "allowed" not in kept[PICTURE].arrays


@pytest.mark.parametrize("site", [WORDS, PICTURE])
def test_one_direction_is_changed_and_the_other_is_not(site: str) -> None:
    source, batch = opened()
    other = WORDS if site == PICTURE else PICTURE
    with torch.no_grad():
        intact = trace(source, batch)
        change = Knockout(site, layers=0, key="at:0-2")
        with intervene(source, [change, AblateHeads(site, layers=0, heads=1, to="mean")]) as done:
            changed = trace(source, batch)
            again = trace(source, batch)  # a second forward in the same context
    assert {one.site for one in done.applied} == {site}
    for found in (changed, again):
        rows = found.records[CallKey(site, 0)].rows(slice(None))
        assert float(rows[..., :3].abs().max()) == 0
        torch.testing.assert_close(rows[:, 1], rows[:, 1, :1].expand_as(rows[:, 1]))
        untouched = (found_in.records[CallKey(other, 0)].rows(slice(None)) for found_in in (found, intact))
        torch.testing.assert_close(*untouched, atol=1e-12, rtol=0)
        assert found.certificate.passed


def test_places_count_the_softmaxes_of_one_module() -> None:
    places = Places(["a.attn#0", "a.attn#1", "b", "c#1"])
    assert [places.find("a.attn", n) for n in range(4)] == ["a.attn#0", "a.attn#1", "a.attn#0", "a.attn#1"]
    assert [places.find("b.inner", n) for n in range(2)] == ["b", "b"]
    assert [places.find("c", n) for n in range(4)] == [None, "c#1", None, "c#1"]
    assert places.find("d", 0) is None
    assert places.find(None, 0) is None
    assert places.of_module("a.attn") == ["a.attn#0", "a.attn#1"]
    assert places.of_module("c") == ["c#1"]
    assert places.of_module("d") == []
