"""Tracker, rules and refiner against a slow float64 oracle, under both rules and with few and many tracks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from daq_models import GivenSegments, given_segments
from daq_oracle import Oracle, OracleTrack, chains, score
from foveate_dvis.daq.linking import chained, link_queries
from foveate_dvis.daq.outputs import ABSENT, DaqOutputs
from foveate_dvis.daq.slots import starting_queries

TOLERANCE = 1e-9
STRICT = {"select_threshold": 0.6, "first_threshold": 0.6, "keep_threshold": 0.5, "noise_frames": 2}
RULES: list[dict[str, Any]] = [
    {**STRICT, "ovis_rule": True},
    {**STRICT, "ovis_rule": False},
    {**STRICT, "ovis_rule": True, "patience": 1, "position_cache": 2},
    {**STRICT, "ovis_rule": False, "patience": 3, "noise_frames": 5, "slots": 0},
]


def oracle(model: GivenSegments) -> tuple[Oracle, list[OracleTrack], list[int]]:
    """The oracle, its tracks, and the numbers of those it keeps."""
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    slow = Oracle(weights, model.config)
    given = model.given
    tracks = slow.run(given.logits.numpy(), given.masks.numpy(), given.embeds.numpy(), given.features.numpy())
    length = len(given.embeds)
    shortest = model.config.tracker.noise_frames
    kept = [
        i
        for i, track in enumerate(tracks)
        if not (len(track.seen) < shortest and track.start + len(track.seen) < length)
    ]
    return slow, tracks, kept


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("seed", [0, 5, 6, 7])
def test_tracks_scores_and_masks(rules: dict[str, Any], seed: int) -> None:
    model, clip = given_segments(count=5, seed=seed, **rules)
    out = model(clip)
    _, tracks, kept = oracle(model)
    assert [(t.start, list(t.appearance), t.dead) for t in out.tracks] == [
        (t.start, t.seen, t.dead) for t in tracks
    ]
    assert out.ids == tuple(kept)
    _check_masks(out, tracks, kept)


def _check_masks(out: DaqOutputs, tracks: list[OracleTrack], kept: list[int]) -> None:
    for row, number in enumerate(kept):
        track = tracks[number]
        close(out.pred_logits[row], np.mean(track.logits, axis=0))
        life = slice(track.start, track.start + len(track.seen))
        close(out.pred_masks[row, life], np.array(track.masks))
        close(out.frame_logits[row, life], np.array(track.logits))
        assert out.alive[row].nonzero()[:, 0].tolist() == list(range(*life.indices(len(out.rows))))
        outside = ~out.alive[row]
        assert (out.pred_masks[row, outside] == ABSENT).all()
        assert (out.frame_logits[row, outside, :-1] == ABSENT).all()


def test_the_rules_tell_cases_apart() -> None:
    """The gate, the patience and the noise rule each change something here, so agreement means something."""
    found = []
    for rules in RULES:
        model, clip = given_segments(count=5, seed=5, **rules)
        out = model(clip)
        found.append((out.tracks, out.ids))
    for one in range(len(found)):
        for other in range(one):
            assert found[one] != found[other]


@pytest.mark.parametrize("ovis", [True, False])
@pytest.mark.parametrize(("seed", "top"), [(0, 4), (5, 40), (6, 3), (7, 1)])
def test_offline(seed: int, top: int, ovis: bool) -> None:
    """Seeds with more tracks than places, with fewer, and filled up; odd seeds with the temporal convolution."""
    model, clip = given_segments("offline", count=4, seed=seed, top=top, **(STRICT | {"ovis_rule": ovis}))
    out = model(clip)
    slow, tracks, kept = oracle(model)
    refined = out.refined
    assert refined is not None
    order = sorted(kept, key=lambda i: -score(np.mean(tracks[i].logits, axis=0)))[:top]
    places = max(model.config.num_new_ins - len(order), 0)
    embeds, logits = model.given.embeds.numpy(), model.given.logits.numpy()
    links = chains(embeds)
    linked = [np.array([embeds[t][order_t[q]] for t, order_t in enumerate(links)]) for q in range(len(links[0]))]
    means = [
        np.mean([logits[t][order_t[q]] for t, order_t in enumerate(links)], axis=0) for q in range(len(links[0]))
    ]
    fill = sorted(range(len(means)), key=lambda q: -score(means[q]))[:places]
    assert refined.ids == (*order, *fill)
    assert refined.linked == (False,) * len(order) + (True,) * len(fill)
    states = np.array([_over_clip(tracks[i], len(embeds)) for i in order] + [linked[q] for q in fill])
    expected, importance, mask_embeds = slow.refine(states, embeds)
    close(refined.logits, expected)
    close(refined.importance, importance)
    close(refined.masks, np.einsum("ntc,tcyx->ntyx", mask_embeds, model.given.features.numpy()))
    before = [np.mean(tracks[i].logits, axis=0) for i in order] + [means[q] for q in fill]
    close(refined.unrefined_logits, np.array(before))
    lives = [
        [not t.start <= f < t.start + len(t.seen) for f in range(len(embeds))] for t in (tracks[i] for i in order)
    ]
    assert refined.padding.tolist() == lives + [[False] * len(embeds)] * len(fill)


def _over_clip(track: OracleTrack, length: int) -> list[Any]:
    after = length - track.start - len(track.states)
    return [track.position] * track.start + track.states + [track.position] * after


# ---------------------------------------------------------------------------------------- assignments


@pytest.mark.parametrize("seed", range(5))
def test_chains_are_the_best_permutation(seed: int) -> None:
    embeds = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = link_queries(list(embeds))
    assert found.tolist() == chains(embeds.numpy())
    together = chained(list(embeds), found)
    assert torch.equal(together[2, 3], embeds[3, found[3, 2]])


def test_chains_follow_queries_that_change_places() -> None:
    base = torch.randn(6, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    orders = [torch.randperm(6, generator=torch.Generator().manual_seed(t)) for t in range(4)]
    together = chained([base[o] for o in orders], link_queries([base[o] for o in orders]))
    for t in range(1, 4):
        assert torch.equal(together[:, t], together[:, 0])


@pytest.mark.parametrize("rows", [3, 5, 9])
def test_starting_queries(rows: int) -> None:
    """By brute force: the best assignment of as many rows as there are queries; the others take their nearest."""
    import itertools

    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 8, generator=generator, dtype=torch.float64)
    queries = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    likeness = torch.nn.functional.cosine_similarity(x[:, None], queries[None], dim=-1)
    few = min(rows, 5)
    best = max(
        (
            dict(zip(chosen, order, strict=True))
            for chosen in itertools.combinations(range(rows), few)
            for order in itertools.permutations(range(5), few)
        ),
        key=lambda pairs: sum(float(likeness[r, q]) for r, q in pairs.items()),
    )
    expected = [best.get(row, int(likeness[row].argmax())) for row in range(rows)]
    assert starting_queries(x, queries).tolist() == expected


def close(ours: torch.Tensor, expected: Any) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), expected, atol=TOLERANCE, rtol=1e-9)
