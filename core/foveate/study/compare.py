"""The job behind ``foveate compare``: two runs of the same images, one table, one figure.

Images are matched by the SHA-256 of their files (by id where a run has none), maps are read from what the
runs hold, and nothing is computed again: no model is opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.compare.agreement import Result, compare
from foveate.compare.report import to_csv, to_dict, to_text
from foveate.compare.shape import ShapeRow, compare_shapes
from foveate.errors import UsageError
from foveate.study.compare_maps import load_pair

if TYPE_CHECKING:
    from foveate.compare.maps import MapSet
    from foveate.data.run import Run


@dataclass(frozen=True, eq=False)
class Matched:
    """Positions of the images that both runs captured, and how many each run has besides."""

    a: tuple[int, ...]
    b: tuple[int, ...]
    ids: tuple[str, ...]
    only_a: int
    only_b: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class ComparisonReport:
    """What a comparison found; ``files`` were written."""

    matched: Matched
    result: Result
    shapes: tuple[ShapeRow, ...]
    maps: tuple[MapSet, MapSet]
    files: tuple[Path, ...] = ()

    def to_text(self) -> str:
        """For a terminal."""
        m = self.matched
        head = f"{len(m)} images in both runs ({m.only_a} only in A, {m.only_b} only in B)\n"
        return head + to_text(self.result, self.shapes) + self._unplaced()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        m = self.matched
        counts = {"matched": len(m), "only_a": m.only_a, "only_b": m.only_b}
        unplaced = [_mean(maps.unplaced) for maps in self.maps]
        files = [str(path) for path in self.files]
        return {**counts, **to_dict(self.result, self.shapes), "unplaced_mass": unplaced, "files": files}

    def _unplaced(self) -> str:
        shares = [_mean(maps.unplaced) for maps in self.maps]
        if not np.isfinite(shares).all():
            return ""
        return (
            f"Attention on tokens without a place in the picture (CLS, registers), not compared: "
            f"A {shares[0]:.1%}, B {shares[1]:.1%}.\n"
        )


def compare_runs(
    a: Run,
    b: Run,
    *,
    method: str = "readout",
    layer: int = -1,
    sites: tuple[str | None, str | None] = (None, None),
    out: Path | None = None,
    figure: str = "png",
    seed: int = 0,
) -> ComparisonReport:
    """Compare two runs on the images that both captured.

    ``method`` is "readout" (the stored attention row that the answer is read from, mean over heads, of
    ``layer``: -1 is the last) or the name of an attribution that both runs hold. With ``out``, a folder,
    text, CSV, JSON and a side-by-side figure are written. Raises UsageError where no image is in both, or
    the maps are not there.
    """
    for run in (a, b):
        run.check_captured()
        if run.media == "clip":
            raise UsageError(
                f"{run.path}: comparing is defined for runs of images, this one holds clips",
                remedy="compare numbers a clip: foveate metrics, analyse, or faithfulness -o, of both runs",
            )
    matched = match(a, b)
    pair = load_pair((a, b), (matched.a, matched.b), method, layer=layer, sites=sites)
    result = compare(*pair, seed=seed)
    shapes = () if result.reasons else tuple(compare_shapes(*(maps.take(result.kept) for maps in pair), seed=seed))
    report = ComparisonReport(matched, result, shapes, pair)
    if out is None:
        return report
    files = _write(report, out)
    if not result.reasons:
        files += _draw(a, b, report, method, layer, sites, out / f"side_by_side.{figure}")
    return ComparisonReport(matched, result, shapes, pair, tuple(files))


def match(a: Run, b: Run) -> Matched:
    """Pair the captured images of two runs: by hash where it is known and occurs once, else by id."""
    keys_a, keys_b = _keys(a), _keys(b)
    place = {key: i for i, key in keys_b.items()}
    pairs = [(i, place[key]) for i, key in keys_a.items() if key in place]
    if not pairs:
        raise UsageError(
            f"no image is in both runs: {a.path} has {len(keys_a)}, {b.path} has {len(keys_b)}, "
            "with no SHA-256 or id in common",
            remedy="capture the same files with both models",
        )
    names = a.samples["id"].values
    return Matched(
        tuple(i for i, _ in pairs),
        tuple(j for _, j in pairs),
        tuple(str(names[i]) for i, _ in pairs),
        len(keys_a) - len(pairs),
        len(keys_b) - len(pairs),
    )


def _keys(run: Run) -> dict[int, tuple[str, str]]:
    """What identifies each captured image: its hash, or its id where the hash is missing or not unique."""
    ids, hashes = (run.samples[name].values for name in ("id", "sha256"))
    counts: dict[str, int] = {}
    for i in run.ok:
        counts[str(hashes[i])] = counts.get(str(hashes[i]), 0) + 1
    return {
        int(i): ("sha256", str(hashes[i])) if hashes[i] and counts[str(hashes[i])] == 1 else ("id", str(ids[i]))
        for i in run.ok
    }


def _write(report: ComparisonReport, out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "compare.txt": report.to_text(),
        "compare.csv": to_csv(report.result, report.matched.ids),
        "compare.json": json.dumps(_plain(report.to_dict()), indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]


def _draw(
    a: Run,
    b: Run,
    report: ComparisonReport,
    method: str,
    layer: int,
    sites: Sequence[str | None],
    path: Path,
) -> list[Path]:
    """The image whose agreement is the median, side by side, so that nobody chose it."""
    from foveate.render.comparison import side_by_side
    from foveate.render.selection import attention_panel, map_panel

    spearman = report.result.measures["spearman"].per_image.own
    row = int(np.argsort(spearman)[(np.isfinite(spearman).sum() - 1) // 2])
    image = report.result.kept[row]
    places = (report.matched.a[image], report.matched.b[image])
    panels = [
        attention_panel(run, place, site=site, layer=layer)
        if method == "readout"
        else map_panel(run, place, method)
        for run, place, site in zip((a, b), places, sites, strict=True)
    ]
    (panel_a, rule_a), (panel_b, rule_b) = panels
    panel_a, panel_b = replace(panel_a, title=f"A: {a.model_id}"), replace(panel_b, title=f"B: {b.model_id}")
    note = (
        f"{report.matched.ids[image]}: the image of median agreement (Spearman {spearman[row]:.2f}) "
        f"of {len(report.result.kept)}"
    )
    scale = "signed" if report.maps[0].rule.signed else "lift"
    side_by_side(panel_a, panel_b, (rule_a, rule_b), scale=scale, note=note).save(path)
    return [path]


def _mean(values: Any) -> float:
    array = np.asarray(values, dtype=np.float64)
    return float(array[np.isfinite(array)].mean()) if np.isfinite(array).any() else float("nan")


def _plain(value: Any) -> Any:
    """JSON types; NaN as None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value
