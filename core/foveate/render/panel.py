"""A map over a picture, and the strokes that draw it.

A :class:`Panel` keeps values on the model's own cells; they are drawn as rectangles at the cells' exact
edges in pixels of the original image, never interpolated. What the model did not see, or was not
captured (NaN), is grey and hatched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from foveate.attribution.levels import on_finest, patches_by_level
from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import TOKEN_KINDS
from foveate.render.scale import Scale
from foveate.render.style import HATCH, OUTLINE, UNSEEN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colorbar import Colorbar
    from numpy.typing import ArrayLike

    from foveate.interfaces import TokenAxis

PHOTO_SIDE = 1600  # longest side, in pixels, at which a photo is embedded in a figure


@dataclass(frozen=True)
class Rule:
    """Where the numbers of a picture come from, in words, for its caption."""

    model: str
    what: str
    """Which numbers: ``attention of the cls row, layer 3 of 0-3, mean of 4 heads``, or a method's name."""
    keys: int
    """K, the number of keys that the softmax ran over (attention) or of cells (maps)."""
    note: str = ""

    def __str__(self) -> str:
        return " · ".join(part for part in (self.model, self.what, f"K = {self.keys}", self.note) if part)


@dataclass(frozen=True, eq=False)
class Panel:
    """One map laid on one picture.

    ``image`` uint8 ``(y, x, channel)``, original pixels; ``values`` float ``(row, column)`` on ``grid``
    (pixels of the model's input); ``uniform`` the value that a uniform map would have everywhere: 1/K for
    attention over K keys, the mean for any other non-negative map. ``outside`` is the attention mass on
    tokens without a place (CLS, registers), NaN where that means nothing.
    """

    image: NDArray[np.uint8]
    geometry: Geometry
    values: NDArray[np.float64]
    grid: CellGrid
    uniform: float
    title: str = ""
    outside: float = float("nan")
    signed: bool = False

    @classmethod
    def attention(
        cls, image: NDArray[np.uint8], geometry: Geometry, row: ArrayLike, tokens: TokenAxis, title: str = ""
    ) -> Panel:
        """One attention row ``(key,)`` over ``tokens``. Raises ValueError where patches are no grid.

        The levels of a pyramid are laid on the cells of the finest as masses that add up.
        """
        weights = np.asarray(row, np.float64)
        placed = np.zeros(len(tokens), bool)
        placed[tokens.where("patch")] = True
        outside = float(np.nansum(weights[~placed]))
        keys = int((tokens.kind != TOKEN_KINDS.index("padding")).sum())
        values, grid = on_finest(weights, tokens)
        if len(patches_by_level(tokens)) < 2:
            return cls(image, geometry, values, grid, 1.0 / keys, title, outside)
        # uniform attention gives every cell its share of the mass on patches
        return cls(image, geometry, values, grid, placed.sum() / keys / values.size, title, outside)

    @classmethod
    def of_map(
        cls,
        image: NDArray[np.uint8],
        geometry: Geometry,
        values: ArrayLike,
        grid: CellGrid,
        title: str = "",
        *,
        signed: bool = False,
    ) -> Panel:
        """Any map ``(row, column)`` on input cells. Raises ValueError where it does not fit the grid."""
        array = np.asarray(values, np.float64)
        if array.shape != grid.shape:
            raise ValueError(f"Panel.of_map: values are {array.shape} but the grid is {grid.shape}")
        known = array[np.isfinite(array)]
        uniform = float(known.mean()) if known.size and not signed else float("nan")
        return cls(image, geometry, array, grid, uniform, title, signed=signed)

    @property
    def visible_values(self) -> tuple[NDArray[np.float64], CellGrid]:
        """The cells that lie in the picture, cut at its border, with edges in original pixels."""
        top, left, bottom, right = self.geometry.visible
        cells = self.geometry.grid_to_original(self.grid)
        rows = (cells.y[1:] > top) & (cells.y[:-1] < bottom)
        columns = (cells.x[1:] > left) & (cells.x[:-1] < right)
        return self.values[np.ix_(rows, columns)], cells.clip(top, left, bottom, right)

    @property
    def hidden_share(self) -> float:
        """Share of the picture's area that never reached the model."""
        top, left, bottom, right = self.geometry.visible
        area = float(self.image.shape[0] * self.image.shape[1])
        return 1.0 - (bottom - top) * (right - left) / area


def show_photo(axes: Axes, panel: Panel, *, grey: bool = False) -> None:
    """The picture itself in original pixels; ``grey`` under an overlay."""
    photo = _shrunk(panel.image)
    if grey:
        photo = np.repeat((photo @ np.array([0.299, 0.587, 0.114]))[..., None] / 255.0, 3, axis=2)
    height, width = panel.image.shape[:2]
    axes.imshow(photo, extent=(0, width, height, 0), interpolation="nearest")
    _frame(axes, panel)


def show_map(axes: Axes, panel: Panel, scale: Scale, *, alpha: bool = False) -> QuadMesh:
    """The map at exact cell edges; with ``alpha``, faint where the map is low, for overlays."""
    values, cells = panel.visible_values
    painted = np.ma.masked_invalid(scale.paint(values, panel.uniform))
    mesh = axes.pcolormesh(
        cells.x, cells.y, painted, norm=scale.norm, cmap=scale.cmap, antialiased=False, rasterized=alpha
    )
    if alpha:
        strength = 0.15 + 0.7 * scale.share(values, panel.uniform)
        mesh.set_alpha(np.where(np.ma.getmaskarray(painted), 0.0, strength))  # type: ignore[arg-type]  # arrays work
    else:
        height, width = panel.image.shape[:2]
        axes.add_patch(
            Rectangle((0, 0), width, height, facecolor=UNSEEN, hatch=HATCH, edgecolor="0.65", lw=0, zorder=0)
        )
    _frame(axes, panel)
    return mesh


def outline_visible(axes: Axes, panel: Panel) -> None:
    """The border of what the model saw, unless it saw everything."""
    if panel.hidden_share > 1e-9:
        top, left, bottom, right = panel.geometry.visible
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=OUTLINE, lw=1.6))


def colour_bar(axes: Axes | list[Axes], mesh: QuadMesh, scale: Scale, *, shrink: float = 1.0) -> Colorbar:
    """A colour bar with the scale's ticks and unit."""
    figure = (axes[0] if isinstance(axes, list) else axes).get_figure(root=True)
    assert figure is not None
    extend = "both" if scale.name == "lift" else "neither"
    bar = figure.colorbar(
        mesh, ax=axes, shrink=shrink, extend=extend, extendfrac=0.03, pad=0.02, aspect=25,
        anchor=(0.0, 1.0), panchor=(0.5, 1.0),
    )  # fmt: skip
    if scale.ticks is not None:
        bar.set_ticks(list(scale.ticks), labels=list(scale.ticks.values()))
    if bar.solids is not None:
        bar.solids.set_alpha(1.0)  # an overlay's colours vary in alpha, its bar does not
    bar.set_label(scale.label)
    return bar


def _frame(axes: Axes, panel: Panel) -> None:
    height, width = panel.image.shape[:2]
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[], aspect="equal", anchor="N")
    for spine in axes.spines.values():
        spine.set_visible(True)


def _shrunk(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """At most PHOTO_SIDE pixels a side, by area averages; small pictures stay as they are."""
    height, width = image.shape[:2]
    if max(height, width) <= PHOTO_SIDE:
        return image
    from PIL import Image

    factor = PHOTO_SIDE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
