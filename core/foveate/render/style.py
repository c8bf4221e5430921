"""How every picture of foveate looks, and how it is written.

Pictures are drawn inside :func:`styled`, which starts from matplotlib's own defaults: neither the user's
style changes them nor do they change the user's (no pyplot, no global state). A :class:`Picture` is a
figure with the sentence that says what it shows; the sentence is printed in the figure and stored in the
file's metadata. The same data give the same bytes.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from foveate.errors import UsageError

P = ParamSpec("P")
T = TypeVar("T")

UNSEEN = "0.88"  # grey behind the hatching of what the model did not see
HATCH = "////"
OUTLINE = "#e8590c"  # border of the visible region
SUFFIXES = (".png", ".svg", ".pdf")

_RC: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.h_pad": 0.05,
    "figure.constrained_layout.w_pad": 0.05,
    "hatch.color": "0.65",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "foveate",  # ids that do not change from run to run
    "savefig.dpi": 160,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
_CAPTION_SIZE = 8


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's defaults and foveate's few changes, for the duration of a ``with`` block."""
    with matplotlib.style.context(["default", _RC]), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes, which the reader of the figure sees.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def drawn(function: Callable[P, T]) -> Callable[P, T]:
    """Run a drawing function inside :func:`styled`."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        with styled():
            return function(*args, **kwargs)

    return wrapper


@dataclass(frozen=True, eq=False)
class Picture:
    """A finished figure. ``caption`` is the sentence printed below it: rule, K, scale, what is missing."""

    figure: Figure
    title: str
    caption: str

    def save(self, out: Path | str) -> Path:
        """Write PNG, SVG or PDF, chosen by the suffix. Raises UsageError for any other."""
        path = Path(out)
        if path.suffix.lower() not in SUFFIXES:
            raise UsageError(
                f"cannot write a picture to {path.name!r}: expected a name ending in {', '.join(SUFFIXES)}",
                remedy="choose .png for screens, .pdf or .svg for papers",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with styled():
            self.figure.savefig(path, metadata=self._metadata(path.suffix.lower()))
        return path

    def png(self) -> bytes:
        """The picture as PNG bytes."""
        buffer = io.BytesIO()
        with styled():
            self.figure.savefig(buffer, format="png", metadata=self._metadata(".png"))
        return buffer.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png()

    def _metadata(self, suffix: str) -> dict[str, Any]:
        """Title and caption under the names of each format; no date, so that bytes repeat."""
        if suffix == ".pdf":
            return {"Title": self.title, "Subject": self.caption, "CreationDate": None}
        return {"Title": self.title, "Description": self.caption} | ({"Date": None} if suffix == ".svg" else {})


def blank(width: float, height: float) -> Figure:
    """An empty figure of ``width x height`` inches that lays itself out."""
    return Figure(figsize=(width, height), layout="constrained")


def finish(figure: Figure, title: str, *sentences: str, bullets: Sequence[str] = ()) -> Picture:
    """Print the title above, the sentences and then one line or more a bullet below, wrapped to the width."""
    caption = " · ".join(sentence for sentence in sentences if sentence)
    heading = FontProperties(size=11, weight="bold")
    text = FontProperties(size=_CAPTION_SIZE)
    room = figure.get_figwidth() * 72 * 0.96  # points; text begins at 1 % of the width, hinting widens it
    lines = _fold(caption, text, room)
    for bullet in bullets:
        lines += _fold(f"– {bullet}", text, room, indent="   ")
    figure.suptitle("\n".join(_fold(title, heading, room)), x=0.01, ha="left", fontproperties=heading)
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=_CAPTION_SIZE, color="0.25")
    return Picture(figure, title, "\n".join([caption, *(f"– {bullet}" for bullet in bullets)]))


def _fold(text: str, font: FontProperties, room: float, *, indent: str = "") -> list[str]:
    """Break ``text`` between words into lines at most ``room`` points wide; later ones begin with ``indent``."""
    lines: list[str] = []
    line = ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if line and _points(longer, font) > room:
            lines.append(line)
            line = indent + word
        else:
            line = longer
    return [*lines, line]


def _points(text: str, font: FontProperties) -> float:
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return float(width)
