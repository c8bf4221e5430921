"""Which call belongs to which declared site: records are matched by owner, counted, and none may be missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from foveate.capture.owners import Owners, Places
from foveate.capture.records import Shape
from foveate.errors import CaptureError
from foveate.interfaces import AttentionSource, CallKey, Site


class Claims:
    """Sites of a source by module path. A call inside a declared module, however deep, is that site's call."""

    def __init__(self, source: AttentionSource) -> None:
        self._source = source
        self._layers: dict[str, tuple[Site, int]] = {}
        self._seen: Counter[tuple[str, int]] = Counter()
        self.undeclared: Counter[str] = Counter()
        owners = Owners(source.module)
        for site in source.sites:
            for path, layer in site.modules.items():
                self._layers[owners.path_of(path)] = (site, layer)
        self.places = Places(self._layers)

    @property
    def declared(self) -> Mapping[str, tuple[Site, int]]:
        """Site and layer of every declared module, by its path."""
        return self._layers

    def find(self, name: str, ordinal: int = 0) -> tuple[Site, int] | None:
        """Site and layer that declare the ``ordinal``-th softmax of a module, or None."""
        place = self.places.find(name, ordinal)
        return None if place is None else self._layers[place]

    def sites(self, name: str) -> list[Site]:
        """All sites that a module declares; several where it attends several times."""
        return [self._layers[place][0] for place in self.places.of_module(name)]

    def heads(self, name: str) -> int | None:
        """Declared heads of a module."""
        found = self.sites(name)
        return found[0].heads if found else None

    def ignored(self, name: str) -> str | None:
        """The source's reason to ignore a module, or None."""
        for pattern, reason in self._source.ignored.items():
            if name == pattern or (pattern.endswith("*") and name.startswith(pattern[:-1])):
                return reason
        return None

    def take(self, name: str, shape: Shape, ordinal: int = 0) -> CallKey | None:
        """Claim one call; None (and a note in :attr:`undeclared`) where no site declares its module.

        ``ordinal`` is how many softmaxes the module started before (:attr:`Record.ordinal`).
        """
        found = self.find(name, ordinal)
        if found is None:
            if self.ignored(name) is None:
                self.undeclared[name] += 1
            return None
        site, layer = found
        if shape.heads != site.heads:
            raise CaptureError(
                f"capture: {site.id} layer {layer} ({name}) is declared with {site.heads} heads "
                f"but ran with {shape.heads}",
                remedy="correct Site.heads in the source",
            )
        number = self._seen[site.id, layer]
        self._seen[site.id, layer] += 1
        return CallKey(site.id, layer, number)

    def require(self, needed: Iterable[Site]) -> None:
        """Raise CaptureError unless every layer of ``needed`` ran, and no other site ran in part.

        An optional site may not have run at all.
        """
        needed_ids = {site.id for site in needed if not site.optional}
        missing = {}
        for site in self._source.sites:
            absent = [layer for layer in site.layers if not self._seen[site.id, layer]]
            if absent and (site.id in needed_ids or len(absent) < len(site.layers)):
                missing[site.id] = absent
        if missing:
            raise CaptureError(self._complaint(missing), remedy=_REMEDY)

    def _complaint(self, missing: dict[str, list[int]]) -> str:
        lines = []
        for site in self._source.sites:
            if site.id in missing:
                absent = missing[site.id]
                paths = [path for path, layer in site.modules.items() if layer in absent]
                lines.append(f"{site.id}: no attention seen in layers {absent}, expected in {_some(paths)}")
        seen = [f"{site} layer {layer}" for site, layer in self._seen if self._seen[site, layer]]
        lines.append(f"seen: {_some(seen) or 'no declared layer'}")
        if self.undeclared:
            lines.append(f"seen in undeclared modules: {_some(list(self.undeclared))}")
        return "capture: missed attention\n  " + "\n  ".join(lines)


_REMEDY = (
    "check the module paths of the site; attention that runs on other threads (DataParallel), in a "
    "compiled graph or in flash-attn, xformers or flex kernels cannot be seen: use the plain model with SDPA"
)


def _some(items: list[str], limit: int = 8) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
