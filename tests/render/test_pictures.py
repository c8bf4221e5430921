"""Each picture: its caption tells the rule, the numbers drawn are the numbers given, the bytes repeat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from foveate.errors import UsageError
from foveate.geometry import CellGrid, Geometry
from foveate.render.comparison import difference, null, side_by_side
from foveate.render.distributions import Distribution, distributions
from foveate.render.leaderboard import Column, Score, leaderboard
from foveate.render.matrix import matrix, tile
from foveate.render.methods import methods
from foveate.render.panel import Panel
from foveate.render.samples import Choice, grid
from foveate.render.style import Picture
from foveate.render.triptych import triptych
from render_fakes import RULE, cropped_panel

RANDOM = np.random.default_rng(3)
SCORES = [Score("rollout", 0.4, 0.3, 0.5, note="better than random"), Score("random", 0.8, 0.7, 0.9, "control")]
TILES = RANDOM.random((2, 3, 8, 8)) / 64

PICTURES: dict[str, Callable[[], Picture]] = {
    "triptych": lambda: triptych(cropped_panel(outside=0.25), RULE),
    "signed": lambda: triptych(cropped_panel(RANDOM.normal(size=(8, 8)), signed=True), RULE),
    "grid": lambda: grid([cropped_panel()] * 3, Choice((0, 1, 2), ("rank 1", "", ""), "three by hand"), RULE),
    "matrix": lambda: matrix(cropped_panel(), TILES, [0, 5], ["0", "1", "2"], RULE),
    "methods": lambda: methods([cropped_panel(), cropped_panel(RANDOM.normal(size=(8, 8)), signed=True)], RULE),
    "distributions": lambda: distributions(
        [Distribution("entropy", RANDOM.normal(3, 1, 40), "nat", {"ln K": 4.2})], title="t", source=str(RULE)
    ),
    "leaderboard": lambda: leaderboard([Column("deletion", SCORES, 0.8)], title="t", caption=str(RULE)),
    "side_by_side": lambda: side_by_side(cropped_panel(), cropped_panel(), (RULE, RULE), note="agreement 0.3"),
    "null": lambda: null([0.1, 0.5], [0.0, 0.2], statistic="Spearman", title="t", caption=str(RULE)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_prints_and_stores_its_caption_in_each_format(name: str, tmp_path: Path) -> None:
    picture = PICTURES[name]()
    assert "K = 65" in picture.caption
    assert picture.figure.get_supxlabel().replace("\n", " ") == picture.caption
    svg = picture.save(tmp_path / "p.svg").read_text(encoding="utf-8")
    assert all(line.replace("&", "&amp;") in svg for line in picture.figure.get_supxlabel().splitlines())
    pdf = picture.save(tmp_path / "p.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert picture.caption.split(" · ")[0].encode("utf-16-be") in pdf or b"/Subject" in pdf
    with Image.open(picture.save(tmp_path / "p.png")) as png:
        assert png.text["Description"] == picture.caption


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_data_give_the_same_bytes_under_any_user_style(suffix: str, tmp_path: Path) -> None:
    first = PICTURES["triptych"]().save(tmp_path / f"a{suffix}").read_bytes()
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "image.cmap": "jet"}):
        second = PICTURES["triptych"]().save(tmp_path / f"b{suffix}").read_bytes()
    assert first == second


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    PICTURES["grid"]().save(tmp_path / "p.png")
    with pytest.raises(UsageError):
        triptych(cropped_panel(), RULE, scale="rainbow")
    assert dict(matplotlib.rcParams) == before


def test_no_picture_overflows_its_canvas() -> None:
    for name, make in PICTURES.items():
        figure = make().figure
        FigureCanvasAgg(figure).draw()  # lays the figure out
        box, size = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 > -0.05, name
        assert box.y0 > -0.05, name
        assert box.x1 < size[0] + 0.05, name
        assert box.y1 < size[1] + 0.05, name


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"p\.bmp.*\.png, \.svg, \.pdf"):
        PICTURES["triptych"]().save(tmp_path / "p.bmp")


def test_the_triptych_says_scale_crop_and_mass_elsewhere() -> None:
    caption = triptych(cropped_panel(outside=0.25), RULE).caption
    for words in ("times uniform", "25%", "CLS", "33% of the picture", "unsmoothed", str(RULE)):
        assert words in caption
    assert "PER-IMAGE" in triptych(cropped_panel(), RULE, scale="per-image").caption


def test_tiles_of_the_mosaic_are_where_their_labels_are() -> None:
    mosaic, down, across = tile(TILES)
    for i, y in enumerate(down):
        for j, x in enumerate(across):
            top, left = int(y - 4), int(x - 4)
            np.testing.assert_array_equal(mosaic[top : top + 8, left : left + 8], TILES[i, j])
    assert np.isnan(mosaic).sum() == mosaic.size - TILES.size


def test_the_matrix_has_one_scale_and_needs_fitting_labels() -> None:
    with pytest.raises(UsageError, match="per-image"):
        matrix(cropped_panel(), TILES, [0, 1], ["0", "1", "2"], RULE, scale="per-image")
    with pytest.raises(UsageError, match=r"\(2, 3, 8, 8\).*\(1, 3, 8, 8\)"):
        matrix(cropped_panel(), TILES, [0], ["0", "1", "2"], RULE)


def test_histograms_count_every_image_once_and_name_the_missing() -> None:
    values = np.array([1.0, 2.0, 2.0, np.nan, 5.0])
    axes = distributions([Distribution("m", values)], title="t", source="s").figure.axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 4
    assert "n = 4, 1 missing" in axes.get_title(loc="left")
    assert axes.lines[0].get_xdata()[0] == 2.0  # the median


def test_groups_beyond_six_are_joined_and_shares_add_to_one() -> None:
    groups = [name for i, name in enumerate("abcdefgh") for _ in range(i + 1)]
    values = RANDOM.normal(size=len(groups))
    picture = distributions([Distribution("m", values)], title="t", source="s", groups=groups)
    names = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert names[:2] == ["h (8)", "g (7)"]
    assert "other (6)" in names
    assert len(names) == 6


def test_nothing_finite_is_an_error() -> None:
    with pytest.raises(UsageError, match="foveate metrics"):
        distributions([Distribution("m", np.array([np.nan]))], title="t", source="s")


def test_the_leaderboard_draws_the_scores_and_refuses_other_rows() -> None:
    axes = leaderboard([Column("deletion", SCORES)], title="t", caption="n = 3").figure.axes[0]
    assert [line.get_xdata()[0] for line in axes.lines[1::2]] == [0.4, 0.8]
    assert list(axes.lines[0].get_xdata()) == [0.3, 0.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rollout", "random"]
    with pytest.raises(UsageError, match="insertion"):
        leaderboard([Column("deletion", SCORES), Column("insertion", SCORES[:1])], title="t", caption="c")


def test_the_difference_is_the_log_ratio_on_common_cells() -> None:
    """Slow oracle: average both maps over each coarse cell pixel by pixel, where both models saw."""
    fine = cropped_panel()
    whole = Geometry(80, 120, 80, 120, 1.0, 1.0)
    coarse = Panel(fine.image, whole, RANDOM.random((4, 3)), CellGrid.regular(4, 3, height=80, width=120), 0.5)
    panel, _ = difference(fine, coarse)
    got, cells = panel.visible_values
    assert cells.x[0] == 20
    assert cells.x[-1] == 100
    pixel_fine = np.full((80, 120), np.nan)
    pixel_fine[:, 20:100] = np.kron(fine.values, np.ones((10, 10))) / fine.uniform
    pixel_coarse = np.kron(coarse.values, np.ones((20, 40))) / coarse.uniform
    for i in range(len(cells.y) - 1):
        for j in range(len(cells.x) - 1):
            part = np.s_[int(cells.y[i]) : int(cells.y[i + 1]), int(cells.x[j]) : int(cells.x[j + 1])]
            expected = np.log2(max(pixel_coarse[part].mean(), 1 / 8) / max(pixel_fine[part].mean(), 1 / 8))
            assert got[i, j] == pytest.approx(expected)


def test_side_by_side_needs_one_picture_and_a_common_part() -> None:
    panel = cropped_panel()
    other = Panel(panel.image[:40], Geometry.identity(40, 120), panel.values, panel.grid, 1.0)
    with pytest.raises(UsageError, match="different size"):
        side_by_side(panel, other, (RULE, RULE))
    left = Panel(
        panel.image, Geometry(80, 120, 10, 10, 1, 1), panel.values, CellGrid.regular(8, 8, height=10, width=10), 1
    )
    with pytest.raises(UsageError, match="no common part"):
        side_by_side(panel, left, (RULE, RULE))
    assert "agreement 0.3" in PICTURES["side_by_side"]().caption


def test_a_name_that_the_font_lacks_gives_a_picture_and_no_noise(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    panel = replace(cropped_panel(), title="\u65e5\u672c.jpg")
    triptych(panel, RULE).save(tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
