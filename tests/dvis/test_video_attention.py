"""Capture, rollout and relevance of video transformers against the models' own weights, in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foveate.capture.engine import capture_batch
from foveate.capture.relevance import relevance
from foveate.capture.rollout import rollout
from foveate.capture.trace import trace
from foveate.errors import UsageError
from foveate.interfaces import Batch, CapturePlan, SitePlan, Target
from foveate.testing.state import same, tensors_of
from foveate_dvis.video_vit_composed import compose
from video_models import CASES, clips, open_tiny

FRAMES, PLACES = 4, 16
JOINT = [case for case in CASES if CASES[case][0] != "timesformer"]
DIVIDED = ["TimesformerModel", "TimesformerForVideoClassification"]


def encoded(case: str, **options: Any) -> tuple[Any, Batch]:
    source = open_tiny(case, **options)
    return source, source.encode(clips())


class Eager:
    """A float64 copy of a model that runs transformers' own eager attention and gives its weights away."""

    def __init__(self, source: Any) -> None:
        self.model = copy.deepcopy(source.module).double()
        if source.card.family != "timesformer":
            self.model.set_attn_implementation("eager")
        self.weights: dict[str, Tensor] = {}
        for path in (path for site in source.sites for path in site.modules):
            module = self.model.get_submodule(path)
            if hasattr(module, "attn_drop"):  # TimeSformer: what its dropout is given
                module.attn_drop.register_forward_pre_hook(self._take(path))
            else:
                module.register_forward_hook(self._take(path))

    def _take(self, path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any = None) -> None:
            weights = inputs[0] if output is None else output[1]
            if weights.requires_grad:
                weights.retain_grad()
            self.weights[path] = weights

        return hook

    def __call__(self, batch: Batch, *, grad: bool = False) -> Any:
        inputs = batch.inputs.detach().double().requires_grad_(grad)
        arguments = {"skip_predictor": True} if hasattr(self.model, "predictor") else {}
        return self.model(**{self.model.main_input_name: inputs}, **arguments)


def layers_of(source: Any, site: str) -> list[str]:
    found = next(s for s in source.sites if s.id == site)
    return sorted(found.modules, key=lambda path: found.modules[path])


@pytest.mark.parametrize("case", CASES)
def test_capture_equals_the_models_own_eager_weights(case: str) -> None:
    source, batch = encoded(case)
    own = Eager(source)
    own(batch)
    traced = trace(source, batch)
    traced.certify().require()
    for call, record in traced.records.items():
        path = layers_of(source, call.site)[call.layer]
        rows = record.rows(list(range(record.shape.queries)))
        entropy = -(own.weights[path] * own.weights[path].clamp_min(1e-30).log()).sum(-1).mean()
        assert entropy < 0.8 * np.log(record.shape.keys), "uniform attention proves nothing"
        torch.testing.assert_close(rows.double(), own.weights[path], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["VideoMAEForVideoClassification", "VivitModel", "VJEPA2Model"])
