"""Pictures of a run of clips by name, as ``foveate plot`` draws them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("transformers")

from foveate.cli import main
from foveate.data.run import Run
from foveate.errors import UsageError
from foveate.plugins.manager import plugin_manager
from foveate.plugins.opening import open_source
from foveate.render.clip_renderers import _matrices
from foveate.study.capture import run_capture
from foveate.study.plan import build_plan
from foveate.temporal.frame_mass import frame_mass
from foveate.testing.swimming import write_dataset
from run_fakes import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("clips")
    manifest = write_dataset(folder / "clips", 2, seed=3)
    source = open_source("foveate/swim-vis-untrained", threshold=0.0, max_objects=3)
    plan = build_plan(source, sites=["encoder.self", "decoder.cross"], rows="all", reductions=())
    run_capture(source, manifest, folder / "run.zarr", plan=plan, reference="foveate/swim-vis-untrained")
    return Run.open(folder / "run.zarr")


def draw(run: Run, kind: str, out: Path, **options: object) -> str:
    plugin_manager().spec("renderer", kind).create().render(run, out=out, **options)
    with Image.open(out) as image:
        return str(image.text["Description"])


def test_every_kind_draws_and_says_what(run: Run, tmp_path: Path) -> None:
    ribbon = draw(run, "ribbon", tmp_path / "ribbon.png", query=1)
    assert "decoder.cross" in ribbon
    assert f"K = {len(run.tokens('decoder.cross', 'key', 0))}" in ribbon
    strip = draw(run, "strip", tmp_path / "strip.png", sample=1, layer=0, head=2)
    assert "layer 0, head 2" in strip
    assert "one scale over the clip" in strip
    frames = draw(run, "frames", tmp_path / "frames.png")
    assert "encoder.self" in frames
    assert "2 videos" in frames


def test_matrices_are_the_mean_over_clips_of_every_clip_s_own(run: Run) -> None:
    found, used = _matrices(run, "encoder.self", "mean")
    assert used == [0, 1]
    frame = np.repeat(np.arange(6), int(np.prod(run.grid.shape)))
    own = []
    for i in used:
        rows = run.site("encoder.self")["attention"].isel(sample=i).values.astype(np.float64)
        own.append(frame_mass(rows.mean(1), frame, frame, 6).lift)
    np.testing.assert_allclose(found, np.mean(own, axis=0))
    one, _ = _matrices(run, "encoder.self", 3)
    assert not np.allclose(one, found)


def test_what_cannot_be_drawn(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no frames"):
        draw(make_run(tmp_path).run, "ribbon", tmp_path / "x.png")
    with pytest.raises(UsageError, match="no site 'nowhere'"):
        draw(run, "ribbon", tmp_path / "x.png", site="nowhere")
    with pytest.raises(UsageError, match="colour"):
        draw(run, "strip", tmp_path / "x.png", colour="red")
    with pytest.raises(UsageError, match="belongs to a frame"):
        draw(run, "frames", tmp_path / "x.png", site="decoder.cross")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("kind", ["triptych", "grid", "matrix", "methods"])
def test_pictures_of_images_refuse_clips(run: Run, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match=f"picture '{kind}' is of images"):
        plugin_manager().spec("renderer", kind).create().render(run, out=tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_a_clip_is_drawn_as_a_strip_where_no_kind_is_given(run: Run, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["plot", str(run.path), "-o", str(tmp_path / "p.svg"), "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["kind"] == "strip"
