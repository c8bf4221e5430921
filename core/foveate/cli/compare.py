"""``foveate compare A.zarr B.zarr``: do two models look at the same things on the same images?"""

from __future__ import annotations

from pathlib import Path

import click

from foveate.cli._common import emit, json_option, say


@click.command("compare")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--method",
    default="readout",
    show_default=True,
    help="readout (the stored attention row the answer is read from), or an attribution that both runs hold.",
)
@click.option(
    "--layer", default=-1, show_default=True, help="Layer of the readout: from the end, or a true number."
)
@click.option("--site-a", help="Site of A; the first with rows over patches by default.")
@click.option("--site-b", help="Site of B.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for text, CSV, JSON and the figure.")
@click.option("--figure", type=click.Choice(["png", "svg", "pdf"]), default="png", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the bootstrap and the null's partners.")
@json_option
def command(
    a: Path,
    b: Path,
    method: str,
    layer: int,
    site_a: str | None,
    site_b: str | None,
    out: Path | None,
    figure: str,
    seed: int,
    as_json: bool,
) -> None:
    """Compare two runs on the images that both captured.

    Maps are laid by area on the coarser grid where both models saw the picture; agreement of the same image
    stands beside agreement across images. Where the maps were not made alike there is no score, and why.
    """
    from foveate.data.run import Run
    from foveate.study.compare import compare_runs

    report = compare_runs(
        Run.open(a),
        Run.open(b),
        method=method,
        layer=layer,
        sites=(site_a, site_b),
        out=out,
        figure=figure,
        seed=seed,
    )
    if as_json:
        emit(report.to_dict())
    else:
        click.echo(report.to_text(), nl=False)
        for path in report.files:
            say(f"wrote {path}")
