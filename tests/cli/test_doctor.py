from __future__ import annotations

import json

from click.testing import CliRunner

from fake_packages import GOOD, Install
from foveate.cli import main
from foveate.plugins.doctor import SECTIONS
from foveate.plugins.manager import plugin_manager


def test_a_broken_plugin_is_a_row_and_exit_3(install: Install) -> None:
    install("broken", "import no_such_package_at_all\n")
    install("fine", GOOD.format(name="m"))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 3
    row = next(line for line in result.stdout.splitlines() if "broken:broken" in line)
    assert "FAIL" in row
    assert "No module named 'no_such_package_at_all'" in row
    assert any("ok" in line and "fine:fine" in line for line in result.stdout.splitlines())


def test_json_says_the_same(install: Install) -> None:
    install("broken", "1 / 0\n")
    result = CliRunner().invoke(main, ["doctor", "--json"])
    told = json.loads(result.stdout)
    assert told["schema_version"] == 1
    assert told["ok"] is False
    assert {finding["section"] for finding in told["findings"]} <= set(SECTIONS)
    (row,) = [finding for finding in told["findings"] if finding["name"].startswith("broken:broken")]
    assert (row["status"], row["detail"]) == ("fail", "ZeroDivisionError: division by zero")


def test_what_ships_is_sound(install: Install) -> None:
    """foveate's own plugins, rows and requirements hold in the environment that runs the tests."""
    from foveate.plugins import doctor

    manager = plugin_manager()
    found = [*doctor.dependencies(), *doctor.plugins(manager), *doctor.models(manager), *doctor.environment()]
    others = [f for f in found if f.section == "plugins" and not f.name.startswith("foveate:")]
    assert [f for f in found if f.status == "fail" and f not in others] == []
    assert [f for f in found if f.status == "warn" and f.section == "plugins" and f not in others] == []
