"""One frame of a clip with its map, its tracks and the words that make it readable, drawn pixel by pixel.

A figure library takes a fifth of a second for a frame; a clip has hundreds. So frames are arrays: cells
of the map at their exact edges (never interpolated), coloured on **one scale for the whole clip**, outlines of the
tracks' masks in colours that belong to the track, and a caption strip with the scale below. A frame in which a
track is not there shows no map of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from foveate.errors import UsageError
from foveate.geometry import CellGrid, Geometry
from foveate.render.detection import COLOURS
from foveate.render.scale import Scale

if TYPE_CHECKING:
    from numpy.typing import NDArray

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
INK, PAPER = (40, 40, 40), (255, 255, 255)
FAINT, STRONG = 0.10, 0.75
"""Opacity of a map at the bottom and at the top of its scale."""


@dataclass(frozen=True, eq=False)
class TrackMarks:
    """One track over the frames of a clip.

    ``masks`` is float or bool ``(frame, row, column)`` over equal cells that span the whole picture, or None;
    ``boxes`` ``(frame, edge)`` are top, left, bottom, right in original pixels, NaN where it is not there.
    ``number`` chooses the colour, the same in every picture of the run.
    """

    name: str
    number: int
    masks: NDArray[np.generic] | None = None
    boxes: NDArray[np.float64] | None = None

    @property
    def colour(self) -> tuple[int, int, int]:
        """RGB, 0 to 255."""
        found = ImageColor.getrgb(COLOURS[self.number % len(COLOURS)])
        return found[0], found[1], found[2]


@dataclass(frozen=True, eq=False)
class ClipMap:
    """The values that are laid over a clip: ``(frame cell, row, column)`` on ``grid``, in input pixels.

    ``cells`` ``(frame,)`` is the frame cell of each frame that is shown, -1 where the model did not read it.
    ``uniform`` is the value that a uniform map would have everywhere.
    """

    values: NDArray[np.float64]
    grid: CellGrid
    geometry: Geometry
    cells: NDArray[np.int64]
    uniform: float

    def at(self, frame: int) -> NDArray[np.float64] | None:
        """The map of one shown frame, None where there is none."""
        cell = int(self.cells[frame])
        if cell < 0 or not np.isfinite(self.values[cell]).any():
            return None
        return np.asarray(self.values[cell], np.float64)


@dataclass(frozen=True, eq=False)
class Overlay:
    """How a clip is drawn: its map (or None), its tracks, the scale, a title and the caption below every frame."""

    scale: Scale
    map: ClipMap | None = None
    tracks: Sequence[TrackMarks] = ()
    title: str = ""
    caption: str = ""
    grey: bool = True
    """Whether the picture is shown in grey below a map, so that the map's colours are the only ones."""
    size: int = 640
    """Pixels of the longer side; smaller clips are enlarged by whole numbers, larger ones reduced."""


def compose(
    frames: Iterable[NDArray[np.uint8]], overlay: Overlay, labels: Sequence[str] = ()
) -> Iterator[NDArray[np.uint8]]:
    """Every frame (uint8 ``(y, x, 3)``) as it is shown, one at a time, all of one size.

    ``labels`` is one short text a frame (its time), drawn in the title's line.
    """
    painter: _Painter | None = None
    for number, frame in enumerate(frames):
        painter = painter or _Painter(overlay, frame.shape[0], frame.shape[1])
        yield painter.draw(frame, number, labels[number] if number < len(labels) else "")


