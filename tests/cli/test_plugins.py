from __future__ import annotations

import json

from click.testing import CliRunner

from fake_packages import GOOD, Install
from foveate.cli import main


def test_lists_a_broken_plugin_without_importing_it(install: Install) -> None:
    install("explosive", "raise SystemExit('boom')\n")
    result = CliRunner().invoke(main, ["plugins", "--json"])
    told = json.loads(result.stdout)
    assert result.exit_code == 0
    assert told["plugins"][0]["distribution"] == "foveate"
    row = {"plugin": "explosive", "distribution": "explosive", "version": "0.1", "module": "plugin_explosive"}
    assert row in told["plugins"]


def test_load_shows_offers_and_errors(install: Install) -> None:
    install("explosive", "raise SystemExit('boom')\n")
    install("fine", GOOD.format(name="a_metric"))
    told = json.loads(CliRunner().invoke(main, ["plugins", "--load", "--json"]).stdout)
    rows = {row["plugin"]: row for row in told["plugins"]}
    assert rows["fine"]["offers"] == {"metric": ["a_metric"]}
    assert rows["explosive"]["state"] == "failed"
    assert "boom" in rows["explosive"]["error"]
    text = CliRunner().invoke(main, ["plugins", "--load"]).stdout
    assert "fine:fine 0.1, loaded\n  metric: a_metric" in text
    assert "explosive:explosive 0.1, failed\n  SystemExit" in text
