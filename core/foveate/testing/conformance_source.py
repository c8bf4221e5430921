"""Checks of a source: what it says of its model is true, so that everything built on it can be.

Each check is about one promise of :class:`foveate.interfaces.AttentionSource`; its docstring is the promise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from foveate.errors import UsageError
from foveate.geometry import CellGrid, tokens_to_cells
from foveate.interfaces import AttentionStep, CallKey, Sample, Target, TokenAxis
from foveate.plugins.opening import check_expect, find_row, open_source
from foveate.testing.kit import Kit
from foveate.testing.squares import Square, assert_lit, middle, painted, visible_cells
from foveate.testing.state import module_state, same, tensors_of

if TYPE_CHECKING:
    from foveate.interfaces import AttentionSource, Batch, BoundTarget, Outputs

SHAPES = ((96, 128), (128, 96), (110, 110))
"""Height and width of the random pictures: landscape, portrait, square."""
CLIP = 5
"""Frames of every clip."""


class SourceConformance(Kit):
    """Subclass and set ``reference`` (what ``foveate.open`` takes) and ``options``, or override ``open``.

    ``tolerance`` is how far a sample's score may move with its batch-mates, relative to the largest score.
    """

    reference: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Any]] = {}
    target: ClassVar[Target] = Target()
    tolerance: ClassVar[float] = 1e-4
    _opened: ClassVar[Any] = None

    def open(self) -> AttentionSource:
        """A fresh source."""
        return open_source(self.reference, **self.options)

    def samples(self) -> list[Sample]:
        """Three random pictures, or clips, of different shapes; override for texts."""
        random = np.random.default_rng(0)
        frames = (CLIP,) if self.source.media == "clip" else ()
        return [
            Sample(f"random-{i}", random.integers(0, 256, (*frames, *shape, 3), dtype=np.uint8))
            for i, shape in enumerate(SHAPES)
        ]

    @classmethod
    def setup_class(cls) -> None:
        """Open once; checks leave the source as it was, which is itself checked."""
        super().setup_class()
        cls._opened = None

    @property
    def source(self) -> AttentionSource:
        """The opened source, shared by the checks."""
        if self._opened is None:
            type(self)._opened = self.open()
        opened: AttentionSource = self._opened
        return opened

    # ---------------------------------------------------------------- what it says of itself

    def test_is_in_eval_mode(self) -> None:
        """``module`` and everything below it is in eval mode."""
        training = [name for name, module in self.source.module.named_modules() if module.training]
        assert not training, f"in training mode: {training[:5]}"

    def test_sites_are_in_the_model(self) -> None:
        """Site ids are unique, and every declared module path leads to a module."""
        sites = self.source.sites
        assert sites, "declares no site"
        assert len({site.id for site in sites}) == len(sites), f"site ids repeat: {[s.id for s in sites]}"
        paths = dict(self.source.module.named_modules())
        for site in sites:
            assert site.modules, f"{site.id}: declares no module"
            gone = [path for path in site.modules if path.partition("#")[0] not in paths]
            assert not gone, f"{site.id}: no such module {gone[:3]} below {type(self.source.module).__name__}"
            assert site.heads > 0, f"{site.id}: {site.heads} heads"

    def test_says_which_model_it_is(self) -> None:
        """The card names the model, the source and the licence; at least one target exists."""
        card = self.source.card
        assert card.id, "card.id is empty"
        assert card.source, "card.source is empty"
        assert card.licence, "card.licence is empty: write an SPDX id, or 'unverified'"
        assert self.source.targets, "`targets` is empty"

    def test_facts_meet_the_registry(self) -> None:
        """The live model is what the registry row expects."""
        row = find_row(self.reference) if self.reference else None
        if row is None or not row.expect:
            self.skip("no `expect` in the registry row")
        check_expect(row, self.source.facts())

    # ---------------------------------------------------------------- preprocessing and geometry

    def test_encodes_in_order(self) -> None:
        """One input, one geometry and one id a sample; floats without NaN."""
        samples, batch = self.samples(), self._batch()
        assert batch.ids == tuple(sample.id for sample in samples), f"ids are {batch.ids}"
        counts = (len(batch.geometry), batch.inputs.shape[0])
        assert counts == (len(samples),) * 2, f"{counts} geometries and inputs for {len(samples)} samples"
        assert batch.inputs.is_floating_point(), f"inputs are {batch.inputs.dtype}"
        assert bool(batch.inputs.isfinite().all()), "inputs contain NaN or infinity"
        for sample, geometry in zip(samples, batch.geometry, strict=True):
            size = (geometry.original_height, geometry.original_width)
            assert size == sample.pixels.shape[-3:-1], (
                f"{sample.id}: geometry of {size}, pixels {sample.pixels.shape}"
            )
            made, stated = tuple(batch.inputs.shape[-2:]), (geometry.input_height, geometry.input_width)
            assert stated == made, f"{sample.id}: geometry says the input is {stated}, it is {made}"

    def test_cells_tile_the_input(self) -> None:
        """``cells`` cover the input from edge to edge."""
        batch = self._batch()
        grid, (height, width) = self._cells(batch), batch.inputs.shape[-2:]
        ends = (grid.y[0], grid.y[-1], grid.x[0], grid.x[-1])
        assert np.allclose(ends, (0, height, 0, width)), f"cells span {ends}, the input is {height} x {width}"

    def test_a_bright_square_lights_its_own_cell(self) -> None:
        """Where geometry says that a pixel goes is where it goes."""
        dark = self._encode_square(None)
        grid = self._cells(dark)
        for cell in visible_cells(dark.geometry[0], grid):
            square = middle(dark.geometry[0], grid, cell)
            bright = self._encode_square(square)
            change = (bright.inputs - dark.inputs)[0].abs().double()
            for frame in change if change.dim() == 4 else change[None]:
                assert_lit(frame.sum(0).cpu().numpy(), grid, cell, dark.geometry[0], square)

    def test_frames_are_those_that_it_names(self) -> None:
        """``frame_index`` ascends within the clip, and a frame that it does not name does not matter."""
        if self.source.media != "clip":
            self.skip("takes no clips")
        samples, batch = self.samples(), self._batch()
        named = batch.per_sample.get("frame_index")
        assert named is not None, "per_sample has no frame_index"
        assert tuple(named.shape) == tuple(batch.inputs.shape[:2]), f"frame_index is {tuple(named.shape)}"
        cells = self.source.frame_cells(batch)
        assert list(cells) == sorted(cells), f"frame_cells {cells} do not ascend"
        assert set(cells) == set(range(max(cells) + 1)), f"frame_cells {cells} leave one out"
        assert len(cells) == batch.inputs.shape[1], f"{len(cells)} frame cells for {batch.inputs.shape[1]} frames"
        for i, sample in enumerate(samples):
            index = named[i].tolist()
            assert index == sorted(index), f"{sample.id}: frame_index {index} does not ascend"
            inside = set(index) <= set(range(len(sample.pixels)))
            assert inside, f"{sample.id}: frame_index {index} of {len(sample.pixels)} frames"
            own = self._encode_pixels(sample, sample.pixels).inputs
            rest = np.setdiff1d(np.arange(len(sample.pixels)), index)
            without = self._encode_pixels(sample, _inverted(sample, rest)).inputs
            assert bool((own == without).all()), f"{sample.id}: a frame that it does not name changes the input"
            changed = (own - self._encode_pixels(sample, _inverted(sample, index)).inputs).flatten(2).abs().amax(2)
            assert bool((changed > 0).all()), f"{sample.id}: a frame that it names changes nothing"

    def test_tokens_lie_on_the_cells(self) -> None:
        """The patch tokens of the bottom stream tile exactly ``cells``: a wrong grid is found here."""
        batch, outputs = self._forward()
        grid, stream = self._cells(batch), self.source.stream(batch)
        for site in self.source.sites:
            if site.key != stream:
                continue
            axis = self.source.label(CallKey(site.id, site.layers[0]), batch, outputs).key
            finest = max(_levels(axis), key=len)  # a pyramid's other levels tile the same area in larger cells
            _, tiled = tokens_to_cells(np.zeros(len(finest)), finest)
            assert tiled.shape == grid.shape, (
                f"{site.id}: its patch tokens form a {tiled.shape} grid, but cells() is {grid.shape}"
            )
            for edges, wanted in ((tiled.y, grid.y), (tiled.x, grid.x)):
                assert np.allclose(edges, wanted), f"{site.id}: tokens have edges {edges}, cells() {wanted}"
            frames = set(axis.frame[axis.where("patch")].tolist()) - {-1}
            known = set(self.source.frame_cells(batch))
            assert frames <= known, f"{site.id}: tokens of frame cells {sorted(frames)}, there are {sorted(known)}"
            for level in _levels(axis):
                _, other = tokens_to_cells(np.zeros(len(level)), level)
                ends = (other.y[0], other.y[-1], other.x[0], other.x[-1])
                assert np.allclose(ends, (tiled.y[0], tiled.y[-1], tiled.x[0], tiled.x[-1])), (
                    f"{site.id}: a level spans {ends}, the finest {tiled.y[-1]} x {tiled.x[-1]}"
                )
            return
        raise AssertionError(f"no site has the stream {stream!r} as its keys")

    # ---------------------------------------------------------------- running, targets

    def test_repeats_itself(self) -> None:
        """The same batch gives the same outputs, to the bit."""
        batch, first = self._forward()
        assert same(tensors_of(first), tensors_of(self.source.forward(batch))), "two equal forwards differ"

    def test_predicts_for_every_sample(self) -> None:
        """One list a sample, best first."""
        batch, outputs = self._forward()
        answers = self.source.predictions(outputs, batch)
        assert len(answers) == len(batch), f"{len(answers)} lists for {len(batch)} samples"
        for answer in answers:
            scores = [prediction.score for prediction in answer]
            assert np.isfinite(scores).all(), f"scores {scores[:3]}"
            assert scores == sorted(scores, reverse=True), "not best first"

    def test_scores_every_row_of_a_target(self) -> None:
        """``score`` gives one finite float32 number a row, and every sample has a row."""
        batch, outputs = self._forward()
        bound = self._bound(outputs, batch)
        scores = self.source.score(outputs, batch, bound)
        assert tuple(scores.shape) == (len(bound),), f"scores are {tuple(scores.shape)} for {len(bound)} rows"
        assert str(scores.dtype) == "torch.float32", f"scores are {scores.dtype}"
        assert bool(scores.isfinite().all()), f"scores are {scores}"
        assert {row.sample for row in bound.rows} == set(range(len(batch))), "a sample has no row"

    def test_gradients_reach_the_input_of_their_own_sample(self) -> None:
        """The score of a sample depends on its own input, and on no other sample's."""
        import torch

        batch, outputs = self._forward()
        bound = self._bound(outputs, batch)
        inputs = batch.inputs.detach().clone().requires_grad_()
        batch = batch.replace(inputs, range(len(batch)))
        score = self.source.score(self.source.forward(batch, grad=True), batch, bound)[0]
        (gradient,) = torch.autograd.grad(score, inputs)
        size = gradient.abs().flatten(1).amax(1)
        owner = bound.rows[0].sample
        assert bool(gradient.isfinite().all()), "the gradient has NaN or infinity"
        assert float(size[owner]) > 0, "no gradient reaches the input"
        others = [float(value) for i, value in enumerate(size) if i != owner]
        assert max(others, default=0.0) <= self.tolerance * float(size[owner]), "gradients reach other samples"

    def test_a_batch_equals_its_singles(self) -> None:
        """A sample's score does not depend on its batch-mates; ``replace`` and ``take`` carry all context."""
        batch, outputs = self._forward()
        bound = self._bound(outputs, batch)
        together = self.source.score(outputs, batch, bound)
        scale = float(together.abs().max()) or 1.0
        for row, described in enumerate(bound.rows):
            index = [described.sample]
            single = batch.replace(batch.inputs[index], index)
            alone = self.source.score(self.source.forward(single), single, bound.take([row]))
            moved = abs(float(alone[0]) - float(together[row]))
            assert moved <= self.tolerance * scale, f"row {row}: {float(together[row])} becomes {float(alone[0])}"

    def test_readout_is_a_mean_over_queries(self) -> None:
        """Readout weights are non-negative, sum to 1, and fit the site's queries."""
        batch, outputs = self._forward()
        readouts = self.source.readout(batch, outputs)
        assert readouts, "no site is read out"
        known = {site.id: site for site in self.source.sites}
        for site_id, readout in readouts.items():
            assert site_id in known, f"readout of an undeclared site {site_id!r}"
            axis = self.source.label(CallKey(site_id, known[site_id].layers[-1]), batch, outputs).query_axis
            shape, groups = tuple(readout.weights.shape), known[site_id].group
            assert (shape[0], shape[-1]) == (len(batch), len(axis)), f"{site_id}: {shape}"
            assert len(shape) in (2, 2 + len(groups)), f"{site_id}: {shape} with the group {groups}"
            assert float(readout.weights.min()) >= 0, f"{site_id}: negative readout weights"
            sums = readout.weights.flatten(1).sum(-1).cpu().numpy()
            absent = sums == 0 if len(shape) > 2 else np.zeros(len(sums), bool)  # an object without rows here
            assert np.allclose(sums[~absent], 1.0, atol=1e-5), f"{site_id}: readout weights sum to {sums}"
            assert readout.rule, f"{site_id}: say in words what is read"

    def test_flow_follows_declared_sites(self) -> None:
        """Every attention step belongs to a declared layer and to the streams of its site."""
        batch, outputs = self._forward()
        known = {site.id: site for site in self.source.sites}
        steps = [step for step in self.source.flow(batch, outputs) if isinstance(step, AttentionStep)]
        assert steps, "flow has no attention step"
        for step in steps:
            assert step.call.site in known, f"flow names an undeclared site {step.call.site!r}"
            site = known[step.call.site]
            assert step.call.layer in site.layers, f"{site.id}: no layer {step.call.layer}"
            assert (step.query, step.key) == (site.query, site.key), f"{site.id}: streams differ in flow"

    # ---------------------------------------------------------------- capture

    def test_captured_rows_are_attention(self) -> None:
        """Every declared layer is seen; heads and tokens are as labelled; rows sum to 1."""
        from foveate.capture.trace import trace

        batch = self._batch()
        seen = trace(self.source, batch)
        for site in self.source.sites:
            for layer in site.layers:
                call = CallKey(site.id, layer)
                if site.optional and call not in seen.records:
                    continue
                assert call in seen.records, f"{site.id}: layer {layer} was not seen"
                record, labels = seen.records[call], seen.labels(call)
                size = int(np.prod([count for _, count in labels.leading]))
                expected = (size, site.heads, len(labels.query), len(labels.key))
                got = tuple(record.shape)
                assert got == expected, f"{call}: (batch, heads, queries, keys) is {got}, labelled as {expected}"
                if site.normalised_over == "key" and site.form == "dense":
                    sums = record.rows(list(range(min(4, expected[2])))).sum(-1)
                    assert np.allclose(sums.detach().cpu().numpy(), 1.0, atol=1e-4), (
                        f"{call}: rows do not sum to 1"
                    )

    def test_capture_changes_nothing(self) -> None:
        """Outputs are the same to the bit with and without capture.

        torch's fused path of ``nn.MultiheadAttention`` switches itself off under any capture, and its last bits
        differ: it is off on both sides, as in :func:`foveate.capture.certify.certify`.
        """
        from foveate.capture.certify import without_fast_path
        from foveate.capture.trace import trace

        with without_fast_path():
            batch, plain = self._forward()
        seen = trace(self.source, batch)
        assert same(tensors_of(plain), tensors_of(seen.outputs)), "outputs change under capture"

    def test_an_exception_midway_leaves_no_trace(self) -> None:
        """Parameters, hooks, modes and outputs are as before when a forward under capture breaks."""
        from foveate.capture.trace import trace

        batch, plain = self._forward()
        before = module_state(self.source.module)
        last = list(self.source.sites[-1].modules)[-1].partition("#")[0]
        breaking = self.source.module.get_submodule(last).register_forward_pre_hook(_break)
        try:
            trace(self.source, batch)
        except _MidwayError:
            pass
        else:
            raise AssertionError(f"{last} was not run: the site's module path is not the attention's owner")
        finally:
            breaking.remove()
        changed = [name for name, value in module_state(self.source.module).items() if before.get(name) != value]
        assert not changed, f"changed by a broken capture: {changed[:5]}"
        assert same(tensors_of(plain), tensors_of(self.source.forward(batch))), (
            "outputs differ after a broken capture"
        )

    # ---------------------------------------------------------------- helpers

    def _batch(self) -> Batch:
        return self.source.encode(self.samples())

    def _forward(self) -> tuple[Batch, Outputs]:
        batch = self._batch()
        return batch, self.source.forward(batch)

    def _bound(self, outputs: Outputs, batch: Batch) -> BoundTarget:
        return self.source.bind(outputs, batch, self.target)

    def _cells(self, batch: Batch) -> CellGrid:
        try:
            return self.source.cells(batch)
        except UsageError as error:
            self.skip(f"no cells: {error.message}")

    def _encode_pixels(self, sample: Sample, pixels: Any) -> Batch:
        return self.source.encode([replace(sample, pixels=pixels)])

    def _encode_square(self, square: Square | None) -> Batch:
        picture = painted(square)
        if self.source.media == "clip":
            picture = replace(picture, pixels=np.repeat(picture.pixels[None], CLIP, axis=0))
        try:
            return self.source.encode([picture])
        except UsageError as error:
            self.skip(f"takes no picture: {error.message}")


def _inverted(sample: Sample, frames: Any) -> Any:
    """A clip's pixels, some frames as negatives."""
    pixels = sample.pixels.copy()
    pixels[frames] = 255 - pixels[frames]
    return pixels


def _levels(axis: TokenAxis) -> list[TokenAxis]:
    """The patch tokens of each pyramid level and frame cell; one entry where there are none such."""
    patches = axis.take(axis.where("patch").tolist())
    places = np.stack([patches.level, patches.frame], axis=1)
    return [
        patches.take(np.flatnonzero((places == place).all(axis=1)).tolist()) for place in np.unique(places, axis=0)
    ]


class _MidwayError(Exception):
    """Raised inside the model on purpose."""


def _break(module: Any, inputs: Sequence[Any]) -> None:
    raise _MidwayError
