"""The attribution job: what is stored is what the methods say, in any batches, and it goes on after a stop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from foveate.attribution.gradients import IntegratedGradients
from foveate.attribution.objective import Objective
from foveate.attribution.reference import Uniform
from foveate.data.run import Run
from foveate.errors import PluginError, StoreError, UsageError
from foveate.geometry import CellGrid, regrid
from foveate.interfaces import Target
from foveate.study.attribute import Settings, add_external, attribute_run, plan_run, report
from foveate.study.attribute_plan import DEFAULT_METHODS, build_methods, explain_all
from foveate.study.capture import run_capture
from foveate.testing.tiny import TinyCropSource, TinySource, tiny_samples

METHODS = ("readout", "ig", "ig_abs", "gradshap")


def make_run(folder, source, count=5, height=40, width=56):
    (folder / "images").mkdir()
    for i, sample in enumerate(tiny_samples(count, height=height, width=width)):
        Image.fromarray(sample.pixels).save(folder / "images" / f"{i}.png")
    run_capture(source, folder / "images", folder / "run.zarr")
    return Run.open(folder / "run.zarr")


@pytest.fixture
def source():
    return TinyCropSource()


@pytest.fixture
def run(tmp_path, source):
    return make_run(tmp_path, source)


def test_stored_maps_are_the_methods_own(run, source):
    done = attribute_run(run, METHODS, source=source, settings=Settings(seed=3))
    assert [m.method for m in done.methods] == list(METHODS)
    batch = source.encode([run.load_sample(i) for i in range(5)])
    bound = source.bind(source.forward(batch), batch, Target(scale="logit"))
    for method in build_methods(METHODS):
        want = method.attribute(source, batch, bound, seed=3)
        stored = run.product(f"attributions/{method.name}")
        assert stored["map"].dims == ("sample", "target", "y", "x")
        np.testing.assert_allclose(
            stored["map"].values[:, 0], want.values, atol=1e-4 * np.abs(want.values).max(), err_msg=method.name
        )
        np.testing.assert_allclose(stored["score"].values[:, 0], source.score(source.forward(batch), batch, bound))
        assert stored["target_label"].values[:, 0].tolist() == [row.label for row in bound.rows]
        assert stored["target_class"].values[:, 0].tolist() == [row.class_index for row in bound.rows]
        assert stored.attrs["signed"] == want.signed
        assert stored["converged"].values.all()
    assert "relative_delta" in run.product("attributions/ig")
    assert run.product("attributions/gradshap")["seed_spearman"].shape == (5, 1)
    np.testing.assert_array_equal(run.product("attributions/ig")["y"].values, run.grid.centres[0])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_does_not_matter(tmp_path, run, source, batch_size):
    attribute_run(run, METHODS, source=source)
    whole = {name: run.product(f"attributions/{name}")["map"].values for name in METHODS}
    settings = Settings(batch_size=batch_size, overwrite=True)
    attribute_run(run, METHODS, source=source, options={"ig": {"n_steps": 50}}, settings=settings)
    for name in METHODS:
        again = run.product(f"attributions/{name}")["map"].values
        np.testing.assert_allclose(again, whole[name], atol=1e-4 * np.abs(whole[name]).max())


def test_poolings_of_one_method_are_computed_once(source, monkeypatch):
    calls = []
    pixels = IntegratedGradients.pixels
    monkeypatch.setattr(
        IntegratedGradients, "pixels", lambda self, *a, **k: calls.append(self.name) or pixels(self, *a, **k)
    )
    batch = source.encode(tiny_samples(2))
    bound = source.bind(source.forward(batch), batch, Target(scale="logit"))
    objective = Objective(source, batch, bound)
    made = dict(explain_all(build_methods(["ig", "saliency", "ig_abs"]), objective, seed=0))
    assert calls == ["ig"]
    alone = build_methods(["ig_abs"])[0].attribute(source, batch, bound)
    np.testing.assert_array_equal(made["ig_abs"].values, alone.values)
    different = build_methods(["ig", "ig_abs"], {"ig_abs": {"n_steps": 4}})
    list(explain_all(different, objective, seed=0))
    assert calls == ["ig", "ig_abs", "ig", "ig_abs"]


def test_a_stopped_job_goes_on_where_it_was(run, source):
    class StopError(Exception):
        pass

    def stop(done, total):
        raise StopError

    with pytest.raises(StopError):
        attribute_run(run, METHODS, source=source, settings=Settings(batch_size=2), progress=stop)
    assert np.isfinite(run.product("attributions/readout")["map"].values).any((1, 2, 3)).tolist() == [
        1,
        1,
        0,
        0,
        0,
    ]
    steps = []
    attribute_run(
        run, METHODS, source=source, settings=Settings(batch_size=2), progress=lambda *s: steps.append(s)
    )
    assert steps == [(2, 3), (3, 3)]
    assert np.isfinite(run.product("attributions/gradshap")["map"].values).all()
    steps.clear()
    attribute_run(run, METHODS, source=source, progress=lambda *s: steps.append(s))
    assert steps == []


def test_other_settings_need_overwrite(run, source):
    attribute_run(run, ["ig"], source=source)
    with pytest.raises(StoreError, match="other settings"):
        attribute_run(run, ["ig"], source=source, options={"ig": {"n_steps": 4}})
    settings = Settings(overwrite=True)
    attribute_run(run, ["ig"], source=source, options={"ig": {"n_steps": 4}}, settings=settings)
    assert run.product("attributions/ig").attrs["options"]["n_steps"] == 4


def test_a_lost_image_is_reported_and_the_rest_is_done(run, source):
    (run.path.parent / "images" / "2.png").unlink()
    Image.new("RGB", (40, 40)).save(run.path.parent / "images" / "4.png")
    done = attribute_run(run, ["saliency"], source=source)
    assert len(done.failed) == 2
    assert any("SHA-256" in reason for reason in done.failed.values())
    known = np.isfinite(run.product("attributions/saliency")["map"].values).all((1, 2, 3))
    assert known.tolist() == [True, True, False, True, False]
    assert done.methods[0].maps == 3


class TwoClasses(TinySource):
    """Explains two classes of the first image and one of every other."""

    def bind(self, outputs, batch, target):
        bound = super().bind(outputs, batch, target)
        rows = zip(bound.rows, batch.ids, strict=True)
        extra = [replace(row, class_index=(row.class_index + 1) % 3) for row, i in rows if i.startswith("0")]
        return replace(bound, rows=(*bound.rows, *extra))


def test_ragged_targets(tmp_path):
    source = TwoClasses()
    run = make_run(tmp_path, source, 3)
    with pytest.raises(UsageError, match="2 target rows"):
        attribute_run(run, ["saliency"], source=source, settings=Settings(max_targets=1))
    attribute_run(run, ["saliency"], source=source, settings=Settings(overwrite=True))  # room as the first needs
    stored = run.product("attributions/saliency")
    known = np.isfinite(stored["map"].values).all((2, 3))
    assert known.tolist() == [[True, True], [True, False], [True, False]]
    assert stored["target_label"].values[1, 1] == ""
    assert report(run, "saliency").maps == 4


class NothingSometimes(TinySource):
    """Has a target in the last image only."""

    def bind(self, outputs, batch, target):
        bound = super().bind(outputs, batch, target)
        rows = zip(bound.rows, batch.ids, strict=True)
        return replace(bound, rows=tuple(row for row, i in rows if i.startswith("2")))


def test_images_without_a_target_are_empty_and_done(tmp_path):
    source = NothingSometimes()
    run = make_run(tmp_path, source, 3)
    attribute_run(run, ["gradshap", "rollout"], source=source, settings=Settings(batch_size=1))
    for name in ("gradshap", "rollout"):
        known = np.isfinite(run.product(f"attributions/{name}")["map"].values).all((1, 2, 3))
        assert known.tolist() == [False, False, True]
        assert report(run, name).maps == 1
    steps = []
    attribute_run(run, ["gradshap"], source=source, settings=Settings(batch_size=1), progress=steps.append)
    assert steps == []


def test_the_rows_of_a_pass_are_an_option(run, source, monkeypatch):
    sizes = []
    forward = source.forward
    monkeypatch.setattr(source, "forward", lambda b, **k: sizes.append((len(b), k.get("grad"))) or forward(b, **k))
    attribute_run(run, ["ig"], source=source, options={"ig": {"rows": 2, "n_steps": 8}})
    assert max(size for size, grad in sizes if grad) == 2
    assert "rows" not in run.product("attributions/ig").attrs["options"]


def test_a_method_of_the_wrong_shape_is_named(run, source, monkeypatch):
    made = Uniform().attribute
    monkeypatch.setattr(
        Uniform, "attribute", lambda self, *a, **k: replace(m := made(*a, **k), values=m.values[:2])
    )
    with pytest.raises(PluginError, match="uniform: expected maps"):
        attribute_run(run, ["uniform"], source=source)


def test_the_plan_counts_what_is_spent(run, source, monkeypatch):
    plan = {e.method: e for e in plan_run(run, ["readout", "ig", "ig_abs", "ablation"], source=source)}
    assert (plan["readout"].forward, plan["readout"].backward) == (5, 0)
    assert (plan["ig"].forward, plan["ig"].backward) == (5 * 52, 5 * 50)
    assert plan["ig_abs"].forward == 0  # comes with ig
    assert plan["ablation"].evaluations_per_patch == 17 / 16
    assert all(e.seconds >= 0 for e in plan.values())
    assert not run.products()


def test_external_maps_are_stored_like_any_other(tmp_path, run):
    heat = {str(i): np.random.default_rng(n).random((20, 28)) for n, i in enumerate(run.samples["id"].values)}
    missing = list(heat)[3]
    np.savez(tmp_path / "tool.npz", **{name: m for name, m in heat.items() if name != missing})
    done = add_external(run, "tool", tmp_path / "tool.npz")
    assert (done.maps, done.converged_share) == (4, 1.0)
    stored = run.product("attributions/tool")["map"].values[:, 0]
    assert np.isnan(stored[3]).all()
    geometry = run.geometry(0)
    whole = CellGrid.regular(20, 28, height=40, width=56)
    want = regrid(heat[next(iter(heat))], whole, geometry.grid_to_original(run.grid))
    np.testing.assert_allclose(stored[0], want, rtol=1e-6)
    with pytest.raises(UsageError, match="name of a method"):
        add_external(run, "ig", tmp_path / "tool.npz")


def test_bad_input(run, source):
    with pytest.raises(UsageError, match="no attribution"):
        attribute_run(run, ["gig"], source=source)
    with pytest.raises(UsageError, match="steps"):
        attribute_run(run, ["ig"], source=source, options={"ig": {"steps": 4}})
    with pytest.raises(UsageError, match="not among the methods"):
        attribute_run(run, ["ig"], source=source, options={"lime": {"alpha": 4}})
    with pytest.raises(UsageError, match="no class"):
        attribute_run(run, ["ig"], source=source, settings=Settings(Target(label="mauve")))
    assert not run.products()


def test_default_is_a_set_of_known_methods():
    assert [m.name for m in build_methods(["default", "ig"])] == list(DEFAULT_METHODS)


def test_a_run_that_was_cut_off_before_its_first_commit_says_how_to_go_on(run, source):
    import zarr

    from foveate.study.faithfulness import run_faithfulness

    zarr.open_group(run.path, mode="r+")["samples/status"][:] = 0
    for job in (
        lambda: attribute_run(Run.open(run.path), ["ig"], source=source),
        lambda: run_faithfulness(Run.open(run.path), source=source),
    ):
        with pytest.raises(StoreError, match=r"no captured sample of 5[\s\S]*") as caught:
            job()
        assert "continues a run that was cut off" in str(caught.value.remedy)
