"""``foveate capture MODEL INPUTS... -o RUN.zarr``: record attention on images or clips as labelled arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foveate.cli._common import dry_run_option, emit, json_option, model_options, open_from_options, say
from foveate.errors import UsageError

if TYPE_CHECKING:
    from foveate.data.manifest import Manifest
    from foveate.data.sampling import Sampling
    from foveate.interfaces import AttentionSource, CapturePlan
    from foveate.study.capture import CaptureReport
    from foveate.study.estimate import Estimate

SHOWN_FAILURES = 20


def plan_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say what is kept."""
    for option in reversed(
        (
            click.option("--sites", metavar="IDS", help="Comma-separated site ids.  [default: all]"),
            click.option("--layers", metavar="LIST", help="For instance -1, or 0,6:.  [default: all]"),
            click.option("--heads", type=click.Choice(["keep", "mean"]), default="keep", show_default=True),
            click.option(
                "--rows",
                default="readout",
                show_default=True,
                metavar="RULE",
                help="readout (what the answer is read from), all (full matrices), none, or positions: 0,5.",
            ),
            click.option(
                "--reductions",
                default="entropy,received",
                show_default=True,
                metavar="LIST",
                help="Over all rows: entropy, received, head_mean, topk; or none. Of kept rows: points "
                "(where deformable attention sampled).",
            ),
            click.option("--topk", default=16, show_default=True, help="Keys kept by the reduction topk."),
            click.option(
                "--store-dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True
            ),
        )
    ):
        function = option(function)
    return function


def clip_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that choose frames of clips: passed on as they are to :func:`sampling`."""
    for option in reversed(
        (
            click.option("--frames", type=int, metavar="N", help="Of each clip N frames, evenly.  [default: all]"),
            click.option("--fps", type=float, metavar="RATE", help="Take frames at this rate."),
            click.option(
                "--stride", type=int, default=1, show_default=True, metavar="N", help="Every N-th frame."
            ),
            click.option("--window", type=int, metavar="N", help="Cut long videos: N frames are one sample."),
            click.option("--hop", type=int, metavar="M", help="A window begins every M frames.  [default: N]"),
        )
    ):
        function = option(function)
    return function


def sampling(options: dict[str, Any]) -> Sampling:
    """Take the values of :func:`clip_options` out of ``options``."""
    from foveate.data.sampling import Sampling

    return Sampling(**{name: options.pop(name) for name in ("frames", "fps", "stride", "window", "hop")})


@click.command("capture")
@click.argument("model")
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The run: a zarr folder.")
@plan_options
@clip_options
@click.option("--batch-size", type=int, help="Samples a forward pass.  [default: 8 images, 1 clip]")
@click.option(
    "--block",
    default=64,
    show_default=True,
    metavar="N",
    help="Frames that a model which carries its memory reads at a time; 0: whole clips.",
)
@click.option("--top", default=5, show_default=True, help="Answers kept a sample.")
@click.option("--retry-failed", is_flag=True, help="Try the failed samples of an existing run again.")
@click.option("--target-kind", metavar="KIND", help="Also store the score of this target (see inspect).")
@model_options
@dry_run_option
@json_option
def command(
    model: str,
    inputs: tuple[Path, ...],
    output: Path,
    batch_size: int | None,
    block: int,
    top: int,
    retry_failed: bool,
    target_kind: str | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Record what MODEL attends to on INPUTS: images, folders, CSV or Parquet tables with a `path` column.

    A model of clips takes videos, animated images and folders of frames; --frames, --fps, --stride and --window
    choose frames.

    Every column of a table becomes a sample coordinate; `label` and `mask` are used where they exist. The same
    call again continues a run that was cut off. Exit code 5 where some samples failed: they are listed, and the
    run holds all others.
    """
    from foveate.data.manifest import Manifest
    from foveate.errors import SampleError
    from foveate.interfaces import Target
    from foveate.study.capture import estimate_capture, run_capture

    keep = {name: options.pop(name) for name in PLAN_NAMES}
    chosen = sampling(options)
    check_inputs(inputs)
    source = open_from_options(model, **options)
    manifest = Manifest.discover(inputs, source.media, chosen)
    _say_found(manifest)
    plan = _plan(source, keep)
    if dry_run:
        estimate = estimate_capture(source, manifest, output, plan=plan, batch_size=batch_size, block=block)
        _show_estimate(estimate, output, as_json)
        return
    with _progress(len(manifest)) as progress:
        report = run_capture(
            source,
            manifest,
            output,
            plan=plan,
            batch_size=batch_size,
            block=block,
            reference=str(Path(model).absolute()) if Path(model).exists() else model,
            options=opening(options),
            target=Target(target_kind) if target_kind else None,
            top=top,
            retry_failed=retry_failed,
            progress=progress,
        )
    _show_report(report, as_json)
    if report.failed:
        click.get_current_context().exit(SampleError.exit_code)


PLAN_NAMES = ("sites", "layers", "heads", "rows", "reductions", "topk", "store_dtype")


