"""``foveate faithfulness RUN``: do the stored explanations explain? Deletion, insertion, controls, a ranking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foveate.cli._common import device_option, dry_run_option, emit, find_device, json_option, say
from foveate.errors import FoveateError, SampleError, UsageError

if TYPE_CHECKING:
    from foveate.data.run import Run
    from foveate.interfaces import AttentionSource
    from foveate.study.faithfulness import Cost
    from foveate.study.faithfulness_job import Settings

BASELINES = ("mean", "blur", "black", "zero", "freeze")
UNITS = ("cells", "tubes", "frames")
DEFAULT_BASELINES = {"cells": ("mean", "blur"), "tubes": ("mean", "blur"), "frames": ("freeze", "mean", "blur")}
"""Of whole frames, repeating the nearest kept one comes first: nothing is shown that no camera saw."""
TWIN_METHODS = ("readout", "saliency_abs")
"""Repeated on an untrained twin where the run holds them: one attention map, one gradient map."""


@click.command("faithfulness")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-m", "--method", "methods", multiple=True, help="Stored attribution; repeatable.  [default: all]")
@click.option("--steps", default=10, show_default=True, help="Steps from the whole image to none of it.")
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=click.Choice(BASELINES),
    help="What replaces a patch; repeatable, the first is the table's; freeze is for clips.  "
    "[default: mean, blur; with --unit frames freeze, mean, blur]",
)
@click.option(
    "--unit",
    type=click.Choice(UNITS),
    default="cells",
    show_default=True,
    help="What vanishes at once; tubes (a patch through time) and frames are for clips.",
)
@click.option("--tube-frames", type=int, metavar="N", help="Frame cells in a tube at most.  [default: all]")
@click.option(
    "--unit-value",
    type=click.Choice(["sum", "mean"]),
    default="sum",
    show_default=True,
    help="What a map gives a tube or a frame.",
)
@click.option("--samples", type=int, metavar="N", help="A seeded draw of N images or clips.  [default: all]")
@click.option("--random-orders", default=20, show_default=True, help="Random orders an image is compared with.")
@click.option("--seed", default=0, show_default=True, help="Of ties, random orders, draws and intervals.")
@click.option(
    "--untrained",
    default="auto",
    show_default=True,
    metavar="MODEL|auto|none",
    help="Untrained twin for controls; auto is the same model with random weights.",
)
@click.option("--batch-size", default=8, show_default=True, help="Images prepared together.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for the leaderboard's files.")
@click.option("--figure", type=click.Choice(["png", "svg", "pdf"]), default="png", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace curves that were made with other settings.")
@device_option
@dry_run_option
@json_option
def command(
    run: Path,
    methods: tuple[str, ...],
    untrained: str,
    device: str,
    out: Path | None,
    figure: str,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Score the explanations that `foveate attribute` stored in RUN, beside maps that explain nothing.

    Patches vanish (deletion) or appear (insertion) in the order of each map; the answer to the intact image
    is scored as probability and as logit. Of clips, --unit says what vanishes at once, and statistics count
    videos. The same call again continues a job that was cut off. Exit code 5 where some could not be read.
    """
    from foveate.data.run import Run
    from foveate.study.faithfulness import estimate_faithfulness, run_faithfulness

    opened = Run.open(run)
    source = opened.open_source(device=find_device(device))
    twin = _twin(opened, untrained, device)
    job: dict[str, Any] = {
        "source": source,
        "methods": list(methods) or None,
        "settings": _settings(**given),
        "twin": twin,
        "twin_methods": _twin_methods(opened) if twin is not None else (),
    }
    if dry_run:
        _show_cost(estimate_faithfulness(opened, **job), as_json)
        return
    with _progress() as progress:
        report = run_faithfulness(opened, out=out, figure=figure, progress=progress, **job)
    if as_json:
        emit(report.to_dict())
    else:
        click.echo(report.to_text(), nl=False)
    for path in report.files:
        say(f"wrote {path}")
    for sample, reason in report.failed.items():
        say(f"failed: {sample}: {reason}")
    if report.failed:
        click.get_current_context().exit(SampleError.exit_code)


def _settings(
    *,
    steps: int,
    baselines: tuple[Any, ...],
    samples: int | None,
    random_orders: int,
    seed: int,
    batch_size: int,
    overwrite: bool,
    unit: Any,
    tube_frames: int | None,
    unit_value: Any,
) -> Settings:
    from foveate.faithfulness.curves import Protocol
    from foveate.faithfulness.scoring import Scoring
    from foveate.faithfulness.units import Unit
    from foveate.study.faithfulness_job import Settings

    if samples is not None and samples < 1:
        raise UsageError(f"--samples {samples}: expected at least 1")
    chosen: tuple[Any, ...] = baselines or DEFAULT_BASELINES[unit]
    protocol = Protocol(baselines=tuple(dict.fromkeys(chosen)), steps=steps)
    taken = Unit(unit, tube_frames, unit_value)
    return Settings(Scoring(protocol, random_orders, seed, taken), samples, max(1, batch_size), overwrite)


def _twin(run: Run, untrained: str, device: str) -> AttentionSource | None:
    """The untrained model; where "auto" finds none, that is said and its control rows are missing."""
    if untrained == "none":
        return None
    from foveate.plugins.opening import open_source

    options = {**dict(run.attrs.get("open_options", {})), "device": find_device(device)}
    if untrained != "auto":
        options.pop("weights", None)
        return open_source(untrained, **options)
    try:
        return open_source(str(run.attrs.get("reference", "")), **{**options, "weights": "random"})
    except FoveateError as error:
        say(f"no untrained twin, so no untrained control: {error.message}")
        return None


def _twin_methods(run: Run) -> list[Any]:
    from foveate.plugins.manager import plugin_manager

    stored = [name for name in TWIN_METHODS if f"attributions/{name}" in run.products()]
    return [plugin_manager().spec("attribution", name).create() for name in stored]


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that learns its length with the first step."""
    from tqdm import tqdm

    with tqdm(unit="sample", desc="faithfulness", disable=None) as bar:

        def step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield step


def _show_cost(cost: Cost, as_json: bool) -> None:
    if as_json:
        emit({"dry_run": True, **vars(cost)})
        return
    click.echo(
        f"{cost.samples} samples, {len(cost.methods)} maps each ({', '.join(cost.methods)}): "
        f"{cost.forwards:,} pictures through the model, about {cost.seconds:.0f} s (from one timed sample)"
    )
    say("nothing was written")
