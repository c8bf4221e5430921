"""Our DVIS-DAQ against recorded inputs and outputs of the original (random weights, seven frames)."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from daq_models import (
    GOLDEN,
    golden_config,
    golden_frames,
    golden_meta,
    golden_tensors,
    needs_golden,
    recorded_attention,
)
from foveate_dvis.daq.loading import load_daq
from foveate_dvis.daq.network import DvisDaq
from foveate_dvis.daq.outputs import NEW, DaqOutputs
from foveate_dvis.daq.postprocess import answer
from foveate_dvis.daq.slots import EPSILON, starting_queries

pytestmark = needs_golden
CASES = ("online", "offline")
ATTENTION, LOGITS = 2e-5, 1e-4


@cache
def model(case: str, exact: bool = True) -> DvisDaq:
    return load_daq(GOLDEN / "state_dict.safetensors", config=golden_config(case), upstream_exact=exact).model


@cache
def run(case: str) -> tuple[DaqOutputs, list[tuple[str, dict[str, Tensor]]]]:
    with recorded_attention(model(case)) as calls, torch.no_grad():
        return model(case)(golden_frames(model(case).config)), calls


@pytest.mark.parametrize("case", CASES)
def test_tracks_births_deaths(case: str) -> None:
    out, meta = run(case)[0], golden_meta(case)
    ours = [(track.start, list(track.appearance), track.dead) for track in out.tracks]
    assert ours == [(t["start"], t["appearance"], t["dead"]) for t in meta["tracks"]]
    assert [track.id for track in out.tracks] == list(range(len(meta["tracks"])))
    number = {track["seq_id"]: i for i, track in enumerate(meta["tracks"])}
    for rows, theirs in zip(out.rows, meta["frames"], strict=True):
        assert rows.frame == theirs["frame"]
        assert rows.ids == tuple(NEW if i is None else number[i] for i in theirs["row_seq_ids"])
        assert rows.track_rows == theirs["track_rows"]
        assert len(rows.ids) - rows.track_rows == theirs["new_rows"]
        assert rows.births == tuple((row, number[i]) for row, i in theirs["born"])
    if case == "offline":
        assert {track for _, track in out.deaths} == {number[i] for i in meta["life"]["dead"]}
        assert out.refined is not None
        assert out.refined.ids == tuple(number[i] for i in meta["life"]["seq_id_list"])


@pytest.mark.parametrize("case", CASES)
def test_every_attention_map_in_order(case: str) -> None:
    calls, theirs = run(case)[1], golden_tensors(f"{case}/attention")
    seen: Counter[str] = Counter()
    order = []
    compared = 0
    for path, fields in calls:
        name = f"{path}::{seen[path]}"
        seen[path] += 1
        order.append(name)
        for field, value in fields.items():
            expected = theirs[f"{name}::{field}"]
            value = value.reshape(expected.shape)
            if expected.dtype == torch.bool:
                assert torch.equal(value, expected), name
            else:
                torch.testing.assert_close(
                    value, expected, atol=ATTENTION, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
                )
            compared += 1
    assert order == golden_meta(case)["call_order"]
    unchecked = {key.split("::")[-1] for key in theirs} - {"weights", "attn_mask"}
    assert unchecked == {"sampling_locations", "spatial_shapes", "softmax"}
    assert compared == sum(key.endswith(("::weights", "::attn_mask")) for key in theirs)


def test_slot_weights_are_the_renormalised_softmax() -> None:
    theirs = golden_tensors("online/attention")
    names = [key for key in theirs if key.endswith("slot_attn::0::softmax")]
    assert names
    for name in names:
        soft = theirs[name] + EPSILON
        torch.testing.assert_close(
            soft / soft.sum(dim=1, keepdim=True), theirs[name.replace("softmax", "weights")]
        )


def test_online_outputs() -> None:
    out, theirs = run("online")[0], golden_tensors("online/outputs")
    close(out.pred_logits, theirs["pred_logits"][0])
    close(out.pred_masks, theirs["pred_masks"][0])
    close(out.frame_logits, theirs["full_logits"][0])
    assert torch.equal(~out.alive, theirs["padding_masks"][0])
    assert out.refined is None


def test_offline_outputs() -> None:
    out, theirs = run("offline")[0], golden_tensors("offline/outputs")
    refined = out.refined
    assert refined is not None
    assert not any(refined.linked)
    close(refined.logits, theirs["pred_logits"][0])
    close(refined.masks, theirs["pred_masks"][0])
    close(refined.embeds, theirs["refiner_out_pred_embds"][0].permute(2, 1, 0))
    close(refined.unrefined_logits, theirs["online_pred_logits"][0])
    assert torch.equal(refined.padding, theirs["refiner_in_padding_mask"][0])
    order = [out.ids.index(i) for i in refined.ids]
    close(out.pred_masks[order], theirs["online_pred_masks"][0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("exact", [True, False])
def test_final_answers(case: str, exact: bool) -> None:
    """As sets: upstream's top-k leaves the order open."""
    out = run(case)[0] if exact else model(case, False)(golden_frames(golden_config(case)))
    theirs = golden_tensors(f"{case}/outputs")
    size = (64, 96)
    got = answer(
        out.final_logits,
        out.final_masks,
        max_num=golden_config(case).max_num,
        padded=size,
        shown=size,
        original=size,
        upstream_exact=exact,
    )
    tracks = golden_meta(case)["tracks"]
    order = golden_meta(case)["life"]["seq_id_list"] if case == "offline" else [t["seq_id"] for t in tracks]
    number = {t["seq_id"]: str(i) for i, t in enumerate(tracks)}
    ours = {
        (out.final_names[i], int(label)): j for j, (i, label) in enumerate(zip(got.index, got.labels, strict=True))
    }
    expected = [
        (number[order[i]], int(label))
        for i, label in zip(theirs["final_ids"].tolist(), theirs["final_labels"], strict=True)
    ]
    assert set(ours) == set(expected)
    for j, pair in enumerate(expected):
        assert abs(float(got.scores[ours[pair]] - theirs["final_scores"][j])) < LOGITS
    differing = sum(int((got.masks[ours[p]] != theirs["final_masks"][j]).sum()) for j, p in enumerate(expected))
    assert differing <= 3


