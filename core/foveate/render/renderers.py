"""The pictures that are drawn from a run, as the renderers that ``foveate plot`` lists.

Each is thin: choose what is drawn (:mod:`foveate.render.selection`), draw it, write it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from foveate.errors import SampleError, UsageError
from foveate.interfaces import Renderer
from foveate.render import selection as pick
from foveate.render.distributions import distributions
from foveate.render.matrix import matrix
from foveate.render.methods import methods
from foveate.render.panel import Panel, Rule
from foveate.render.samples import Choice, diverse, extremes, grid, thumbnail
from foveate.render.triptych import triptych

POOL = 500
"""At most so many samples are decoded to choose a diverse page from; seeded, and said in the caption."""
SHOWN = (
    "entropy_normalised",
    "effective_number",
    "top10_mass",
    "gini",
    "max_lift",
    "attention_distance",
    "head_diversity",
    "prefix_mass",
    "sink_mass",
)
"""Metrics drawn where none is asked for."""
ROW = ("site", "layer", "head", "query", "where")


class Triptych(Renderer):
    """Picture, map and overlay of one sample."""

    name = "triptych"
    draws = "one sample: the picture, its attention row (or --method map), and both"

    def render(self, selection: Any, *, out: Path, scale: str = "lift", **options: Any) -> Path:
        """Options: sample (position or id), site, layer, head, query, where, method, target."""
        given = pick.options_for(("sample", "method", "target", *ROW), options, self.name)
        _still(selection, self.name)
        position = pick.position_of(selection, given.pop("sample", _first(selection)))
        panel, rule = _panel(selection, position, given)
        unit = "attribution" if options.get("method") else "attention"
        picture = triptych(panel, rule, title=pick.title_of(selection, position), scale=scale, unit=unit)
        return picture.save(out)


class Samples(Renderer):
    """A page of samples."""

    name = "grid"
    draws = "a page of samples chosen by a printed rule: diverse, or the extremes of a metric (--by)"

    def render(self, selection: Any, *, out: Path, scale: str = "lift", **options: Any) -> Path:
        """Options: count, seed, by (a metric product, "confidence"), and those of one row or map."""
        given = pick.options_for(("count", "seed", "by", "method", "target", *ROW), options, self.name)
        _still(selection, self.name)
        count, seed, by = int(given.pop("count", 12)), int(given.pop("seed", 0)), given.pop("by", None)
        choice, positions = _choose(selection, count, seed, by)
        panels = []
        for position in positions:
            panel, rule = _panel(selection, position, given)
            panels.append(_titled(panel, pick.title_of(selection, position)))
        unit = "attribution" if "method" in given else "attention"
        title = f"{rule.model}: where it looks"
        return grid(panels, choice, rule, title=title, scale=scale, unit=unit).save(out)


class Matrix(Renderer):
    """Layer by head."""

    name = "matrix"
    draws = "one sample: its attention row in every kept layer and head"

    def render(self, selection: Any, *, out: Path, scale: str = "lift", **options: Any) -> Path:
        """Options: sample, site, query, where."""
        given = pick.options_for(("sample", "site", "query", "where"), options, self.name)
        _still(selection, self.name)
        position = pick.position_of(selection, given.pop("sample", _first(selection)))
        panel, values, layers, heads, rule = pick.attention_tiles(selection, position, **given)
        title = pick.title_of(selection, position)
        return matrix(panel, values, layers, heads, rule, title=title, scale=scale).save(out)


class Distributions(Renderer):
    """Histograms of metrics."""

    name = "distributions"
    draws = "histograms of the run's metrics over images, optionally by a column of the manifest (--by)"

    def render(self, selection: Any, *, out: Path, scale: str = "lift", **options: Any) -> Path:
        """Options: metric (names), site, layer, head, by (a sample column). ``scale`` does not apply."""
        given = pick.options_for(("metric", "site", "layer", "head", "by"), options, self.name)
        site, layer, head = given.get("site"), given.get("layer", -1), given.get("head", "mean")
        names = _metrics(selection, given.get("metric"), site)
        items = [item for name in names for item in pick.metric_values(selection, name, layer=layer, head=head)]
        groups = _column(selection, given["by"]) if "by" in given else None
        heads = "mean of heads" if head == "mean" else f"head {head}"
        layers = "last kept layer" if layer == -1 else f"layer {layer}"
        source = f"{selection.model_id} · {site or _sites(names)} · {layers}, {heads}"
        about = selection.product(names[0]).attrs
        if "K" in about:
            source += (
                f" · K = {about['K']} ({about.get('over_keys', 'all')} keys) · {about.get('computed_from', '')}"
            )
        if len(names) < len(known := pick.metric_products(selection, site)):
            source += f" · {len(names)} of {len(known)} stored metrics"
        unit = "clips" if getattr(selection, "media", "image") == "clip" else "images"
        title = f"{selection.model_id}: metrics over {selection.ok.size} {unit}"
        return distributions(items, title=title, source=source, groups=groups).save(out)


class Methods(Renderer):
    """All explanations of one sample."""

    name = "methods"
    draws = "one sample: every stored attribution map beside the others"

    def render(self, selection: Any, *, out: Path, scale: str = "lift", **options: Any) -> Path:
        """Options: sample, method (names; all by default), target."""
        given = pick.options_for(("sample", "method", "target"), options, self.name)
        _still(selection, self.name)
        position = pick.position_of(selection, given.get("sample", _first(selection)))
        chosen = given.get("method") or pick.map_methods(selection)
        wanted = [chosen] if isinstance(chosen, str) else list(chosen)
        target = int(given.get("target", 0))
        drawn = [pick.map_panel(selection, position, name, target=target) for name in wanted]
        panels = [panel for panel, _ in drawn]
        cells, note = (drawn[0][1].keys, drawn[0][1].note) if drawn else (0, "")
        rule = Rule(selection.model_id, "attribution maps", cells, note)
        return methods(panels, rule, title=pick.title_of(selection, position), scale=scale).save(out)


def _still(run: Any, name: str) -> None:
    """Raises UsageError for a run of clips: its maps have frames, which these pictures would have to leave out."""
    if getattr(run, "media", "image") == "clip":
        raise UsageError(
            f"picture {name!r} is of images, {run.path} holds clips",
            remedy="--kind strip, ribbon or frames (or distributions), or foveate video",
        )


def _panel(run: Any, position: int, given: dict[str, Any]) -> tuple[Panel, Rule]:
    """The map that the options ask for: a stored attribution where a method is named, else attention."""
    if "method" in given:
        return pick.map_panel(run, position, given["method"], target=int(given.get("target", 0)))
    return pick.attention_panel(run, position, **{key: value for key, value in given.items() if key in ROW})


def _first(run: Any) -> int:
    if not run.ok.size:
        raise UsageError(f"{run.path}: no sample was captured", remedy="foveate validate says what failed")
    return int(run.ok[0])


def _choose(run: Any, count: int, seed: int, by: str | None) -> tuple[Choice, list[int]]:
    """Which samples a page shows, as a choice with notes and as positions in the run."""
    if by is not None:
        values = _statistic(run, by)
        choice = extremes(values, count, name=by.removeprefix("metrics/"))
        return choice, [int(run.ok[i]) for i in choice.positions]
    pool = np.asarray(run.ok)
    if pool.size > POOL:
        pool = np.sort(np.random.default_rng(seed).choice(pool, POOL, replace=False))
    features, kept = _thumbnails(run, pool)
    choice = diverse(features, count, seed=seed)
    if run.ok.size > len(kept):
        choice = Choice(choice.positions, choice.notes, f"{choice.rule}, of {run.ok.size} captured")
    return choice, [kept[i] for i in choice.positions]


def _thumbnails(run: Any, pool: Any) -> tuple[list[Any], list[int]]:
    """Features of the pictures that can still be read, and their positions."""
    features, kept = [], []
    for position in pool:
        try:
            features.append(thumbnail(run.load_sample(int(position)).pixels))
        except SampleError:
            continue
        kept.append(int(position))
    if not kept:
        raise UsageError(f"{run.path}: none of its pictures can be read any more")
    return features, kept


def _statistic(run: Any, by: str) -> Any:
    """One number a captured sample: a column of the predictions or a metric product."""
    if by in run.predictions and run.predictions[by].dims == ("sample",):
        return np.asarray(run.predictions[by].values, np.float64)[run.ok]
    names = [name for name in pick.metric_products(run) if name == by or name.split("/")[-1] == by]
    if not names:
        known = ["confidence", *(name.removeprefix("metrics/") for name in pick.metric_products(run))]
        raise UsageError(f"no metric {by!r} in {run.path}", remedy=f"one of {', '.join(known)}")
    return pick.metric_values(run, names[0])[0].values


def _metrics(run: Any, wanted: Any, site: str | None) -> list[str]:
    """The metric products asked for, or all of the site."""
    known = pick.metric_products(run, site)
    if not known:
        raise UsageError(f"{run.path}: no metric was computed", remedy=f"foveate metrics {run.path}")
    if not wanted:
        return [name for name in known if name.split("/")[-1] in SHOWN] or known[:9]
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen = [name for name in known if name.split("/")[-1] in names]
    if missing := set(names) - {name.split("/")[-1] for name in chosen}:
        raise UsageError(
            f"{run.path}: no metric {', '.join(sorted(missing))}",
            remedy=f"one of {', '.join(sorted({name.split('/')[-1] for name in known}))}",
        )
    return chosen


def _how(about: Mapping[str, Any]) -> str:
    """Over which keys a metric was taken, and from what."""
    keys = f" · K = {about['K']} ({about.get('over_keys', 'all')} keys)" if "K" in about else ""
    return keys + (f" · from {about['computed_from']}" if "computed_from" in about else "")


def _sites(names: list[str]) -> str:
    return ", ".join(sorted({name.split("/")[1] for name in names}))


def _column(run: Any, by: str) -> list[str]:
    """A manifest column over captured samples, as text."""
    if by not in run.samples:
        raise UsageError(f"no column {by!r} in the manifest of {run.path}")
    return [str(value) for value in run.samples[by].values[run.ok]]


def _titled(panel: Panel, title: str) -> Panel:
    from dataclasses import replace

    return replace(panel, title=title)