def opening(options: dict[str, Any]) -> dict[str, Any]:
    """The model options of the command line as keyword arguments of ``foveate.open``, paths absolute."""
    from foveate.cli._common import parse_settings

    given = {name: options.get(name) for name in ("source", "weights", "device", "dtype", "prompts")}
    for name in ("weights", "prompts"):
        value = given[name]
        if value and value != "random" and Path(value).exists():
            given[name] = str(Path(value).absolute())
    chosen = {name: value for name, value in given.items() if value is not None}
    return {**chosen, **parse_settings(options.get("settings", ()))}


def _plan(source: AttentionSource, keep: dict[str, Any]) -> CapturePlan:
    from foveate.study.plan import build_plan

    names = {name: keep[name] for name in ("layers", "heads", "rows", "topk")}
    reductions = () if keep["reductions"] == "none" else _list(keep["reductions"])
    return build_plan(
        source, sites=_list(keep["sites"]), reductions=reductions or (), dtype=keep["store_dtype"], **names
    )


def _list(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; none where stderr is not a terminal."""
    from tqdm import tqdm

    with tqdm(total=total, unit="sample", desc="capture", disable=None) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def check_inputs(inputs: tuple[Path, ...]) -> None:
    """Raise UsageError for an input that does not exist, before a model is opened for nothing."""
    for path in inputs:
        if not path.exists():
            raise UsageError(f"input {path}: no such file or folder")


def _say_found(manifest: Manifest) -> None:
    from foveate.data.manifest import video_hint

    ignored = ", ".join(f"{count} x {suffix}" for suffix, count in sorted(manifest.ignored.items()))
    hint = video_hint(manifest.ignored) if manifest.media == "image" else ""
    say(f"{len(manifest)} samples" + (f" (not {manifest.media}s, ignored: {ignored}{hint})" if ignored else ""))


def _show_estimate(estimate: Estimate, output: Path, as_json: bool) -> None:
    from foveate.study.estimate import size

    arrays = [
        {
            "array": spec.name,
            "dims": spec.dims,
            "shape": spec.shape,
            "dtype": spec.dtype,
            "bytes": spec.sample_bytes * estimate.samples,
        }
        for spec in estimate.arrays
    ]
    if as_json:
        emit(
            {
                "dry_run": True,
                "run": str(output),
                "samples": estimate.samples,
                "arrays": arrays,
                "bytes": estimate.bytes,
                "seconds": estimate.seconds,
                "free_bytes": estimate.free,
                "fits": estimate.fits,
            }
        )
        return
    for array, spec in zip(arrays, estimate.arrays, strict=True):
        axes = ", ".join(f"{dim} {count}" for dim, count in zip(spec.dims, spec.shape, strict=True))
        click.echo(f"{spec.name}  ({axes})  {spec.dtype}  {size(float(str(array['bytes'])))}")
    click.echo(f"samples    {estimate.samples}")
    click.echo(f"size       {size(estimate.bytes)} before compression ({size(estimate.sample_bytes)} a sample)")
    click.echo(f"time       about {estimate.seconds:.0f} s ({estimate.seconds_per_sample:.3f} s a sample)")
    click.echo(f"free disk  {size(estimate.free)}: {'enough' if estimate.fits else 'NOT ENOUGH'}")
    click.echo("nothing was written")


def _show_report(report: CaptureReport, as_json: bool) -> None:
    notes = _notes(report)
    if as_json:
        emit({**vars(report), "path": str(report.path), "complete": report.complete, "notes": notes})
    else:
        resumed = f", {report.resumed} of them from before" if report.resumed else ""
        click.echo(f"{report.path}: {report.captured} of {report.samples} samples captured{resumed}")
        click.echo(f"certificate: {_certificate(report)}")
    for note, names in list(notes.items())[:SHOWN_FAILURES]:
        say(f"note: {note}: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    if len(notes) > SHOWN_FAILURES:
        say(f"and {len(notes) - SHOWN_FAILURES} notes more: see samples/notes in the run")
    if report.failed:
        say(f"{len(report.failed)} samples failed:")
        for name, reason in list(report.failed.items())[:SHOWN_FAILURES]:
            say(f"  {name}: {reason}")
        if len(report.failed) > SHOWN_FAILURES:
            say(f"  and {len(report.failed) - SHOWN_FAILURES} more: see samples/failure in the run")


def _notes(report: CaptureReport) -> dict[str, list[str]]:
    """What a person might not expect of files that were used (cut off, damaged), with their samples."""
    from foveate.data.run import Run

    samples = Run.open(report.path).samples
    found: dict[str, list[str]] = {}
    for name, note in zip(samples["id"].values, samples["notes"].values, strict=True):
        if str(note):
            found.setdefault(str(note), []).append(str(name))
    return found


def _certificate(report: CaptureReport) -> str:
    known = report.certificate
    if not known:
        return "none"
    value_error, row_error = (float(known.get(name, "nan")) for name in ("value_error", "row_error"))
    return (
        f"P V equals the model's own output within {value_error:.1e} (relative),"
        f" rows sum to 1 within {row_error:.1e}"
    )
