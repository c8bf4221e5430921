"""``foveate validate RUN``: is a run on disk what it says it is?"""

from __future__ import annotations

from pathlib import Path

import click

from foveate.cli._common import emit, json_option, say


@click.command("validate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--deep", is_flag=True, help="Also compare the checksum of every file.")
@json_option
def command(run: Path, deep: bool, as_json: bool) -> None:
    """Check structure, values, ledger and files of RUN (made by `foveate capture`).

    Exit code 0 where the run is valid (it may be unfinished: a note says so), 4 where it is not.
    """
    from foveate.data.validate import validate
    from foveate.errors import StoreError

    problems = validate(run, deep=deep)
    errors = [problem for problem in problems if problem.level == "error"]
    if as_json:
        emit({"run": str(run), "valid": not errors, "deep": deep, "problems": [vars(p) for p in problems]})
    else:
        for problem in problems:
            click.echo(f"{problem.level}: {problem.where}: {problem.message}")
        click.echo(f"{run}: {'valid' if not errors else f'{len(errors)} errors'}")
    if errors:
        say("remedy: capture into a new path; files that are damaged cannot be repaired in place")
        click.get_current_context().exit(StoreError.exit_code)
