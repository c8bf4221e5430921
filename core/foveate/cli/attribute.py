"""``foveate attribute``: explain every image of a run by several methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foveate.cli._common import (
    device_option,
    dry_run_option,
    emit,
    find_device,
    json_option,
    parse_settings,
    say,
    table,
)
from foveate.errors import UsageError

if TYPE_CHECKING:
    from foveate.study.attribute import AttributionReport, MethodReport
    from foveate.study.attribute_plan import Estimate

SAMPLES_FAILED = 5


@click.command("attribute")
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("-m", "--method", "methods", multiple=True, help="Method, or 'default' for a set; repeatable.")
@click.option("--set", "sets", multiple=True, metavar="METHOD.OPTION=VALUE", help="For instance ig.n_steps=64.")
@click.option("--target", "label", metavar="LABEL", help="Class to explain.  [default: the model's answer]")
@click.option("--target-kind", default="default", show_default=True, help="See `foveate inspect MODEL`.")
@click.option("--scale", type=click.Choice(["logit", "probability", "value"]), default="logit", show_default=True)
@click.option("--object", type=int, metavar="QUERY", help="Object query to explain.  [default: every object]")
@click.option("--max-targets", type=int, help="Room for explained objects a sample.  [default: as many as occur]")
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option(
    "--external", multiple=True, metavar="NAME=FILE", help="Maps of another tool, .npz or .npy; repeatable."
)
@click.option("--overwrite", is_flag=True, help="Replace maps that were made with other settings.")
@click.option("--list", "as_list", is_flag=True, help="List the methods and stop.")
@device_option
@dry_run_option
@json_option
def command(run: Path | None, as_list: bool, as_json: bool, dry_run: bool, **given: Any) -> None:
    """Explain what the model answered for the images or clips of RUN, and store the maps there.

    Prints, for each method, model evaluations a patch and the agreement (Spearman) of two seeds; a sampled
    map below 0.8 has not converged and stays out of rankings.
    """
    if as_list:
        _list(as_json)
        return
    if run is None:
        raise UsageError("which run?", remedy="foveate attribute RUN.zarr --method default (methods: --list)")
    if not given["methods"] and not given["external"]:
        raise UsageError("no method given", remedy="--method default, or choose from foveate attribute --list")
    if dry_run:
        _show_plan(_plan(run, given), as_json)
        return
    external, report = _do(run, given, as_json)
    _show(run, [*report.methods, *external], report, as_json)
    if report.failed:
        raise click.exceptions.Exit(SAMPLES_FAILED)


def _do(path: Path, given: dict[str, Any], as_json: bool) -> tuple[list[MethodReport], AttributionReport]:
    from foveate.data.run import Run
    from foveate.study.attribute import AttributionReport, add_external, attribute_run

    run = Run.open(path)
    external = [add_external(run, *_external(entry), overwrite=given["overwrite"]) for entry in given["external"]]
    if not given["methods"]:
        return external, AttributionReport(())
    with _progress() as progress:
        report = attribute_run(run, given["methods"], progress=progress, **_job(run, given))
    return external, report


def _plan(path: Path, given: dict[str, Any]) -> list[Estimate]:
    from foveate.data.run import Run
    from foveate.study.attribute import plan_run

    run = Run.open(path)
    return plan_run(run, given["methods"], **_job(run, given)) if given["methods"] else []


def _job(run: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a job and its plan share."""
    from foveate.interfaces import Target
    from foveate.study.attribute import Settings
    from foveate.study.attribute_plan import build_methods

    options = method_settings(given["sets"])
    build_methods(given["methods"], options)  # a misspelt name should not wait for the model to load
    label = given["label"]
    name = int(label) if label and label.isdigit() else label
    target = Target(given["target_kind"], name, given["object"], given["scale"])
    shared = {name: given[name] for name in ("seed", "max_targets", "batch_size", "overwrite")}
    return {
        "source": run.open_source(device=find_device(given["device"])),
        "options": options,
        "settings": Settings(target, **shared),
    }