def outline(mask: NDArray[np.generic], height: int, width: int, *, thick: int = 2) -> NDArray[np.bool_]:
    """Border of a mask ``(row, column)`` that spans a picture, in pixels of a ``height x width`` picture.

    A cell is inside where at least half of it is; the border lies inside the mask and is ``thick`` pixels wide.
    """
    inside = np.nan_to_num(np.asarray(mask, np.float64), nan=0.0) >= 0.5
    rows = np.minimum((np.arange(height) + 0.5) * inside.shape[0] // height, inside.shape[0] - 1).astype(int)
    columns = np.minimum((np.arange(width) + 0.5) * inside.shape[1] // width, inside.shape[1] - 1).astype(int)
    large = inside[np.ix_(rows, columns)]
    return np.asarray(large & ~binary_erosion(large, iterations=thick, border_value=0))


def cell_image(
    values: NDArray[np.float64], grid: CellGrid, geometry: Geometry, height: int, width: int
) -> NDArray[np.float64]:
    """A map's values at each pixel of a ``height x width`` picture of the original: ``(y, x)``.

    Each pixel has the value of the cell that its centre lies in, NaN outside what the model saw.
    """
    y = (np.arange(height) + 0.5) * geometry.original_height / height * geometry.scale_y + geometry.offset_y
    x = (np.arange(width) + 0.5) * geometry.original_width / width * geometry.scale_x + geometry.offset_x
    row, column = np.searchsorted(grid.y, y, side="right") - 1, np.searchsorted(grid.x, x, side="right") - 1
    rows, columns = grid.shape
    seen = ((row >= 0) & (row < rows) & (y < geometry.input_height))[:, None]
    seen = seen & ((column >= 0) & (column < columns) & (x < geometry.input_width))[None, :]
    laid = values[np.ix_(row.clip(0, rows - 1), column.clip(0, columns - 1))]
    return np.where(seen, laid, np.nan)


class _Painter:
    """What is the same in every frame of one clip: sizes, fonts, the strip with the scale."""

    def __init__(self, overlay: Overlay, height: int, width: int) -> None:
        self.overlay, self.source = overlay, (height, width)
        self.height, self.width = shown_size(height, width, overlay.size)
        self.text = max(11, min(18, self.width // 38))
        self.font = ImageFont.truetype(str(FONT), self.text)
        self.head = self._strip([overlay.title], None) if overlay.title else None
        self.foot = self._strip(_folded(overlay.caption, self.font, self.width - 12), overlay.scale)

    def draw(self, frame: NDArray[np.uint8], number: int, label: str) -> NDArray[np.uint8]:
        if frame.shape[:2] != self.source:
            raise UsageError(f"overlay: frame {number} is {frame.shape[:2]}, expected {self.source}")
        picture = _resized(frame, self.height, self.width)
        shown = self._with_map(picture, number)
        for track in self.overlay.tracks:
            if track.masks is not None:
                shown[outline(track.masks[number], self.height, self.width)] = track.colour
        canvas = Image.fromarray(shown)
        self._name_tracks(ImageDraw.Draw(canvas), number)
        parts = [np.asarray(canvas), np.asarray(self.foot)]
        if self.head is not None:
            parts.insert(0, np.asarray(self._titled(label)))
        return np.concatenate(parts)

    def _with_map(self, picture: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
        laid = self.overlay.map
        values = None if laid is None else laid.at(number)
        if laid is None:
            return picture.copy()
        base = picture.astype(np.float64)
        if self.overlay.grey:
            base = np.repeat((base @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)
        if values is None:
            return np.asarray(base.round(), np.uint8)
        pixels = cell_image(values, laid.grid, laid.geometry, self.height, self.width)
        strength = FAINT + (STRONG - FAINT) * self.overlay.scale.share(pixels, laid.uniform)
        alpha = np.where(np.isfinite(pixels), strength, 0.0)[..., None]
        colour = _coloured(self.overlay.scale, pixels, laid.uniform)
        return np.asarray((base * (1 - alpha) + colour * alpha).round(), np.uint8)

    def _name_tracks(self, draw: ImageDraw.ImageDraw, number: int) -> None:
        for track in self.overlay.tracks:
            if track.boxes is None or not np.isfinite(track.boxes[number]).all():
                continue
            top, left, bottom, _ = track.boxes[number]
            y, x = top * self.height / self.source[0], left * self.width / self.source[1]
            if track.masks is None:
                below, right = bottom * self.height / self.source[0], track.boxes[number][3]
                draw.rectangle((x, y, right * self.width / self.source[1], below), outline=track.colour, width=2)
            _, _, wide, high = draw.textbbox((0, 0), track.name, font=self.font)
            x = float(np.clip(x, 0, max(0, self.width - wide - 6)))
            y = y - high - 5 if y >= high + 5 else min(y + 2, self.height - high - 5)
            draw.rectangle((x, y, x + wide + 5, y + high + 4), fill=track.colour)
            draw.text((x + 3, y + 1), track.name, fill=_readable(track.colour), font=self.font)

    def _strip(self, lines: Sequence[str], scale: Scale | None) -> Image.Image:
        high = self.text + 5
        bar = high + 20 if scale is not None and self.overlay.map is not None else 0
        strip = Image.new("RGB", (self.width, len(lines) * high + 8 + bar), PAPER)
        draw = ImageDraw.Draw(strip)
        if bar and scale is not None:
            _draw_bar(draw, scale, self.width, self.font, self.text)
        for i, line in enumerate(lines):
            draw.text((6, 4 + bar + i * high), line, fill=INK, font=self.font)
        return strip

    def _titled(self, label: str) -> Image.Image:
        assert self.head is not None
        strip = self.head.copy()
        if label:
            draw = ImageDraw.Draw(strip)
            wide = draw.textlength(label, font=self.font)
            draw.rectangle((self.width - wide - 14, 0, self.width, strip.height), fill=PAPER)
            draw.text((self.width - wide - 6, 4), label, fill=INK, font=self.font)
        return strip


def _draw_bar(draw: ImageDraw.ImageDraw, scale: Scale, width: int, font: object, text: int) -> None:
    """The scale, left to right across the strip, with its ticks below and its label at the right."""
    wide = int(draw.textlength(scale.label, font=font))  # type: ignore[arg-type]  # any of Pillow's fonts
    left, right, top, high = 10, max(60, width - wide - 24), 6, 10
    colours = matplotlib.colormaps[scale.cmap](np.linspace(0, 1, right - left))[:, :3] * 255
    for i, colour in enumerate(colours.round().astype(int)):
        draw.line((left + i, top, left + i, top + high), fill=tuple(int(c) for c in colour))
    for position, word in _ticks(scale):
        x = left + float(scale.norm(position)) * (right - left - 1)
        draw.line((x, top + high, x, top + high + 3), fill=INK)
        half = draw.textlength(word, font=font) / 2  # type: ignore[arg-type]
        draw.text((max(0, x - half), top + high + 4), word, fill=INK, font=font)  # type: ignore[arg-type]
    draw.text((right + 10, top - 2), scale.label, fill=INK, font=font)  # type: ignore[arg-type]


def _ticks(scale: Scale) -> list[tuple[float, str]]:
    if scale.ticks is not None:
        return [(float(place), word) for place, word in scale.ticks.items()]
    low, high = float(scale.norm.vmin or 0.0), float(scale.norm.vmax or 1.0)
    return [(value, f"{value:.3g}") for value in (low, (low + high) / 2, high)]


def _coloured(scale: Scale, pixels: NDArray[np.float64], uniform: float) -> NDArray[np.float64]:
    """RGB 0 to 255 of each pixel's value."""
    position = np.asarray(scale.norm(scale.paint(pixels, uniform)), np.float64)
    painted = matplotlib.colormaps[scale.cmap](np.nan_to_num(np.clip(position, 0, 1)))
    return np.asarray(painted[..., :3] * 255.0)


def shown_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Pixels at which a picture is shown: enlarged by whole numbers, or reduced, to at most ``size`` a side."""
    longest = max(height, width)
    if longest > size:
        return max(2, round(height * size / longest)), max(2, round(width * size / longest))
    times = max(1, size // longest)
    return height * times, width * times


def _resized(frame: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    if frame.shape[:2] == (height, width):
        return frame
    how = Image.Resampling.NEAREST if height > frame.shape[0] else Image.Resampling.BOX
    return np.asarray(Image.fromarray(frame).resize((width, height), how))


def _readable(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black on light colours, white on dark ones."""
    return INK if np.dot(colour, (0.299, 0.587, 0.114)) > 150 else PAPER


def _folded(text: str, font: object, room: int) -> list[str]:
    """``text`` in lines at most ``room`` pixels wide, broken between words."""
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > room:  # type: ignore[attr-defined]  # any of Pillow's fonts
            lines.append(line)
            longer = word
        line = longer
    return [*lines, line] if line else lines
