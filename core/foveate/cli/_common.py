"""What the verbs share: options, JSON on stdout, words on stderr. Imports nothing heavy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from foveate.errors import UsageError

if TYPE_CHECKING:
    from foveate.interfaces import AttentionSource

SCHEMA_VERSION = 1
Function = TypeVar("Function", bound=Callable[..., Any])


def emit(payload: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout, ``schema_version`` first; NaN and infinities become null."""
    plain = {"schema_version": SCHEMA_VERSION, **_plain(payload)}
    click.echo(json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False))


def say(message: str) -> None:
    """A line for people: progress, warnings. Goes to stderr."""
    click.echo(message, err=True)


def table(rows: list[tuple[Any, ...]], header: tuple[str, ...]) -> str:
    """Left-aligned columns two spaces apart."""
    cells = [tuple(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
device_option = click.option(
    "--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda, cuda:1, mps, or auto."
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Say what would be done and what it costs, then stop."
)


def model_options(function: Function) -> Function:
    """Options that choose and open a model: passed on as they are to :func:`open_from_options`."""
    for option in reversed(
        (
            click.option("--source", metavar="NAME", help="Adapter or family, where MODEL alone is ambiguous."),
            click.option("--weights", metavar="PATH", help="File, folder, or 'random'."),
            click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16."),
            device_option,
            click.option("--prompts", metavar="FILE", help="Text file: one prompt (class name) a line."),
            click.option(
                "--option", "settings", multiple=True, metavar="KEY=VALUE", help="Option of the adapter."
            ),
        )
    ):
        function = option(function)
    return function


def open_from_options(
    model: str,
    *,
    source: str | None = None,
    weights: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    prompts: str | None = None,
    settings: tuple[str, ...] = (),
) -> AttentionSource:
    """Open a model from the values of :func:`model_options`. Raises as ``foveate.open`` does."""
    from foveate.plugins.opening import open_source

    options = parse_settings(settings)
    if prompts is not None:
        options["prompts"] = prompts
    path = Path(weights) if weights not in (None, "random") else weights
    return open_source(model, source=source, weights=path, device=find_device(device), dtype=dtype, **options)


def parse_settings(settings: tuple[str, ...]) -> dict[str, Any]:
    """``("a=1", "b=[1, 2]", "c=x")`` as ``{"a": 1, "b": [1, 2], "c": "x"}``: JSON where it parses, else text."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(
                f"--option {setting!r} is not KEY=VALUE", remedy="for instance --option image_size=224"
            )
        try:
            parsed[key] = json.loads(value)
        except ValueError:
            parsed[key] = value
    return parsed


def find_device(name: str) -> str:
    """``auto`` as the best device that is there; a device that is absent raises UsageError."""
    if name == "cpu":
        return name
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used: {reason}", remedy="--device cpu, or auto") from error
    return name


def _plain(value: Any) -> Any:
    """Anything as what JSON knows; numpy scalars and arrays by their own ``tolist``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)
