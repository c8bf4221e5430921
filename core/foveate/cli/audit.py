"""``foveate audit``: which numbers of a table of attention statistics are impossible."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from foveate.cli._common import emit, json_option

if TYPE_CHECKING:
    from foveate.metrics.audit.verdict import Audit, Verdict

IMPOSSIBLE = 6


@click.command("audit")
@click.argument("table", type=click.Path(dir_okay=False))
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    multiple=True,
    metavar="K",
    help="Number of keys (patches) of a row; repeat to try several. By default what the file states.",
)
@json_option
@click.pass_context
def command(ctx: click.Context, table: str, tokens: tuple[int, ...], as_json: bool) -> None:
    """Say which numbers of TABLE cannot be.

    TABLE is a CSV or Parquet file with one row an image, or a summary (mean, std, min, max) in a CSV or inside a
    Markdown document. Entropy, concentration in the top 10 % and 25 %, the count above the mean, the standard
    deviation and the largest weight of a row of attention limit each other; every bound is printed with its
    formula. A number passes where its rounding, or the convention of its table, could save it.

    Exit code 6 where something is impossible on the stated number of keys (or on all that were tried).
    """
    from foveate.metrics.audit.check import audit_file

    audits = audit_file(table, tokens)
    if as_json:
        emit({"possible": all(a.possible for a in audits), "tables": [a.as_dict() for a in audits]})
    else:
        click.echo("\n\n".join(text(a) for a in audits))
    if not all(a.possible for a in audits):
        ctx.exit(IMPOSSIBLE)


def text(audit: Audit) -> str:
    """One table's audit, for people."""
    size = f"{audit.rows} rows, " if audit.kind == "per image" else ""
    lines = [f"{audit.title} ({audit.kind} table; {size}{', '.join(audit.statistics)})"]
    lines += [line for verdict in audit.verdicts for line in _verdict_lines(verdict, stated=audit.stated)]
    if not audit.possible:
        lines.append(_fitting(audit.fitting))
    lines += [f"note: {note}" for note in audit.notes]
    return "\n".join(lines)


def _verdict_lines(verdict: Verdict, *, stated: int | None) -> list[str]:
    source = ", as stated" if verdict.tokens == stated else ""
    word = "nothing impossible" if verdict.possible else "IMPOSSIBLE"
    return [f"K = {verdict.tokens}{source}: {word}", *(f"  {finding}" for finding in verdict.findings)]


def _fitting(grids: tuple[int, ...]) -> str:
    if not grids:
        return "no square grid from 4 x 4 to 64 x 64 patches fits this table"
    sides = ", ".join(f"{round(K**0.5)} x {round(K**0.5)}" for K in grids)
    return f"square grids that nothing rules out: {sides}"
