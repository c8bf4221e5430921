"""``foveate import FILE -o RUN``: recordings from another environment become a run."""  # noqa: N999  # the verb is called so

from __future__ import annotations

from pathlib import Path

import click

from foveate.cli._common import emit, json_option, say


@click.command("import")
@click.argument("recordings", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The run: a zarr folder.")
@click.option(
    "--pictures",
    type=click.Path(path_type=Path),
    help="The clips or images that were recorded.  [default: the recorded pictures, written beside the run]",
)
@click.option("--sites", metavar="LIST", help="Only these sites.  [default: all]")
@click.option(
    "--rows",
    default="auto",
    show_default=True,
    metavar="RULE",
    help="auto (all; of deformable attention those that the answer is read from), readout, all, none, or 0,5.",
)
@click.option("--heads", type=click.Choice(["keep", "mean"]), default="keep", show_default=True)
@click.option("--store-dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True)
@click.option("--top", default=10, show_default=True, help="Answers kept.")
@json_option
def command(
    recordings: tuple[Path, ...],
    output: Path,
    pictures: Path | None,
    sites: str | None,
    rows: str,
    heads: str,
    store_dtype: str,
    top: int,
    as_json: bool,
) -> None:
    """Make a run of RECORDINGS, .npz files that the exporter wrote where the model runs.

    The exporter is one file without dependencies, for old environments:
    `python -m foveate_dvis.exporter -o foveate_export.py` writes it. The same call again continues.
    """
    from typing import Any, cast

    from foveate.errors import SampleError
    from foveate.study.importing import import_recording

    report = import_recording(
        recordings,
        output,
        frames=pictures,
        sites=None if sites is None else [part.strip() for part in sites.split(",")],
        rows=rows,
        heads=cast("Any", heads),
        dtype=cast("Any", store_dtype),
        top=top,
    )
    if as_json:
        told = {"run": str(report.path), "samples": report.samples, "captured": report.captured}
        emit({**told, "failed": dict(report.failed), "certificate": dict(report.certificate)})
    else:
        click.echo(f"{report.path}: {report.captured} of {report.samples} imported in {report.seconds:.1f} s")
    for name, reason in report.failed.items():
        say(f"failed: {name}: {reason}")
    if report.failed:
        click.get_current_context().exit(SampleError.exit_code)
