"""``foveate metrics``: measure the attention of a run, list metrics, write tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foveate.cli._common import emit, json_option, say, table
from foveate.errors import UsageError

if TYPE_CHECKING:
    from foveate.study.measure import MeasureReport
    from foveate.study.measure_summary import Line

HEADER = ("SITE", "METRIC", "LAYER", "N", "MEAN", "95% LOW", "HIGH", "UNIFORM", "UNIT", "OVER")


@click.command("metrics")
@click.argument("run", type=click.Path(), required=False)
@click.option("--list", "list_metrics", is_flag=True, help="List the metrics that are installed, and stop.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Only this one; repeat for several.")
@click.option("--site", "sites", multiple=True, metavar="ID", help="Only this site; repeat for several.")
@click.option(
    "--keys",
    type=click.Choice(["patch", "all"]),
    default="patch",
    show_default=True,
    help="Patch keys scaled to sum to 1, or all keys.",
)
@click.option("--overwrite", is_flag=True, help="Compute anew what is there, whatever its settings.")
@click.option("--csv", type=click.Path(dir_okay=False), help="Write the StreetCLIP study's eight columns here.")
@click.option(
    "--wide", type=click.Path(dir_okay=False), help="Write the well-defined metrics here (.csv or .parquet)."
)
@click.option("--layer", default=-1, show_default=True, help="Of tables: true number, or from the end.")
@click.option("--head", default="mean", show_default=True, help="Of tables: 'mean' of the weights, or a number.")
@click.option("--query", type=int, help="Of tables: position of the stored row; default the readout row.")
@json_option
def command(
    run: str | None,
    list_metrics: bool,
    metrics: tuple[str, ...],
    sites: tuple[str, ...],
    keys: str,
    overwrite: bool,
    csv: str | None,
    wide: str | None,
    layer: int,
    head: str,
    query: int | None,
    as_json: bool,
) -> None:
    """Measure the attention of RUN: one product metrics/SITE/METRIC each, and a summary over images.

    With --csv or --wide one table is written instead (unless --metric asks for both), with a
    .provenance.json beside it. Tables are audited first: an impossible number ends with exit code 6.
    """
    if list_metrics:
        _list(as_json)
        return
    if run is None:
        raise UsageError("metrics: no run given", remedy="foveate metrics RUN.zarr, or foveate metrics --list")
    payload: dict[str, Any] = {"run": run}
    if metrics or not (csv or wide):
        payload |= _measure(run, metrics, sites, keys, overwrite, as_json)
    if csv or wide:
        if len(sites) > 1:
            raise UsageError("metrics: a table is about one site", remedy="give one --site")
        payload["tables"] = _tables(run, csv, wide, metrics, keys, next(iter(sites), None), layer, head, query)
    if as_json:
        emit(payload)


def _list(as_json: bool) -> None:
    from foveate.plugins.manager import plugin_manager
    from foveate.study.measure_points import POINT_METRICS

    specs = [(spec.name, spec.summary) for spec in plugin_manager().specs("metric")]
    specs += [(metric.name, f"sampling points: {metric.summary} ({metric.unit})") for metric in POINT_METRICS]
    if as_json:
        emit({"metrics": [{"name": name, "summary": summary} for name, summary in specs]})
    else:
        click.echo(table(specs, ("METRIC", "WHAT IT IS")))


def _measure(
    run: str, metrics: tuple[str, ...], sites: tuple[str, ...], keys: Any, overwrite: bool, as_json: bool
) -> dict[str, Any]:
    from foveate.data.run import Run
    from foveate.study.measure import measure_run
    from foveate.study.measure_summary import summarise

    opened = Run.open(run)
    report = measure_run(opened, metrics or None, sites=sites or None, keys=keys, overwrite=overwrite)
    _say_skipped(report)
    lines = summarise(opened, report.written)
    if not as_json:
        click.echo(table([_row(line) for line in lines], HEADER))
        unit = "video" if opened.media == "clip" else "image"
        say(f"{len(report.written)} products in {report.path}, keys: {keys}; the unit is the {unit}")
    return {
        "keys": report.keys,
        "written": [asdict(item) for item in report.written],
        "skipped": [asdict(item) for item in report.skipped],
        "summary": [asdict(line) for line in lines],
    }


def _row(line: Line) -> tuple[Any, ...]:
    numbers = map(_number, (line.mean, line.low, line.high, line.uniform))
    return (line.site, line.metric, line.layer, line.n, *numbers, line.unit, line.over)


def _say_skipped(report: MeasureReport) -> None:
    by_reason: dict[tuple[str, str], list[str]] = {}
    for item in report.skipped:
        by_reason.setdefault((item.site, item.reason), []).append(item.metric)
    for (site, reason), names in by_reason.items():
        say(f"left out at {site or 'every site'}: {', '.join(names)} ({reason})")


def _tables(
    run: str,
    csv: str | None,
    wide: str | None,
    metrics: tuple[str, ...],
    keys: Any,
    site: str | None,
    layer: int,
    head: str,
    query: int | None,
) -> list[dict[str, Any]]:
    from foveate.data.export import study_table, wide_table, write_table
    from foveate.data.export_rows import select
    from foveate.data.run import Run
    from foveate.study.measure import load_metrics

    opened = Run.open(run)
    selection = select(opened, site=site, layer=layer, head=int(head) if head.isdigit() else head, query=query)
    made = []
    if csv:
        made.append((csv, study_table(opened, selection)))
    if wide:
        chosen = load_metrics(metrics or None)[0]
        made.append((wide, wide_table(opened, selection, chosen, keys=keys)))
    written = []
    for path, content in made:
        sidecar = write_table(opened, content, Path(path))
        say(f"{path}: {len(content.frame)} images, K = {content.tokens}, provenance in {sidecar.name}")
        told = {"rows": len(content.frame), "K": content.tokens, "provenance": str(sidecar)}
        written.append({"path": path, **told})
    return written


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.4g}"
