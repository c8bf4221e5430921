"""The source's captured attention against what upstream DVIS-DAQ was recorded to compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from daq_models import GOLDEN, golden_meta, golden_tensors, needs_golden
from foveate.capture.certify import certify
from foveate.capture.engine import capture_batch
from foveate.interfaces import CapturePlan, Sample, SitePlan
from foveate.plugins.opening import open_source
from foveate_dvis.daq_sites import POOL, SLOT_ASSIGN, SLOT_CROSS

pytestmark = needs_golden
CASES = ("offline", "online")
QUERIES, SLOTS, FRAMES, WINDOW = 10, 3, 7, 5
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=CASES)
def captured(request):
    """(case, captured sites, recorded maps, meta)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source = open_source(
        "dvis-daq",
        weights=GOLDEN / "state_dict.safetensors",
        config=GOLDEN / request.param / "config.json",
        mode=request.param,
        upstream_exact=True,
        shortest_edge=0,
    )
    clip = golden_tensors("clip")["clip"].permute(0, 2, 3, 1).contiguous().numpy()
    batch = source.encode([Sample("clip", clip)])
    plan = CapturePlan(tuple(SitePlan(site.id, rows="all") for site in source.sites), dtype="float32")
    found = capture_batch(source, batch, plan)
    yield request.param, source, batch, found, golden_tensors(f"{request.param}/attention")
    torch.set_num_threads(threads)


def close(found, expected):
    error = np.abs(found - expected.double().numpy()).max() if found.size else 0.0
    assert found.shape == tuple(expected.shape)
    assert error <= TOLERANCE, error


def number_of_tracks(meta, frame):
    """Recorded seq ids are random: track numbers are their order of birth."""
    order = {track["seq_id"]: i for i, track in enumerate(meta["tracks"])}
    return [order[i] for i in meta["frames"][frame]["row_seq_ids"] if i is not None]


def test_the_proof_holds(captured):
    _, source, batch, found, _ = captured
    assert found.certificate.value_error < 1e-6
    assert not found.certificate.unverified
    assert not found.certificate.undeclared
    proof = certify(source, batch)
    assert proof.identical, "outputs differ with and without capture"
    assert not proof.failures


@pytest.mark.parametrize(("level", "layers"), [(0, 3), (1, 3), (2, 3)])
def test_segmenter_cross_by_level(captured, level, layers):
    _, _, _, found, recorded = captured
    site = found.sites[f"segmenter.cross.p{level}"]
    path = f"sem_seg_head.predictor.transformer_cross_attention_layers.{level}.multihead_attn"
    for call, frames in ((0, slice(0, WINDOW)), (1, slice(WINDOW, FRAMES))):
        close(site.arrays["attention"][0, frames, 0], recorded[f"{path}::{call}::weights"])
        blocked = recorded[f"{path}::{call}::attn_mask"].unflatten(0, (-1, 4)).all(1)
        assert np.array_equal(site.arrays["allowed"][0, frames, 0], ~blocked.numpy())
    assert site.layers == (level,)
    assert (site.key.level == level).all()


def test_segmenter_self(captured):
    _, _, _, found, recorded = captured
    for layer in range(3):
        path = f"sem_seg_head.predictor.transformer_self_attention_layers.{layer}.self_attn"
        for call, frames in ((0, slice(0, WINDOW)), (1, slice(WINDOW, FRAMES))):
            array = found.sites["segmenter.self"].arrays["attention"][0, frames, layer]
            close(array, recorded[f"{path}::{call}::weights"])


def splat(weights, locations, shapes):
    """Points as a dense map, by counting corners: (frame, query, head, cell), float64."""
    frames, queries, heads, levels, _ = weights.shape
    sizes = [int(h * w) for h, w in shapes]
    dense = np.zeros((frames, queries, heads, sum(sizes)))
    for level in range(levels):
        height, width = (int(v) for v in shapes[level])
        x, y = locations[..., level, :, 0] * width - 0.5, locations[..., level, :, 1] * height - 0.5
        for dy in (0, 1):
            for dx in (0, 1):
                column, row = np.floor(x) + dx, np.floor(y) + dy
                share = weights[..., level, :] * (1 - np.abs(x - column)) * (1 - np.abs(y - row))
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                cell = (np.where(inside, row * width + column, 0)).astype(int) + sum(sizes[:level])
                for index in np.argwhere(inside):
                    at = tuple(index)
                    dense[at[0], at[1], at[2], cell[at]] += share[at]
    return dense


