from __future__ import annotations

import pytest

from fake_packages import GOOD, Install
from foveate.plugins import doctor
from foveate.plugins.findings import Finding
from foveate.plugins.manager import Manager


def named(findings: list[Finding], text: str) -> Finding:
    (found,) = [finding for finding in findings if text in finding.name]
    return found


def test_every_broken_plugin_is_one_failing_row_with_a_remedy(install: Install) -> None:
    install("broken", "import no_such_package_at_all\n")
    install("fine", GOOD.format(name="m"))
    found = list(doctor.plugins(Manager()))
    row = named(found, "broken:broken 0.1")
    assert (row.status, row.section) == ("fail", "plugins")
    assert "No module named 'no_such_package_at_all'" in row.detail
    assert "pip install no_such_package_at_all" in row.remedy
    assert named(found, "fine:fine") == Finding("plugins", "fine:fine 0.1", "ok", "1 metric")


def test_a_heavy_plugin_is_a_warning(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr("foveate.plugins.manager.HEAVY", ("colorsys",))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    install("heavy", "import colorsys\n" + GOOD.format(name="m"))
    row = named(list(doctor.plugins(Manager())), "heavy")
    assert row.status == "warn"
    assert "imports colorsys when registering" in row.detail


def test_absent_packages_of_a_declared_class_are_told(install: Install) -> None:
    spec = "SourceSpec('s', 'a:B', '', requires=('no_such_pkg',), remedy='pip install such')"
    install("wants", f"@hookimpl\ndef foveate_sources():\n    return [{spec}]\n")
    row = named(list(doctor.plugins(Manager())), "wants:wants source s")
    assert (row.status, row.detail, row.remedy) == ("info", "needs no_such_pkg", "pip install such")


def test_plugins_left_out_are_not_failures(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("broken", "1 / 0\n")
    monkeypatch.setenv("FOVEATE_PLUGINS", "")
    assert named(list(doctor.plugins(Manager())), "broken").status == "info"


CHECKS = """
from foveate.plugins.findings import Finding

def fine():
    return [Finding("checks", "disk", "warn", "nearly full", "tidy up")]

def raises():
    raise OSError("no disk")

def nonsense():
    return ["all good"]

@hookimpl
def foveate_checks():
    return [CheckSpec(name, f"plugin_checks:{name}", "") for name in ("fine", "raises", "nonsense")]
"""


def test_checks_of_plugins_speak_and_may_break(install: Install) -> None:
    install("checks", CHECKS)
    assert list(doctor.plugin_checks(Manager([]))) == []
    found = list(doctor.plugin_checks(Manager()))
    assert Finding("checks", "disk", "warn", "nearly full", "tidy up") in found
    assert named(found, "raises").detail == "OSError: no disk"
    assert "must return Finding rows, got ['all good']" in named(found, "nonsense").detail


def test_a_package_that_wants_another_torch_is_named(install: Install) -> None:
    install(
        "torchgazer", groups={}, requires=("torch==1.0.0", "numpy>=1", "no-such-thing>=9", "torch; extra == 'x'")
    )
    found = list(doctor.dependencies())
    row = named(found, "torchgazer and torch")
    assert row.status == "warn"
    assert row.detail.startswith("torchgazer wants torch==1.0.0, installed is ")
    assert not any("numpy" in finding.name or "no-such" in finding.name for finding in found)
    assert named(found, "foveate").status == "ok", "somebody else's wish is not foveate's failure"


def test_a_requirement_of_foveate_that_is_not_met_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from packaging.requirements import Requirement

    real = doctor._requirements
    wanted = [Requirement("numpy>=99"), Requirement("no-such-thing")]
    monkeypatch.setattr(doctor, "_requirements", lambda name: wanted if name == "foveate" else real(name))
    found = [finding for finding in doctor.dependencies() if finding.status == "fail"]
    assert len(found) == 2
    assert "foveate wants numpy>=99, installed is " in found[0].detail
    assert found[0].remedy == 'pip install "numpy>=99"'
    assert found[1].detail.endswith("installed is nothing")


def test_absent_extras_name_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from packaging.requirements import Requirement

    wanted = [Requirement("no-such-thing; extra == 'real'"), Requirement("numpy; extra == 'real'")]
    monkeypatch.setattr(doctor, "_requirements", lambda name: wanted)
    (row,) = doctor.extras()
    assert (row.name, row.status, row.detail) == ("real", "info", "not installed: no-such-thing")
    assert row.remedy == 'pip install "foveate[real]"'


def test_deep_loads_every_declared_class(install: Install) -> None:
    offers = ["MetricSpec('gone', 'plugin_two:Nothing', '')", "CheckSpec('there', 'json:dumps', '')"]
    hook = "@hookimpl\ndef {}():\n    return [{}]\n"
    install("two", hook.format("foveate_metrics", offers[0]) + hook.format("foveate_checks", offers[1]))
    install("fine", hook.format("foveate_checks", "CheckSpec('also', 'json:dumps', '')"))
    found = list(doctor.targets(Manager()))
    row = named(found, "two:two metric gone")
    assert row.status == "fail"
    assert "cannot import plugin_two:Nothing" in row.detail
    assert not any("there" in finding.name for finding in found)
    assert named(found, "fine:fine").detail == "1 declared classes load"
    assert [f for f in found if f.name.startswith("foveate:") and f.status == "fail"] == []


ROWS = """schema = 1
[[family]]
id = "orphans"
source = "nobody"
[[model]]
id = "x/gone"
family = "orphans"
licence = "MIT"
provenance = "made for a test"
weights = "not/there"
"""


def test_registry_rows_that_cannot_work(install: Install) -> None:
    files = {
        "package_rows/__init__.py": "",
        "package_rows/registry.toml": ROWS,
        "package_bad/registry.toml": "schema",
    }
    groups = {"foveate.registry": {"rows": "package_rows"}}
    install("rows", groups=groups, files=files)
    install("bad", groups={"foveate.registry": {"bad": "package_bad"}}, files={"package_bad/__init__.py": ""})
    found = [finding for finding in doctor.models(Manager()) if finding.status == "fail"]
    assert "no plugin offers its source 'nobody'" in named(found, "family orphans").detail
    assert "weights are not there" in named(found, "x/gone").detail
    assert "cannot be read" in named(found, "bad").detail


def test_a_broken_torch_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    assert named(list(doctor.environment()), "torch").status == "fail"
