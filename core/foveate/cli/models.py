"""``foveate models``: the rows of the registry, without importing any plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from foveate.cli._common import emit, json_option, say, table

if TYPE_CHECKING:
    from foveate.plugins.rows import FamilyRow, ModelRow


@click.command("models")
@click.option("--family", metavar="ID", help="Only this family.")
@click.option("--families", "list_families", is_flag=True, help="List families and the config types they open.")
@json_option
def command(family: str | None, list_families: bool, as_json: bool) -> None:
    """List the models that are known.

    Models that are not listed open too: any local folder or hub id whose model_type a family claims
    (see --families).
    """
    from foveate.plugins.registry import registry

    known = registry()
    if list_families:
        rows = [_family(row) for row in known.families.values()]
    else:
        rows = [_model(row) for row in known.models.values() if family in (None, row.family.id)]
    for problem in known.problems:
        say(f"warning: {problem.owner}: {problem.message} ({problem.path})")
    if as_json:
        emit({"families" if list_families else "models": rows})
    elif rows:
        click.echo(table([tuple(map(_cell, row.values())) for row in rows], tuple(rows[0])))


def _model(row: ModelRow) -> dict[str, Any]:
    return {
        "model": row.id,
        "family": row.family.id,
        "source": row.source,
        "licence": row.licence,
        "weights": "shipped" if row.weights else "hub or folder",
        "owner": row.owner,
    }


def _family(row: FamilyRow) -> dict[str, Any]:
    return {
        "family": row.id,
        "source": row.source,
        "model_types": row.model_types,
        "paper": row.paper,
        "owner": row.owner,
    }


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
