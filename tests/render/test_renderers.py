"""Pictures of a real run on disk: the numbers of the store, the words of the run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from PIL import Image

from foveate.data.run import Run
from foveate.errors import UsageError
from foveate.geometry import tokens_to_cells
from foveate.interfaces import Renderer
from foveate.plugins.manager import plugin_manager
from foveate.render import selection as pick
from run_fakes import SITE, Made, make_run

KINDS = ("triptych", "grid", "matrix", "distributions", "methods")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = make_run(tmp_path_factory.mktemp("run"))
    random = np.random.default_rng(1)
    for method, signed in (("rollout", False), ("integrated_gradients", True)):
        values = random.normal(size=(5, 1, 2, 2)) if signed else random.random((5, 1, 2, 2))
        table = xr.Dataset(
            {
                "map": (("sample", "target", "y", "x"), values.astype(np.float32)),
                "converged": (("sample", "target"), np.arange(5)[:, None] > 0),
                "target_label": (("sample", "target"), np.full((5, 1), "cat", object)),
            }
        )
        made.run.write_product(f"attributions/{method}", table, {"signed": signed})
    entropy = xr.Dataset(
        {"entropy": (("sample", "layer", "head", "query"), random.random((5, 2, 3, 17)), {"units": "nat"})},
        coords={"layer": [0, 1]},
    )
    made.run.write_product(
        f"metrics/{SITE}/entropy", entropy, {"metric": "entropy", "K": 16, "over_keys": "patch"}
    )
    return made


@pytest.fixture(scope="module")
def run(made: Made) -> Run:
    return made.run


def described(path: Path) -> str:
    with Image.open(path) as image:
        return str(image.text["Description"])


def test_every_declared_picture_is_a_renderer_that_draws_this_run(run: Run, tmp_path: Path) -> None:
    specs = {spec.name: spec for spec in plugin_manager().specs("renderer")}
    assert set(KINDS) <= set(specs)
    for kind in KINDS:
        renderer = specs[kind].create()
        assert isinstance(renderer, Renderer)
        assert renderer.name == kind
        out = renderer.render(run, out=tmp_path / f"{kind}.png")
        assert out.stat().st_size > 5000
        assert described(out).startswith("m ")  # the model


@pytest.mark.parametrize(("layer", "head", "query"), [(-1, "mean", 0), (0, 2, 5), (1, 0, 16)])
def test_the_panel_holds_the_stored_row(made: Made, run: Run, layer: int, head: int | str, query: int) -> None:
    panel, rule = pick.attention_panel(run, 3, layer=layer, head=head, query=query)
    stored = made.attention[3, layer].astype(np.float64)
    row = stored.mean(0)[query] if head == "mean" else stored[head, query]
    expected, grid = tokens_to_cells(row, made.tokens)
    np.testing.assert_allclose(panel.values, expected)
    assert panel.grid == grid
    assert panel.uniform == pytest.approx(1 / 17)
    assert panel.outside == pytest.approx(row[0])
    assert rule.keys == 17
    assert f"layer {layer % 2}" in rule.what
    assert ("mean of 3 heads" if head == "mean" else f"head {head} of 3") in rule.what
    np.testing.assert_array_equal(panel.image, run.load_sample(3).pixels)


def test_tiles_hold_every_layer_and_head(made: Made, run: Run) -> None:
    _, values, layers, heads, _ = pick.attention_tiles(run, 2, query=4)
    expected, _ = tokens_to_cells(made.attention[2, :, :, 4].astype(np.float64), made.tokens)
    np.testing.assert_allclose(values, expected)
    assert layers == [0, 1]
    assert heads == ["0", "1", "2"]


def test_maps_come_with_their_sign(run: Run) -> None:
    panel, rule = pick.map_panel(run, 1, "rollout")
    np.testing.assert_allclose(panel.values, run.product("attributions/rollout")["map"].values[1, 0])
    assert not panel.signed
    assert pick.map_panel(run, 1, "integrated_gradients")[0].signed
    assert rule.what == "attribution rollout"
    assert rule.note == "target cat"
    assert panel.title == "rollout"
    assert pick.map_panel(run, 0, "rollout")[0].title == "rollout (not converged)"


def test_a_metric_is_one_value_an_image(run: Run) -> None:
    (item,) = pick.metric_values(run, f"metrics/{SITE}/entropy", layer=0, head=1)
    stored = run.product(f"metrics/{SITE}/entropy")["entropy"].values
    np.testing.assert_allclose(item.values, stored[:, 0, 1].mean(-1))
    assert item.unit == "nat"
    assert item.references == {"uniform": pytest.approx(np.log(16))}


def test_the_title_is_sample_and_answer(run: Run) -> None:
    assert pick.title_of(run, 2).endswith(": cat (0.77)")


def test_a_page_of_extremes_shows_rank_and_value(run: Run, tmp_path: Path) -> None:
    grid = plugin_manager().spec("renderer", "grid").create()
    words = described(grid.render(run, out=tmp_path / "g.png", by="confidence", count=4))
    assert "the 2 highest and 2 lowest of 5 samples by confidence" in words
    words = described(grid.render(run, out=tmp_path / "h.png", by="entropy", count=2, method="rollout"))
    assert "by vision.encoder.self/entropy" in words or "by entropy" in words


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("triptych", {"sample": "nobody"}, "no sample 'nobody'"),
        ("triptych", {"sample": 77}, "no sample 77"),
        ("triptych", {"layer": 5}, "layer 5 was not captured"),
        ("triptych", {"head": 9}, "head 9 was not captured"),
        ("triptych", {"query": 99}, "17 rows were kept"),
        ("triptych", {"site": "x"}, "no site 'x'"),
        ("triptych", {"method": "lime"}, "no attribution 'lime'"),
        ("triptych", {"colour": "red"}, "no option 'colour'"),
        ("grid", {"by": "beauty"}, "no metric 'beauty'"),
        ("distributions", {"metric": ["gini"]}, "no metric gini"),
        ("distributions", {"by": "country"}, "no column 'country'"),
        ("matrix", {"scale": "per-image"}, "per-image"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(
    run: Run, tmp_path: Path, kind: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        plugin_manager().spec("renderer", kind).create().render(run, out=tmp_path / "x.png", **options)
    assert not (tmp_path / "x.png").exists()


def test_a_run_without_products_names_the_command_that_makes_them(tmp_path: Path) -> None:
    run = make_run(tmp_path, count=2).run
    for kind, verb in (("distributions", "foveate metrics"), ("methods", "foveate attribute")):
        with pytest.raises(UsageError, match=verb):
            plugin_manager().spec("renderer", kind).create().render(run, out=tmp_path / "x.png")


def test_a_map_on_another_grid_is_refused_with_both_sizes(tmp_path: Path) -> None:
    run = make_run(tmp_path).run
    other = xr.Dataset({"map": (("sample", "target", "y", "x"), np.ones((5, 1, 3, 7), np.float32))})
    run.write_product("attributions/mine", other)
    with pytest.raises(UsageError, match="3 x 7 cells, the run's grid has 2 x 2") as caught:
        plugin_manager().spec("renderer", "methods").create().render(run, out=tmp_path / "x.png")
    assert "external" in caught.value.remedy