def test_the_librarys_list_of_attentions_is_a_part_of_it(case: str) -> None:
    source, batch = encoded(case)
    model = copy.deepcopy(source.module)
    model.set_attn_implementation("eager")
    arguments = {"skip_predictor": True} if hasattr(model, "predictor") else {}
    listed = model(**{model.main_input_name: batch.inputs}, output_attentions=True, **arguments).attentions
    traced = trace(source, batch)
    assert len(listed) == 2
    for call, record in traced.records.items():
        rows = record.rows(list(range(record.shape.queries)))
        torch.testing.assert_close(rows, listed[call.layer], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_models_own_to_the_bit(case: str) -> None:
    source, batch = encoded(case)
    arguments = {"skip_predictor": True} if hasattr(source.module, "predictor") else {}
    with torch.no_grad():
        plain = source.module(**{source.module.main_input_name: batch.inputs}, **arguments)
    plan = CapturePlan(tuple(SitePlan(site.id, rows="all") for site in source.sites))
    assert same(tensors_of(plain), tensors_of(capture_batch(source, batch, plan).outputs))


@pytest.mark.parametrize("case", CASES)
def test_a_batch_captures_as_its_clips_do_alone(case: str) -> None:
    source, batch = encoded(case)
    plan = CapturePlan(tuple(SitePlan(site.id) for site in source.sites), dtype="float32")
    together = capture_batch(source, batch, plan)
    for i in range(len(batch)):
        alone = capture_batch(source, batch.replace(batch.inputs[[i]], [i]), plan)
        for site, kept in alone.sites.items():
            for name, array in kept.arrays.items():
                np.testing.assert_allclose(array[0], together.sites[site].arrays[name][i], atol=2e-5, err_msg=name)


def test_captured_arrays_have_the_groups_that_divided_attention_has() -> None:
    source, batch = encoded("TimesformerForVideoClassification")
    sites = capture_batch(
        source, batch, CapturePlan((SitePlan("encoder.time", rows="all"), SitePlan("encoder.space")))
    ).sites
    time, space = sites["encoder.time"], sites["encoder.space"]
    assert time.arrays["attention"].shape == (3, PLACES, 2, 3, FRAMES, FRAMES)  # sample, position, layer, head
    assert time.key.frame.tolist() == [0, 1, 2, 3]
    assert space.arrays["received"].shape == (3, FRAMES, 2, 3, 1 + PLACES)
    # the readout is the class token's row of every frame
    assert space.arrays["attention"].shape == (3, FRAMES, 2, 3, 1, 1 + PLACES)
    assert space.query_index == (0,)
    np.testing.assert_allclose(space.arrays["attention"].sum(-1), 1.0, atol=1e-5)


# ------------------------------------------------------------------- rollout and relevance, by dense matrices


def dense_rollout(matrices: list[np.ndarray], keep: float = 0.5) -> np.ndarray:
    """Abnar and Zuidema 2020, eq. 1: the product of keep I + (1 - keep) A, last layer first."""
    product = np.eye(matrices[0].shape[0])
    for matrix in matrices:
        product = (keep * np.eye(len(matrix)) + (1 - keep) * matrix) @ product
    return product


@pytest.mark.parametrize("case", ["VideoMAEForVideoClassification", "VivitForVideoClassification"])
def test_rollout_of_joint_attention(case: str) -> None:
    source, batch = encoded(case)
    own = Eager(source)
    own(batch)
    found = rollout(trace(source, batch)).double().numpy()
    for i in range(len(batch)):
        layers = [own.weights[path][i].mean(0).detach().numpy() for path in layers_of(source, "encoder.self")]
        product = dense_rollout(layers)
        wanted = product.mean(0) if case.startswith("VideoMAE") else product[0]
        np.testing.assert_allclose(found[i], wanted, atol=1e-6)


def test_rollout_through_an_attentive_pooler() -> None:
    source, batch = encoded("VJEPA2ForVideoClassification")
    own = Eager(source)
    own(batch)
    found = rollout(trace(source, batch)).double().numpy()
    (pool,) = layers_of(source, "pooler.cross")
    paths = [*layers_of(source, "encoder.self"), *layers_of(source, "pooler.self")]
    for i in range(len(batch)):
        layers = [own.weights[path][i].mean(0).detach().numpy() for path in paths]
        wanted = own.weights[pool][i].mean(0).detach().numpy()[0] @ dense_rollout(layers)
        np.testing.assert_allclose(found[i], wanted, atol=1e-6)


def place(frame: int, position: int) -> int:
    """A patch among the tokens class token, frame 0, frame 1 ..."""
    return 1 + frame * PLACES + position


def divided_layer(time: np.ndarray, space: np.ndarray, keep: float, add: float) -> np.ndarray:
    """One layer over a single class token and all patches, by loops: keep I + add A in each of its two halves.

    ``time`` is (place, frame, frame), ``space`` (frame, 1 + place, 1 + place).
    """
    size = 1 + FRAMES * PLACES
    over_time, over_space = np.zeros((size, size)), np.zeros((size, size))
    over_time[0, 0] = 1.0  # the class token passes by
    for p in range(PLACES):
        for t in range(FRAMES):
            over_time[place(t, p), place(t, p)] += keep
            for u in range(FRAMES):
                over_time[place(t, p), place(u, p)] += add * time[p, t, u]
    for t in range(FRAMES):
        tokens = [0, *(place(t, p) for p in range(PLACES))]
        for row, query in enumerate(tokens):
            share = 1 / FRAMES if query == 0 else 1.0  # the class token is the mean of its copies
            over_space[query, query] += share * keep
            for column, key in enumerate(tokens):
                over_space[query, key] += share * add * space[t, row, column]
    return over_space @ over_time


def one_class_token(row: np.ndarray) -> np.ndarray:
    """Values over the frames' copies and patches, (frame * (1 + place),), over one class token and the patches."""
    frames = row.reshape(FRAMES, 1 + PLACES)
    return np.concatenate([[frames[:, 0].sum()], frames[:, 1:].ravel()])


def divided_weights(own: Eager, source: Any, sample: int, take: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    layers = []
    for time, space in zip(layers_of(source, "encoder.time"), layers_of(source, "encoder.space"), strict=True):
        a = take(own.weights[time]).unflatten(0, (-1, PLACES))[sample].detach().numpy()
        b = take(own.weights[space]).unflatten(0, (-1, FRAMES))[sample].detach().numpy()
        layers.append((a, b))
    return layers


@pytest.mark.parametrize("case", DIVIDED)
def test_rollout_of_divided_attention(case: str) -> None:
    source, batch = encoded(case)
    own = Eager(source)
    own(batch)
    found = rollout(trace(source, batch)).double().numpy()
    for i in range(len(batch)):
        product = np.eye(1 + FRAMES * PLACES)
        for time, space in divided_weights(own, source, i, lambda a: a.mean(1)):
            product = divided_layer(time, space, 0.5, 0.5) @ product
        np.testing.assert_allclose(one_class_token(found[i]), product[0], atol=1e-6)


@pytest.mark.parametrize("case", ["VideoMAEForVideoClassification", "TimesformerForVideoClassification"])
def test_relevance_of_joint_and_divided_attention(case: str) -> None:
    """Chefer, Gur and Wolf 2021, eq. 5 and 6: R <- R + mean_h relu(A * dA) R, with autograd's own gradients."""
    source, batch = encoded(case)
    own = Eager(source)
    outputs = own(batch, grad=True)
    classes = outputs.logits.argmax(-1)
    outputs.logits.softmax(-1)[range(len(batch)), classes].sum().backward()

    def positive(a: Tensor) -> Tensor:
        assert a.grad is not None
        return (a * a.grad).clamp_min(0).mean(1)

    traced = trace(source, batch, grad=True)
    bound = source.bind(traced.outputs, traced.batch, Target())
    assert [row.class_index for row in bound.rows] == classes.tolist()
    found = relevance(traced, bound).double().numpy()
    for i in range(len(batch)):
        if case.startswith("VideoMAE"):
            product = np.eye(found.shape[1])
            for path in layers_of(source, "encoder.self"):
                product = product + positive(own.weights[path])[i].detach().numpy() @ product
            wanted, got = product.mean(0), found[i]
        else:
            product = np.eye(1 + FRAMES * PLACES)
            for time, space in divided_weights(own, source, i, positive):
                product = divided_layer(time, space, 1.0, 1.0) @ product
            wanted, got = product[0], one_class_token(found[i])
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


# ------------------------------------------------------------------- the space-time matrix


def test_the_composed_matrix_is_the_product_of_the_two_steps() -> None:
    source, batch = encoded("TimesformerModel")
    own = Eager(source)
    own(batch)
    traced = trace(source, batch)
    for layer in (0, 1):
        found, tokens = source.composed(traced, layer)
        kept, _ = source.composed(traced, layer, residual=0.5)
        assert len(tokens) == found.shape[-1] == 1 + FRAMES * PLACES
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:2]))
        for i in range(len(batch)):
            time, space = divided_weights(own, source, i, lambda a: a.mean(1))[layer]
            np.testing.assert_allclose(found[i].numpy(), divided_layer(time, space, 0.0, 1.0), atol=1e-6)
            np.testing.assert_allclose(kept[i].numpy(), divided_layer(time, space, 0.5, 0.5), atol=1e-6)


def test_the_composed_matrices_multiply_to_the_rollout() -> None:
    source, batch = encoded("TimesformerForVideoClassification")
    traced = trace(source, batch)
    first, second = (source.composed(traced, layer, residual=0.5)[0] for layer in (0, 1))
    found = np.stack([one_class_token(row) for row in rollout(traced).numpy()])
    np.testing.assert_allclose((second[:, :1] @ first)[:, 0].numpy(), found, atol=1e-6)


def test_what_does_not_fit_is_not_composed() -> None:
    with pytest.raises(UsageError, match="do not fit"):
        compose(torch.ones(1, 4, 3, 3), torch.ones(1, 3, 4, 4))
    with pytest.raises(UsageError, match="residual"):
        compose(torch.ones(1, 4, 3, 3), torch.ones(1, 3, 5, 5), residual=1.0)
    source, batch = encoded("TimeSformer, joint")
    with pytest.raises(UsageError, match="joint already"):
        source.composed(trace(source, batch), 0)
