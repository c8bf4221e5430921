"""The command ``foveate``: a table of verbs, each imported only when it runs.

Data goes to stdout, progress and warnings to stderr. Exit codes: 0 done, 1 failure, 2 usage, 3 environment
or plugin, 4 store, 5 some samples failed, 6 a threshold was not met, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

from foveate.errors import FoveateError

DEBUG = "FOVEATE_DEBUG"
"""Environment variable: ``1`` shows the traceback of any failure."""
INTERRUPTED = 130

VERBS: dict[str, str] = {
    "look": "One picture: prediction, what it attended to, caveats.",
    "demo": "The whole job on a small trained model that ships with foveate.",
    "doctor": "Check the installation, the plugins and the registry.",
    "models": "List the models that are known.",
    "plugins": "List the plugins that are installed.",
    "inspect": "Open a model and show its sites, grid, readout and targets.",
    "capture": "Record what a model attends to on images, as labelled arrays.",
    "import": "Make a run of what an exporter recorded in another environment.",
    "metrics": "Measure the attention of a run.",
    "analyse": "Analyse a detector, or attention over the frames of clips, beside baselines.",
    "attribute": "Explain predictions with gradients, perturbations or attention.",
    "faithfulness": "Test whether explanations explain: deletion, insertion, controls.",
    "motion": "Test whether a video model decides by appearance, by motion, or by both.",
    "compare": "Compare two runs on the same images.",
    "beside": "A picture-text model beside a detector on the same images.",
    "audit": "Say which numbers of a table of attention statistics are impossible.",
    "plot": "Draw pictures from a run.",
    "video": "Draw a clip of a run as a video: tracks, and a map on one scale.",
    "validate": "Check a run on disk.",
}
"""Verb -> short help. The verb ``x`` is the attribute ``command`` of the module ``foveate.cli.x``."""


class Verbs(click.Group):
    """A group that knows its verbs by name and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs of this installation, in the order of a day's work."""
        return [verb for verb in VERBS if _there(verb)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        if cmd_name not in VERBS or not _there(cmd_name):
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest verb in the error."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = _nearest(args[0]) if args and args[0] not in VERBS else ""
            if not near:
                raise
            raise click.UsageError(f"No such verb {args[0]!r}. Did you mean {near!r}?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs from the table, so that ``--help`` imports none."""
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, VERBS[verb]) for verb in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        """Run, and turn errors into messages and exit codes."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            # click itself closes stdout quietly where the reader of a pipe has gone.
            if isinstance(error, BrokenPipeError) or os.environ.get(DEBUG) == "1":
                raise
            ctx.exit(_report(error))


def _report(error: Exception) -> int:
    """Say on stderr what went wrong and what to do; the exit code."""
    if isinstance(error, FoveateError):
        message, remedy, code = error.message, error.remedy, error.exit_code
    else:
        message = f"{type(error).__name__}: {error}"
        remedy, code = f"this is not expected; {DEBUG}=1 shows where it happened", 1
    click.echo(f"error: {message}", err=True)
    if remedy:
        click.echo(f"remedy: {remedy}", err=True)
    return code


def _there(verb: str) -> bool:
    return f"{__name__}.{verb}" in sys.modules or find_spec(f"{__name__}.{verb}") is not None


def _nearest(word: str) -> str:
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, VERBS, 1)), "")


def _show_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"foveate {version('foveate')}")
        ctx.exit()


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show it."
)
def main() -> None:
    """What vision and video transformers attend to, and whether that explains their answer.

    Start with `foveate demo`, or `foveate look MODEL photo.jpg`. Every verb takes --json and --help.
    Completions for your shell: _FOVEATE_COMPLETE=bash_source foveate (or zsh_source, fish_source).
    """
