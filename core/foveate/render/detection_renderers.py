"""The pictures of detectors that ``foveate plot`` draws from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.interfaces import Renderer
from foveate.render import detection_run as read
from foveate.render import selection as pick
from foveate.render.detection import DetectedObject, cross_objects, film_strip, objects
from foveate.render.detection_points import deformable
from foveate.render.detection_sampled import sampled
from foveate.render.detection_stored import sites_with_points, stored
from foveate.render.triptych import triptych

MOST_OBJECTS = 11
"""Objects drawn where no --count is given, best first; the title says where there are more."""


class Objects(Renderer):
    """Every object's box and where its query looked."""

    name = "objects"
    draws = "one sample of a detector: each object's box and its cross-attention on the picture"

    def render(self, selection: Any, *, out: Path, scale: str = "lift", **options: Any) -> Path:
        """Options: sample, site, layer, head, count."""
        given = pick.options_for(("sample", "site", "layer", "head", "count"), options, self.name)
        position, found = _found(selection, given)
        panels, rule = read.object_panels(selection, position, found, **given)
        title = _title(selection, position, found, "where each object was seen")
        return objects(found, panels, rule, title=title, scale=scale).save(out)


class Layers(Renderer):
    """Decoder layers as a film strip."""

    name = "film-strip"
    draws = "one sample of a detector: each object's cross-attention in every decoder layer"

    def render(self, selection: Any, *, out: Path, scale: str = "lift", **options: Any) -> Path:
        """Options: sample, site, head, count.

        Boxes are each layer's own where ``foveate analyse --analysis readouts`` kept them, else the final ones.
        """
        given = pick.options_for(("sample", "site", "head", "count"), options, self.name)
        position, found = _found(selection, given)
        strips, layers, rule = read.layer_strips(selection, position, found, **given)
        title = _title(selection, position, found, "each object, layer by layer")
        answers = read.layer_answers(selection, position, found, layers)
        return film_strip(found, strips, layers, rule, title=title, scale=scale, answers=answers).save(out)


class CrossObjects(Renderer):
    """Who looks at whom."""

    name = "cross-objects"
    draws = "one sample of a detector: how much of each object's cross-attention lies in whose box"

    def render(self, selection: Any, *, out: Path, scale: str = "lift", **options: Any) -> Path:
        """Options: sample, site, layer, head, count. ``scale`` does not apply: shares are from 0 to 1."""
        given = pick.options_for(("sample", "site", "layer", "head", "count"), options, self.name)
        position, found = _found(selection, given)
        panels, rule = read.object_panels(selection, position, found, **given)
        table = read.cross_table(panels, found)
        title = _title(selection, position, found, "who looks at whom")
        return cross_objects(found, table, panels[0], rule, title=title).save(out)


class Points(Renderer):
    """Where deformable attention sampled."""

    name = "points"
    draws = "one sample of a deformable detector: an object's sampling points and the row that they make"

    def render(self, selection: Any, *, out: Path, scale: str = "lift", **options: Any) -> Path:
        """Options: sample, site, layer, head, query (an object query; the surest object's by default).

        Drawn from the points that the run keeps; where it keeps none, the model is opened and run again on this
        sample. ``scale`` is always lift.
        """
        given = pick.options_for(("sample", "site", "layer", "head", "query"), options, self.name)
        query = given.pop("query", None)
        position = pick.position_of(selection, given.pop("sample", read.first_with_objects(selection)))
        one = _object(selection, position, query)
        from_run = bool(sites_with_points(selection))
        points, splat, rule = (stored if from_run else sampled)(selection, position, one.query, **given)
        title = f"{selection.samples['id'].values[position]}: where query {one.query} ({one.name}) sampled"
        return deformable(points, splat, rule, title=title, one=one).save(out)


class Splat(Renderer):
    """The dense row that sampling points make."""

    name = "splat"
    draws = "one sample of a deformable detector: the row that an object's stored sampling points make"

    def render(self, selection: Any, *, out: Path, scale: str = "lift", **options: Any) -> Path:
        """Options: sample, site, layer, head, query (an object query; the surest object's by default)."""
        given = pick.options_for(("sample", "site", "layer", "head", "query"), options, self.name)
        query = given.pop("query", None)
        position = pick.position_of(selection, given.pop("sample", read.first_with_objects(selection)))
        one = _object(selection, position, query)
        _, splat, rule = stored(selection, position, one.query, **given)
        title = f"{selection.samples['id'].values[position]}: the row of query {one.query} ({one.name})"
        return triptych(splat, rule, title=title, scale=scale).save(out)


def _object(run: Any, position: int, query: int | None) -> DetectedObject:
    """The object of a query, or the surest one; a query that found nothing has no label and no box."""
    if query is None:
        return read.objects_of(run, position, at_most=1)[0]
    named = [one for one in read.answers_of(run, position) if one.query == query]
    return named[0] if named else DetectedObject("no answer kept", float("nan"), query)


def _found(run: Any, given: dict[str, Any]) -> tuple[int, list[DetectedObject]]:
    """The sample asked for, or the first with an object, and its objects; takes these options out of ``given``."""
    count = int(given.pop("count", MOST_OBJECTS))
    position = pick.position_of(run, given.pop("sample", read.first_with_objects(run)))
    return position, read.objects_of(run, position, at_most=count)


def _title(run: Any, position: int, found: list[DetectedObject], about: str) -> str:
    name, every = str(run.samples["id"].values[position]), len(read.objects_of(run, position))
    some = f", the best {len(found)} of {every} objects" if len(found) < every else ""
    return f"{name}: {about}{some}"
