"""Per-image scores to one table that a reader understands, with every claim it makes tested.

Rows are methods and controls (maps that explain nothing, and the oracle). Each is compared with the random
reference on the same images; the verdict needs the interval and the corrected test to agree. A ranking
depends on the protocol, so every method carries the range of its ranks over all of them. What has not
converged is listed below the table and is not ranked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from foveate.errors import UsageError
from foveate.faithfulness.agreement import captum_ceiling, excess
from foveate.faithfulness.objects import beyond_own_place, mean_over_objects
from foveate.faithfulness.readings import MATCH
from foveate.faithfulness.videos import mean_over_videos
from foveate.stats.intervals import Interval, bootstrap_mean
from foveate.stats.paired import Comparison, compare_family

if TYPE_CHECKING:
    import xarray as xr

RANDOM, ORACLE, CONTROL = "random", "oracle", "control"
CONVERGED_SHARE = 0.95
"""A method is ranked when at least this share of its maps converged."""
RANK_TIE = 0.005
"""Mean areas closer than this share of the methods' spread tie in rank: saturated curves have no order."""


class ProtocolKey(NamedTuple):
    """One way to score: which curve, which baseline, which output scale."""

    mode: str
    baseline: str
    scale: str

    def __str__(self) -> str:
        return f"{self.mode}, {self.baseline} baseline, {self.scale}"

    @property
    def lower_is_better(self) -> bool:
        """Deletion wants a small area, insertion a large one."""
        return self.mode == "deletion"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``deletion`` and ``insertion`` are mean areas over images under the main baseline and scale;
    ``versus_random`` is the paired comparison of the main protocol; ``protocols_better`` and ``..._worse``
    count the protocols in which the verdict against random is that. ``ranks`` is (best, worst) over all
    protocols among ranked methods, None for controls and unranked ones. ``localisation`` and ``agreement``
    (with Captum, beyond the cross-image null) are by measure. ``deletion_by_match`` is the mean deletion area of
    objects followed by match, NaN for targets that are no objects.
    """

    method: str
    role: str
    n: int
    deletion: float
    insertion: float
    versus_random: Comparison | None
    protocols_better: int
    protocols_worse: int
    ranks: tuple[int, int] | None
    localisation: Mapping[str, Interval] = field(default_factory=dict)
    agreement: Mapping[str, Interval] = field(default_factory=dict)
    converged: float = 1.0
    seed_spearman: float = float("nan")
    deletion_by_match: float = float("nan")

    @property
    def is_control(self) -> bool:
        """Whether the row is a reference map and no method."""
        return self.role == CONTROL

    @property
    def is_ranked(self) -> bool:
        """Whether the row takes part in the ranking."""
        return not self.is_control and self.converged >= CONVERGED_SHARE


@dataclass(frozen=True)
class Leaderboard:
    """``rows`` best first under ``main``; ``pairwise`` compares the first method with every other row.

    ``beyond`` compares every ranked method with the object's own box and mask, by control, for targets on objects.
    """

    rows: tuple[Row, ...]
    main: ProtocolKey
    protocols: tuple[ProtocolKey, ...]
    n: int
    pairwise: Mapping[str, Comparison] = field(default_factory=dict)
    beyond: Mapping[str, Mapping[str, Comparison]] = field(default_factory=dict)
    ceilings: Mapping[str, Interval] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)

    @property
    def ranked(self) -> tuple[Row, ...]:
        """Methods that take part in the ranking, best first."""
        return tuple(row for row in self.rows if row.is_ranked)

    @property
    def controls(self) -> tuple[Row, ...]:
        """Reference maps, best first."""
        return tuple(row for row in self.rows if row.is_control)

    @property
    def unranked(self) -> tuple[Row, ...]:
        """Methods whose maps did not converge."""
        return tuple(row for row in self.rows if not row.is_control and not row.is_ranked)


def build_leaderboard(
    scores: xr.Dataset, agreement: xr.Dataset | None = None, *, main: ProtocolKey | None = None, seed: int = 0
) -> Leaderboard:
    """Build the table from stored scores.

    ``scores`` has ``area (method, sample, [target,] mode, baseline, scale)`` with a method "random" (mean
    over random orders), ``role (method)`` ("method" or "control"), ``converged (method)`` as a share, and
    optionally ``localisation (method, sample, [target,] measure)`` and ``seed_spearman (method)``. Targets
    of one sample are averaged first: the unit is the image; with a coordinate ``video (sample)``, samples of one
    video too: the unit is the video. Raises UsageError without "random".
    """
    names = [str(name) for name in scores["method"].values]
    if RANDOM not in names:
        raise UsageError(f"leaderboard: the scores have no {RANDOM!r} row to compare with, only {names}")
    table = _protocol_table(mean_over_videos(mean_over_objects(scores["area"])), names)
    main = main or next(iter(table))
    if main not in table:
        raise UsageError(f"leaderboard: no scores for ({main}); there are {'; '.join(map(str, table))}")
    evidence = _Evidence(
        table=table,
        main=main,
        versus={key: _versus_random(column, key, seed) for key, column in table.items()},
        ranks=_rank_ranges(table, [name for name in names if _may_rank(scores, name)]),
    )
    rows = sorted((_row(scores, agreement, name, evidence, seed) for name in names), key=_sort_key(main))
    return Leaderboard(
        rows=tuple(rows),
        main=main,
        protocols=tuple(table),
        n=int(np.isfinite(table[main][RANDOM]).sum()),
        pairwise=_pairwise(table[main], rows, main, seed),
        beyond=beyond_own_place(
            table[main],
            [row.method for row in rows if row.is_ranked],
            lower_is_better=main.lower_is_better,
            seed=seed,
        ),
        ceilings=_ceilings(scores, agreement, seed),
        facts=dict(scores.attrs),
    )


@dataclass(frozen=True)
class _Evidence:
    """What all rows are built from: scores by protocol and method, comparisons with random, rank ranges."""

    table: Mapping[ProtocolKey, Mapping[str, np.ndarray]]
    main: ProtocolKey
    versus: Mapping[ProtocolKey, Mapping[str, Comparison]]
    ranks: Mapping[str, tuple[int, int]]

    def mean(self, mode: str, name: str, *, scale: str | None = None) -> float:
        """Mean area over images under the main baseline and scale (or another scale)."""
        key = self.main._replace(mode=mode, scale=scale or self.main.scale)
        values = self.table.get(key, {}).get(name, np.empty(0))
        values = values[np.isfinite(values)]
        return float(values.mean()) if values.size else float("nan")

    def count(self, verdict: str, name: str) -> int:
        """In how many protocols the verdict against random is this."""
        return sum(name in column and column[name].verdict == verdict for column in self.versus.values())


def _row(scores: xr.Dataset, agreement: xr.Dataset | None, name: str, evidence: _Evidence, seed: int) -> Row:
    return Row(
        method=name,
        role=str(scores["role"].sel({"method": name}).item()),
        n=int(np.isfinite(evidence.table[evidence.main][name]).sum()),
        deletion=evidence.mean("deletion", name),
        deletion_by_match=evidence.mean("deletion", name, scale="probability" + MATCH),
        insertion=evidence.mean("insertion", name),
        versus_random=evidence.versus[evidence.main].get(name),
        protocols_better=evidence.count("better", name),
        protocols_worse=evidence.count("worse", name),
        ranks=evidence.ranks.get(name),
        localisation=_localisation(scores, name, seed),
        agreement=_agreement(agreement, name, seed),
        converged=_value(scores, "converged", name),
        seed_spearman=_value(scores, "seed_spearman", name),
    )


def _may_rank(scores: xr.Dataset, name: str) -> bool:
    role = str(scores["role"].sel({"method": name}).item())
    return role != CONTROL and _value(scores, "converged", name) >= CONVERGED_SHARE


def _protocol_table(areas: xr.DataArray, names: list[str]) -> dict[ProtocolKey, dict[str, np.ndarray]]:
    """Scores (sample,) by protocol and method; the first protocol is the default main one."""
    table = {}
    for baseline in areas["baseline"].values:
        for scale in areas["scale"].values:
            for mode in areas["mode"].values:
                chosen = areas.sel(mode=mode, baseline=baseline, scale=scale).transpose("method", "sample")
                key = ProtocolKey(str(mode), str(baseline), str(scale))
                table[key] = dict(zip(names, chosen.values.astype(np.float64), strict=True))
    return table


def _versus_random(column: Mapping[str, np.ndarray], key: ProtocolKey, seed: int) -> dict[str, Comparison]:
    differences = {name: values - column[RANDOM] for name, values in column.items() if name != RANDOM}
    return compare_family(differences, lower_is_better=key.lower_is_better, seed=seed)


def _rank_ranges(
    table: Mapping[ProtocolKey, Mapping[str, np.ndarray]], ranked: list[str]
) -> dict[str, tuple[int, int]]:
    """(best, worst) rank of each method over all protocols, by mean area, on images that all methods have."""
    if not ranked:
        return {}
    ranks = []
    for key, column in table.items():
        stack = np.stack([column[name] for name in ranked])
        common = np.isfinite(stack).all(axis=0)
        if common.any():
            means = stack[:, common].mean(axis=1)
            ranks.append(ranks_of(means if key.lower_is_better else -means))
    if not ranks:
        return {}
    low, high = np.min(ranks, axis=0), np.max(ranks, axis=0)
    return {name: (int(low[i]), int(high[i])) for i, name in enumerate(ranked)}


def ranks_of(losses: np.ndarray) -> np.ndarray:
    """1 + how many are smaller by more than :data:`RANK_TIE` of the spread, ``(method,)``."""
    margin = RANK_TIE * float(np.ptp(losses))
    return np.asarray(1 + (losses[None, :] < losses[:, None] - margin).sum(axis=1))


def _sort_key(main: ProtocolKey) -> Callable[[Row], tuple[bool, float]]:
    def key(row: Row) -> tuple[bool, float]:
        value = row.deletion if main.lower_is_better else -row.insertion
        return bool(np.isnan(value)), float(value)

    return key


def _pairwise(
    column: Mapping[str, np.ndarray], rows: list[Row], main: ProtocolKey, seed: int
) -> dict[str, Comparison]:
    """The first ranked method against every other row but the oracle: one family."""
    first = next((row.method for row in rows if row.is_ranked), None)
    if first is None:
        return {}
    others = [row.method for row in rows if row.method not in (first, ORACLE)]
    differences = {name: column[first] - column[name] for name in others}
    return compare_family(differences, lower_is_better=main.lower_is_better, seed=seed)


def _localisation(scores: xr.Dataset, name: str, seed: int) -> dict[str, Interval]:
    if "localisation" not in scores:
        return {}
    values = scores["localisation"].sel({"method": name})
    values = values.mean("target", skipna=True) if "target" in values.dims else values
    values = mean_over_videos(values)
    found = {str(m): bootstrap_mean(values.sel(measure=m).values, seed=seed) for m in scores["measure"].values}
    return {measure: interval for measure, interval in found.items() if interval.n}


def _agreement(table: xr.Dataset | None, name: str, seed: int) -> dict[str, Interval]:
    """Agreement with Captum beyond the null, by measure."""
    if table is None or not table.sizes["captum"] or name not in table["method"].values:
        return {}
    found = {str(m): excess(table, name, str(m), seed=seed) for m in table["measure"].values}
    return {measure: interval for measure, interval in found.items() if interval.n}


def _ceilings(scores: xr.Dataset, table: xr.Dataset | None, seed: int) -> dict[str, Interval]:
    """What agreement can reach: among Captum's methods, and of sampled methods with themselves."""
    found = {}
    if table is not None and table.sizes["captum"] > 1:
        found["captum"] = captum_ceiling(table, seed=seed)
    if "seed_spearman" in scores and np.isfinite(scores["seed_spearman"]).any():
        found["seeds"] = bootstrap_mean(scores["seed_spearman"].values, seed=seed)
    return found


def _value(scores: xr.Dataset, variable: str, name: str) -> float:
    return float(scores[variable].sel({"method": name})) if variable in scores else float("nan")