# ------------------------------------------------------------------------------------ stage by stage


@cache
def stages() -> dict[str, Tensor]:
    return golden_tensors("offline/intermediates")


@pytest.mark.parametrize("window", [0, 1])
def test_segmenter_stages(window: int) -> None:
    net, theirs = model("offline"), stages()
    part = golden_frames(net.config)[window * 5 : window * 5 + 5]
    with torch.no_grad():
        out = net.segmenter(pixel_values=part, output_hidden_states=True)
        ours = net.segment(part)
    for i, level in enumerate(out.encoder_hidden_states):
        expected = theirs[f"backbone.res{i + 2}::{window}"]  # unnormalised: up to 800
        torch.testing.assert_close(level, expected, atol=1e-6 * float(expected.abs().max()), rtol=0)
    for i, level in enumerate(out.pixel_decoder_hidden_states[:3]):
        close(level, theirs[f"pixel_decoder.multi_scale.{i}::{window}"])
    close(ours.features, theirs[f"pixel_decoder.mask_features::{window}"])
    close(ours.features, theirs[f"predictor.mask_features::{window}"])
    close(ours.logits, theirs[f"predictor.pred_logits::{window}"][0])
    close(ours.masks, theirs[f"predictor.pred_masks::{window}"][0].transpose(0, 1))
    close(ours.embeds, theirs[f"predictor.pred_embds::{window}"][0].permute(1, 2, 0))
    raw = out.transformer_decoder_last_hidden_state
    close(raw, theirs[f"predictor.pred_embds_without_norm::{window}"][0].permute(1, 2, 0))