def method_settings(sets: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """``("ig.n_steps=64",)`` as ``{"ig": {"n_steps": 64}}``. Raises UsageError for another form."""
    options: dict[str, dict[str, Any]] = {}
    for setting in sets:
        method, dot, rest = setting.partition(".")
        if not dot or not method:
            raise UsageError(f"--set {setting!r} is not METHOD.OPTION=VALUE", remedy="for instance ig.n_steps=64")
        options.setdefault(method, {}).update(parse_settings((rest,)))
    return options


def _external(entry: str) -> tuple[str, Path]:
    name, equals, path = entry.partition("=")
    if not equals or not name or not path:
        raise UsageError(f"--external {entry!r} is not NAME=FILE", remedy="for instance --external shap=shap.npz")
    return name, Path(path)


class _progress:  # noqa: N801  # used as a context manager only
    """A bar on stderr that learns its length with the first step."""

    def __enter__(self) -> Callable[[int, int], None]:
        from tqdm import tqdm

        self.bar = tqdm(unit="sample", desc="attribute", disable=None)
        return self._step

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def _step(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)


def _show(run: Path, reports: list[MethodReport], report: AttributionReport, as_json: bool) -> None:
    if as_json:
        named = {"failed": dict(report.failed), "left_out": dict(report.left_out)}
        emit({"run": str(run), "methods": [_record(r) for r in reports], **named})
        return
    rows = [
        (
            r.method,
            r.maps,
            _number(r.evaluations_per_patch),
            _number(r.seed_spearman),
            f"{r.converged_share:.0%}" if r.converged else f"{r.converged_share:.0%}, not converged",
        )
        for r in reports
    ]
    click.echo(table(rows, ("method", "maps", "evaluations/patch", "seed Spearman", "maps converged")))
    for sample, reason in report.failed.items():
        say(f"failed: {sample}: {reason}")
    for method, reason in report.left_out.items():
        say(f"left out of default: {reason}" if reason.startswith(method) else f"left out: {method}: {reason}")
    for method in (r.method for r in reports if not r.converged):
        say(f"{method}: not converged, kept out of rankings; {_more_effort(method)}")


EFFORT = ("masks", "n_steps", "n_samples", "evaluations_per_patch")
"""Options of methods by which a map becomes surer, at more model evaluations."""


def _more_effort(method: str) -> str:
    """What may help a method that has not converged, by the option that it really has."""
    from foveate.plugins.manager import plugin_manager

    spec = next((spec for spec in plugin_manager().specs("attribution") if spec.name == method), None)
    explainer = None if spec is None else spec.create()
    known = [name for name in EFFORT if hasattr(explainer, name)]
    if not known:
        return "see docs/attribution.md"
    return (
        " or ".join(f"more by --set {method}.{name}={2 * getattr(explainer, name)}" for name in known)
        + " may help"
    )


def _show_plan(plan: list[Estimate], as_json: bool) -> None:
    if as_json:
        emit({"dry_run": True, "methods": [vars(e) for e in plan], "seconds": sum(e.seconds for e in plan)})
        return
    rows = [
        (e.method, e.rows, e.forward, e.backward, _number(e.evaluations_per_patch), f"{e.seconds:.1f}")
        for e in plan
    ]
    header = ("method", "maps", "forward passes", "backward passes", "evaluations/patch", "seconds")
    click.echo(table(rows, header))
    say(f"about {sum(e.seconds for e in plan):.0f} s in all (from one timed image); nothing was written")


def _list(as_json: bool) -> None:
    from foveate.plugins.manager import plugin_manager

    specs = plugin_manager().specs("attribution")
    if as_json:
        emit({"methods": [{"name": s.name, "summary": s.summary, "missing": s.missing()} for s in specs]})
        return
    rows = [
        (s.name, s.summary, f"needs {', '.join(s.missing())}: {s.remedy}" if s.missing() else "") for s in specs
    ]
    click.echo(table(rows, ("method", "explains by", "")))


def _record(report: MethodReport) -> dict[str, Any]:
    return {**vars(report), "converged": report.converged}


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.2f}"