def test_pixel_decoder(captured):
    _, _, _, found, recorded = captured
    site = found.sites["pixel_decoder.self"]
    for layer in range(2):
        path = f"sem_seg_head.pixel_decoder.transformer.encoder.layers.{layer}.self_attn::1"
        parts = [recorded[f"{path}::{name}"] for name in ("weights", "sampling_locations", "spatial_shapes")]
        weights, locations, shapes = (part.double().numpy() for part in parts)
        dense = splat(weights, locations, shapes)
        close(site.arrays["attention"][0, WINDOW:, layer], torch.from_numpy(dense.transpose(0, 2, 1, 3)))
    assert len(site.key) == 126
    assert [int((site.key.level == level).sum()) for level in range(3)] == [6, 24, 96]


def test_tracker_rows_are_labelled_by_track(captured):
    case, _, _, found, recorded = captured
    meta, cross, own = golden_meta(case), found.sites["tracker.cross"], found.sites["tracker.self"]
    assert cross.query.label[QUERIES:] == tuple(str(i) for i in range(len(meta["tracks"])))
    for frame in range(FRAMES):
        tracks = number_of_tracks(meta, frame)
        rows = [QUERIES + track for track in tracks] + list(range(QUERIES))
        for layer in range(2):
            at = (0, frame, layer)
            path = f"tracker.transformer_cross_attention_layers.{layer}.multihead_attn::{frame}::weights"
            close(cross.arrays["attention"][at][:, rows], recorded[path][0])
            free = np.zeros_like(cross.arrays["allowed"][at])
            free[rows] = True
            assert np.array_equal(cross.arrays["allowed"][at], free)
            assert not cross.arrays["attention"][at][:, ~free.any(-1)].any()
            path = f"tracker.transformer_self_attention_layers.{layer}.self_attn::{frame}::weights"
            close(own.arrays["attention"][at][:, rows][:, :, rows], recorded[path][0])


def test_slots(captured):
    case, _, _, found, recorded = captured
    meta = golden_meta(case)
    assert not found.sites[SLOT_CROSS].arrays["attention"][0, 0].any()
    assert found.sites[SLOT_CROSS].query.label[SLOTS:] == tuple(str(i) for i in range(len(meta["tracks"])))
    for frame in range(1, FRAMES):
        rows = [SLOTS + track for track in number_of_tracks(meta, frame)] + list(range(SLOTS))
        for layer in range(2):
            path = f"tracker.slot_cross_attention_layers.{layer}"
            array = found.sites[SLOT_CROSS].arrays["attention"][0, frame, layer]
            close(array[:, rows], recorded[f"{path}.multihead_attn::{frame - 1}::weights"][0])
            array = found.sites[SLOT_ASSIGN].arrays["attention"][0, frame, layer, 0]
            weights = recorded[f"{path}.slot_attn::{frame - 1}::weights"][0]
            close(array[np.ix_(rows, rows)], weights.T)


def test_refiner(captured):
    case, _, _, found, recorded = captured
    if case == "online":
        assert not any(site.startswith("refiner") for site in found.sites)
        return
    for layer in range(2):
        close(
            found.sites["refiner.time"].arrays["attention"][0, :, layer],
            recorded[f"refiner.transformer_time_self_attention_layers.{layer}.self_attn::0::weights"],
        )
        close(
            found.sites["refiner.instance"].arrays["attention"][0, :, layer],
            recorded[f"refiner.transformer_obj_self_attention_layers.{layer}.self_attn::0::weights"],
        )
        close(
            found.sites["refiner.cross"].arrays["attention"][0, :, layer],
            recorded[f"refiner.transformer_cross_attention_layers.{layer}.multihead_attn::0::weights"],
        )
    pooled = found.sites[POOL].arrays["attention"][0, :, 0, 0, 0]
    close(pooled, recorded["refiner.activation_proj::0::weights"][0, 0, :, :, 0].T)
    order = {track["seq_id"]: i for i, track in enumerate(golden_meta(case)["tracks"])}
    expected = tuple(str(order[i]) for i in golden_meta(case)["life"]["seq_id_list"])
    assert found.sites["refiner.instance"].query.label == expected
    assert found.sites[POOL].key.frame.tolist() == list(range(FRAMES))


def test_answers_are_upstreams(captured):
    case, source, batch, found, _ = captured
    recorded = golden_tensors(f"{case}/outputs")
    answers = source.predictions(found.outputs, batch)[0]
    order = np.lexsort((recorded["final_labels"].numpy(), -recorded["final_scores"].numpy()))
    scores = recorded["final_scores"].numpy()[order]
    assert np.allclose([a.score for a in answers], scores, atol=1e-4)
    wrong = 0
    for answer in answers:
        same = [
            i for i in range(len(order))
            if recorded["final_ids"][i] == answer.object and recorded["final_labels"][i] == answer.class_index
        ]  # fmt: skip
        assert len(same) == 1
        wrong += int((recorded["final_masks"][same[0]].numpy() != answer.mask).sum())
    assert wrong <= 3
