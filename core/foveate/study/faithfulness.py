"""The job behind ``foveate faithfulness``: score every stored map of a run, with controls, and rank.

Curves are written as they are computed (``faithfulness/curves``; of tubes and frames of clips in
``faithfulness/tubes/curves`` and ``faithfulness/frames/curves``), so a job that was cut off goes on. Areas,
localisation, agreement and the leaderboard follow from what is stored and are made anew each time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from foveate.faithfulness.agreement import by_pair, captum_agreement
from foveate.faithfulness.curves import area_under, forward_count
from foveate.faithfulness.leaderboard import (
    CONTROL,
    CONVERGED_SHARE,
    RANDOM,
    Leaderboard,
    ProtocolKey,
    build_leaderboard,
)
from foveate.faithfulness.readings import MATCH, vanished_share
from foveate.faithfulness.scoring import score_maps
from foveate.faithfulness.tables import to_csv, to_dict, to_markdown, to_text
from foveate.study.clip_frames import product_name
from foveate.study.faithfulness_inputs import stored_maps
from foveate.study.faithfulness_job import CURVES, Job, Progress, Settings, fill

if TYPE_CHECKING:
    from foveate.data.run import Run
    from foveate.interfaces import AttentionSource, Attribution

DEFAULTS = Settings()
SCORES, AGREEMENT = "faithfulness/scores", "faithfulness/agreement"
VANISHES = "probability" + MATCH


@dataclass(frozen=True)
class FaithfulnessReport:
    """The leaderboard, the samples that could not be scored with the reason, and the files written."""

    board: Leaderboard
    failed: Mapping[str, str]
    files: tuple[Path, ...] = ()

    def to_text(self) -> str:
        """For a terminal."""
        return to_text(self.board)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        files = [str(path) for path in self.files]
        return {**to_dict(self.board), "failed": dict(self.failed), "files": files}


@dataclass(frozen=True)
class Cost:
    """What a job will take: pictures shown to the model, and seconds by one timed sample on this machine."""

    samples: int
    methods: tuple[str, ...]
    forwards: int
    seconds: float


def run_faithfulness(
    run: Run,
    *,
    source: AttentionSource | None = None,
    methods: Sequence[str] | None = None,
    settings: Settings = DEFAULTS,
    twin: AttentionSource | None = None,
    twin_methods: Sequence[Attribution] = (),
    main: ProtocolKey | None = None,
    out: Path | None = None,
    figure: str = "png",
    progress: Progress | None = None,
) -> FaithfulnessReport:
    """Score the run's attributions (default: all) by deletion and insertion, beside controls, and rank them.

    ``twin`` is an untrained model whose maps by ``twin_methods`` are further controls. Where images have
    masks, the oracle and localisation are added. With ``out``, a folder, the leaderboard is written as
    text, Markdown, CSV, JSON and a ``figure`` (png, svg or pdf). Raises UsageError where there are no maps,
    or they explain different targets or another answer than the model gives; StoreError where curves of
    other settings are there and ``settings.overwrite`` is not set, or no sample was captured.
    """
    run.check_captured()
    job = Job(run, source or run.open_source(), stored_maps(run, methods), settings, twin, tuple(twin_methods))
    failed = fill(job, progress)
    scores = _scores(job)
    run.write_product(product_name(SCORES, job.unit), scores)
    agreement = _agreement(job)
    if agreement.sizes["captum"]:
        run.write_product(product_name(AGREEMENT, job.unit), agreement)
    board = build_leaderboard(scores.isel(sample=job.positions), agreement, main=main, seed=settings.scoring.seed)
    files = _write(board, agreement, out, figure) if out is not None else ()
    return FaithfulnessReport(board, failed, files)


def estimate_faithfulness(
    run: Run,
    *,
    source: AttentionSource | None = None,
    methods: Sequence[str] | None = None,
    settings: Settings = DEFAULTS,
    twin: AttentionSource | None = None,
    twin_methods: Sequence[Attribution] = (),
) -> Cost:
    """What :func:`run_faithfulness` would take; one sample is scored and timed, nothing is written."""
    job = Job(run, source or run.open_source(), stored_maps(run, methods), settings, twin, tuple(twin_methods))
    position, bound = job.probe()
    started = time.perf_counter()
    visible = bound.visible(run.grid)
    scores = score_maps(bound.objective, job.maps(bound, [position]), run.grid, job.scoring, visible)
    seconds = time.perf_counter() - started
    units = job.unit.of(bound.objective.map_shape).count
    each = forward_count(len(scores.methods) - 1, job.scoring.random_orders, units, job.scoring.protocol)
    count = max(int(maps.known[job.positions].sum()) for maps in job.stored.values())
    return Cost(len(job.positions), scores.methods, each * count, seconds * count / len(bound.objective))


# --------------------------------------------------------------------- scores, agreement, leaderboard


def _scores(job: Job) -> xr.Dataset:
    """Areas and what the leaderboard needs beside them, from the stored curves."""
    curves = job.run.product(product_name(CURVES, job.unit)).load()
    names = [str(name) for name in curves["method"].values]
    stored = job.stored
    fraction = curves["fraction"].values
    if fraction.ndim > 1:  # clips of different length change other shares of their units: (sample, ..., step)
        fraction = fraction.reshape(len(fraction), *(1,) * (curves["curve"].ndim - 2), -1)
    area = xr.DataArray(
        area_under(curves["curve"].values, fraction),
        dims=curves["curve"].dims[:-1],
        attrs={"long_name": f"area under the curve: mean score over the fraction of {job.unit.kind} changed"},
    )
    data = xr.Dataset(
        {
            "area": area.transpose("method", "sample", ...),
            "role": ("method", ["method" if name in stored else CONTROL for name in names]),
            "converged": ("method", [stored[n].converged_share if n in stored else 1.0 for n in names]),
            "seed_spearman": ("method", [stored[n].seed_spearman if n in stored else np.nan for n in names]),
        },
        coords={name: curves[name] for name in ("method", "mode", "baseline", "scale", "target", "sample")},
        attrs={key: value for key, value in curves.attrs.items() if key not in ("product_hash", "commit_batch")},
    )
    if job.videos is not None:
        data = data.assign_coords(video=("sample", job.videos)).assign_attrs(unit_of_statistics="video")
    if VANISHES in curves["scale"].values:
        gone = _vanished(curves)
        data["vanished"] = gone.transpose("method", "sample", ...)
        data.attrs["vanished_share"] = float(gone.mean())
    if "localisation" in curves:
        data["localisation"] = curves["localisation"].transpose("method", "sample", ...)
    return data


def _vanished(curves: xr.Dataset) -> xr.DataArray:
    """Share of a curve's pictures in which nothing matches the object: the dims of curves but ``step``.

    NaN for "random", whose curve is a mean of many.
    """
    followed = curves["curve"].sel(scale=VANISHES, drop=True)
    share = xr.DataArray(vanished_share(followed.values), dims=followed.dims[:-1])
    known = followed.notnull().all("step") & (followed["method"] != RANDOM)
    words = "share of the pictures in which nothing matches the object"
    return share.where(known.drop_vars("method")).assign_attrs(long_name=words)


def _agreement(job: Job) -> xr.Dataset:
    """Agreement of the stored methods with Captum's among them that converged, on the scored samples."""
    from foveate.plugins.manager import plugin_manager

    known = {spec.name: spec.capabilities for spec in plugin_manager().specs("attribution")}
    by_captum = [
        n for n in job.stored if "captum" in known.get(n, ()) and job.stored[n].converged_share >= CONVERGED_SHARE
    ]
    maps = {
        name: stored.values[job.positions].reshape(len(job.positions), stored.values.shape[1], -1).astype(float)
        for name, stored in job.stored.items()
    }
    ids = [str(name) for name in job.run.samples["id"].values[job.positions]]
    videos = None if job.videos is None else [job.videos[position] for position in job.positions]
    return captum_agreement(maps, by_captum, ids, videos=videos, seed=job.scoring.seed)


def _write(board: Leaderboard, agreement: xr.Dataset, out: Path, figure: str) -> tuple[Path, ...]:
    from foveate.study.faithfulness_figure import draw

    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "leaderboard.txt": to_text(board),
        "leaderboard.md": to_markdown(board),
        "leaderboard.csv": to_csv(board),
        "leaderboard.json": json.dumps(to_dict(board), indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    if pairs := by_pair(agreement):
        pd.DataFrame(pairs).to_csv(out / "agreement.csv", index=False)
        texts["agreement.csv"] = ""
    return (*(out / name for name in texts), draw(board, out / f"leaderboard.{figure}"))
