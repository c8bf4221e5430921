"""``foveate doctor``: is the installation sound, and what to do where it is not."""

from __future__ import annotations

import click

from foveate.cli._common import emit, json_option

MARKS = {"ok": "ok  ", "info": "info", "warn": "WARN", "fail": "FAIL"}
UNSOUND = 3


@click.command("doctor")
@click.option("--deep", is_flag=True, help="Import every class that a plugin declares (seconds).")
@json_option
@click.pass_context
def command(ctx: click.Context, deep: bool, as_json: bool) -> None:
    """Check versions, devices, plugins, the registry and conflicts.

    Exit code 3 where anything fails. Warnings and missing extras do not fail.
    """
    from foveate.plugins.doctor import examine

    findings = examine(deep=deep)
    failed = sum(finding.status == "fail" for finding in findings)
    if as_json:
        emit({"ok": failed == 0, "findings": [finding.as_dict() for finding in findings]})
    else:
        section = ""
        for finding in findings:
            if finding.section != section:
                section = finding.section
                click.echo(section)
            click.echo(f"  {MARKS[finding.status]}  {finding.name}: {finding.detail}")
            if finding.remedy and finding.status != "ok":
                click.echo(f"        -> {finding.remedy}")
        click.echo("all sound" if failed == 0 else f"{failed} failed")
    ctx.exit(UNSOUND if failed else 0)
