"""``foveate plugins``: what is installed, from metadata alone; with ``--load``, what each plugin offers."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

import click

from foveate.cli._common import emit, json_option, table


@click.command("plugins")
@click.option("--load", is_flag=True, help="Load their declarations too, and show what each offers.")
@json_option
def command(load: bool, as_json: bool) -> None:
    """List the plugins that are installed.

    Without --load nothing of a plugin is imported, so that a broken one is listed as well.
    """
    rows = _loaded() if load else _installed()
    if as_json:
        emit({"plugins": rows})
    elif load:
        click.echo("\n".join(map(_in_words, rows)))
    elif rows:
        click.echo(table([tuple(row.values()) for row in rows], tuple(rows[0])))


def _installed() -> list[dict[str, str]]:
    from foveate.plugins.discovery import installed

    return [
        {
            "plugin": plugin.name,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "module": plugin.module,
        }
        for plugin in installed()
    ]


def _loaded() -> list[dict[str, Any]]:
    from foveate.plugins.manager import plugin_manager

    return [
        {
            "plugin": record.plugin.name,
            "distribution": record.plugin.distribution,
            "version": record.plugin.version,
            "state": record.state,
            "offers": {kind: [spec.name for spec in specs] for kind, specs in record.offers.items()},
            "error": record.error,
        }
        for record in plugin_manager().records
    ]


def _in_words(row: dict[str, Any]) -> str:
    """One plugin with what it offers, wrapped to the terminal."""
    width = shutil.get_terminal_size().columns
    lines = [f"{row['distribution']}:{row['plugin']} {row['version']}, {row['state']}"]
    lines += [f"  {row['error']}"] if row["error"] else []
    for kind, names in row["offers"].items():
        text = f"{kind}: {', '.join(names)}"
        lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ") if names else []
    return "\n".join(lines)
