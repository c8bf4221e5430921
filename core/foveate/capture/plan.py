"""A capture plan made concrete for one source: unknown sites, layers and reductions end here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from foveate.capture.points import POINTS, check_points
from foveate.capture.reductions import REDUCTIONS, Fold, Full, check_reductions
from foveate.capture.selection import Selection
from foveate.errors import UsageError
from foveate.interfaces import AttentionSource, CapturePlan, Readout, Site, SitePlan


@dataclass(frozen=True)
class SiteJob:
    """What one site has to deliver."""

    site: Site
    plan: SitePlan
    layers: tuple[int, ...]

    @property
    def folds(self) -> tuple[type[Fold], ...]:
        """Reductions over all rows, the full matrix among them where all rows are kept."""
        full = (Full,) if self.plan.rows == "all" else ()
        return (*full, *(REDUCTIONS[name] for name in self.plan.reductions if name != POINTS))

    def selection(self, readouts: Mapping[str, Readout], *, fixed: bool = True) -> Selection | None:
        """The rows to keep as far as ``readouts`` tells; None where it does not (yet).

        ``fixed`` readouts were known before the forward.
        """
        rows = self.plan.rows
        if rows == "readout":
            readout = readouts.get(self.site.id)
            return None if readout is None else Selection.of_readout(readout, self.site, fixed=fixed)
        if isinstance(rows, tuple) and rows:
            return Selection("positions", rows, ragged=bool(self.site.ragged))
        return Selection(str(rows) if rows else "none")


def site_jobs(source: AttentionSource, plan: CapturePlan) -> dict[str, SiteJob]:
    """The plan by site id. Raises UsageError for what the source does not have."""
    known = {site.id: site for site in source.sites}
    jobs = {}
    for part in plan.sites:
        if part.site not in known:
            raise UsageError(
                f"capture plan: no site {part.site!r} in {source.card.id}",
                remedy=f"choose from {', '.join(known)}",
            )
        site = known[part.site]
        jobs[site.id] = SiteJob(site, part, _layers(site, part))
        check_reductions(name for name in part.reductions if name != POINTS)
        check_points(site, part)
    return jobs


def _layers(site: Site, part: SitePlan) -> tuple[int, ...]:
    if part.layers is None:
        return site.layers
    unknown = sorted(set(part.layers) - set(site.layers))
    if unknown:
        raise UsageError(
            f"capture plan: {site.id} has no layers {unknown}", remedy=f"choose from {list(site.layers)}"
        )
    return tuple(sorted(set(part.layers)))
