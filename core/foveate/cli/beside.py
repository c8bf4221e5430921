"""``foveate beside CLIP DETECTOR IMAGES...``: do the two look at the same place for the same thing?"""

from __future__ import annotations

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
)

if TYPE_CHECKING:
    from foveate.interfaces import AttentionSource


@click.command("beside")
@click.argument("clip")
@click.argument("detector")
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--label", help="Ask for this label on every picture.  [default: each picture's surest object]")
@click.option("--method", default="chefer_iccv21", show_default=True, help="Attribution by which both explain.")
@click.option("--template", default="a photo of a {}", show_default=True, help="Prompt of a label.")
@click.option("--clip-weights", metavar="PATH", help="Folder of the picture-text model, or 'random'.")
@click.option("--detector-weights", metavar="PATH", help="Folder of the detector, or 'random'.")
@click.option("--clip-option", multiple=True, metavar="KEY=VALUE", help="Option of its adapter.")
@click.option("--detector-option", multiple=True, metavar="KEY=VALUE", help="For instance threshold=0.3.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Figure: PNG, SVG or PDF.")
@click.option("--seed", default=0, show_default=True, help="Of the bootstrap and the null's partners.")
@device_option
@dry_run_option
@json_option
def command(
    clip: str,
    detector: str,
    inputs: tuple[Path, ...],
    label: str | None,
    method: str,
    template: str,
    clip_weights: str | None,
    detector_weights: str | None,
    clip_option: tuple[str, ...],
    detector_option: tuple[str, ...],
    out: Path | None,
    seed: int,
    device: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compare what CLIP's prompt of a label and a DETECTOR's objects of that label look at, picture by picture.

    Where the targets differ (the detector found no such object, the method explains no target) there is no
    score but the reason. Pictures that cannot be read are told and left out: exit code 5.
    """
    from foveate.data.manifest import Manifest
    from foveate.errors import SampleError, UsageError
    from foveate.study.beside import find_labels, run_beside

    if "{}" not in template:
        raise UsageError(f"--template {template!r}: expected {{}} where the label goes")
    manifest = Manifest.discover(inputs)
    place = find_device(device)
    finder = _open(detector, detector_weights, place, parse_settings(detector_option))
    found = find_labels(finder, manifest)
    if dry_run:
        plan = {"pictures": len(found.positions), "labels": list(found.distinct), "failed": dict(found.failed)}
        emit(plan) if as_json else click.echo(_words(plan))
        return
    settings = parse_settings(clip_option)
    job = run_beside(
        lambda prompts: _open(clip, clip_weights, place, {"prompts": list(prompts), **settings}),
        finder, manifest, found=found, label=label, method=method, template=template, seed=seed,
    )  # fmt: skip
    figure = str(job.draw(out)) if out and job.report.result is not None else ""
    if as_json:
        emit({**job.to_dict(), "figure": figure})
    else:
        click.echo(job.to_text(), nl=False)
        say(f"wrote {figure}" if figure else "no figure was drawn" if out else "-o FILE.png draws the maps")
    if job.failed:
        click.get_current_context().exit(SampleError.exit_code)


def _open(model: str, weights: str | None, device: str, options: dict[str, Any]) -> AttentionSource:
    from foveate.plugins.opening import open_source

    path = Path(weights) if weights not in (None, "random") else weights
    return open_source(model, weights=path, device=device, **options)


def _words(plan: dict[str, Any]) -> str:
    labels = ", ".join(plan["labels"]) or "none"
    lost = f"; {len(plan['failed'])} cannot be read" if plan["failed"] else ""
    return f"{plan['pictures']} pictures{lost}; two maps each; labels of their surest objects: {labels}"