def test_tracker_stages() -> None:
    """Each layer's queries and class logits, masks, positions, and the slot branch's choice of queries."""
    net, theirs = model("offline"), stages()
    tracker = net.tracker
    seen: dict[str, list[Any]] = {"queries": [], "slots": [], "positions": []}
    hooks = [
        layer.register_forward_hook(lambda m, a, out: seen["queries"].append(out))
        for layer in tracker.transformer_ffn_layers
    ]
    hooks += [
        tracker.slot_ffn_layers[-1].register_forward_hook(lambda m, a, out: seen["slots"].append(out)),
        tracker.pos_embed.register_forward_hook(lambda m, a, out: seen["positions"].append(out)),
    ]
    try:
        with torch.no_grad():
            out = net(golden_frames(net.config))
    finally:
        for hook in hooks:
            hook.remove()
    layers = net.config.tracker.layers
    with torch.no_grad():
        for t in range(7):
            expected = theirs[f"tracker.main.queries::{t}"]
            for layer in range(layers):
                x = seen["queries"][t * layers + layer]
                close(x, expected[layer + 1])
                close(
                    tracker.class_embed(tracker.decoder_norm(x))[:, 0],
                    theirs[f"tracker.main.class::{t}"][layer + 1, 0],
                )
            masks = tracker.predict(x[:, 0], out.segmenter.features[t])[1]
            close(masks, theirs[f"tracker.main.mask::{t}"][0, 0])
        assert len(seen["positions"]) == 13
        for i, position in enumerate(seen["positions"]):
            close(position, theirs[f"tracker.mask_pos_embed::{i}"][:, 0])
        for t, slots in enumerate(seen["slots"]):
            close(slots, theirs[f"tracker.slot.queries::{t}"][0])
            logits, masks = tracker.predict(slots[:, 0], out.segmenter.features[t + 1])
            close(logits, theirs[f"tracker.slot.class::{t}"][0, 0])
            close(masks, theirs[f"tracker.slot.mask::{t}"][0, 0])
            carried = out.rows[t + 1].track_rows
            close(out.rows[t + 1].slot_scores, logits[:carried].softmax(-1)[:, :-1].amax(-1))


def test_slot_branch_starts_from_the_recorded_queries() -> None:
    net, theirs = model("offline"), stages()
    out, meta = run("offline")[0], golden_meta("offline")
    query_feat = net.segmenter.model.transformer_module.queries_features.weight
    row_of: dict[int, Tensor] = {}
    for t, frame in enumerate(meta["frames"]):
        if t:
            ids = [i for i in out.rows[t].ids if i != NEW]
            rows = torch.cat([torch.stack([row_of[i] for i in ids]), net.tracker.bg_slots.weight])
            assert (
                starting_queries(rows, query_feat).tolist()
                == theirs[f"tracker.slot_match_indices::{t - 1}"].tolist()
            )
        last = theirs[f"tracker.main.queries::{t}"][-1, :, 0]
        row_of |= {track: last[row] for row, track in enumerate(out.rows[t].born) if track != NEW}
        assert len(frame["row_seq_ids"]) == len(last)


def test_refiner_stage() -> None:
    """The refiner alone, from the recorded inputs."""
    net, theirs = model("offline"), golden_tensors("offline/outputs")
    assert net.refiner is not None
    instances = theirs["refiner_in_instance_embeds"][0].permute(2, 1, 0)
    embeds = theirs["refiner_in_frame_embeds"][0].permute(1, 2, 0)
    with torch.no_grad():
        states = net.refiner(instances, embeds)
    close(states.logits, theirs["pred_logits"][0])
    masks = torch.einsum("ntc,tcyx->ntyx", states.mask_embeds, theirs["refiner_in_mask_features"][0])
    close(masks, theirs["refiner_out_pred_masks"][0])


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=LOGITS, rtol=0)
