"""Every way in which a stranger's package can be broken: one clear row each, and the rest works."""

from __future__ import annotations

import pytest

from fake_packages import GOOD, Install, record_of
from foveate.errors import PluginError, UsageError
from foveate.plugins.hooks import API_VERSION, HOOKS
from foveate.plugins.manager import Manager, plugin_manager

BROKEN = {
    "missing-import": ("import no_such_package_at_all\n", "ModuleNotFoundError: No module named 'no_such_package"),
    "syntax": ("def oops(:\n", "SyntaxError: invalid syntax"),
    "exits": ("import sys; sys.exit('no licence')\n", "SystemExit: called sys.exit('no licence')"),
    "raises-on-import": ("1 / 0\n", "ZeroDivisionError: division by zero"),
    "misspelt": (
        "@hookimpl\ndef foveate_metricz():\n    return []\n",
        "unknown hook 'foveate_metricz' (did you mean 'foveate_metrics'?)",
    ),
    "unmarked": ("def foveate_metrics():\n    return []\n", "foveate_metrics is not marked as a hook"),
    "extra-argument": ("@hookimpl\ndef foveate_metrics(config):\n    return []\n", "{'config'}"),
    "newer-minor": (f"FOVEATE_API = ({API_VERSION[0]}, {API_VERSION[1] + 1})\n", "written for plugin API"),
    "newer-major": (f"FOVEATE_API = ({API_VERSION[0] + 1}, 0)\n", "written for plugin API"),
    "api-nonsense": ("FOVEATE_API = '1.0'\n", "FOVEATE_API must be two integers"),
    "raising-hook": ("@hookimpl\ndef foveate_metrics():\n    raise KeyError('x')\n", "KeyError: 'x'"),
    "returns-none": (
        "@hookimpl\ndef foveate_metrics():\n    pass\n",
        "must return a list of MetricSpec, got None",
    ),
    "returns-text": ("@hookimpl\ndef foveate_metrics():\n    return 'abc'\n", "must return a list of MetricSpec"),
    "wrong-spec": (
        "@hookimpl\ndef foveate_metrics():\n    return [RendererSpec('r', 'a:B', '')]\n",
        "must return MetricSpec objects, got RendererSpec",
    ),
    "bad-declaration": (
        "@hookimpl\ndef foveate_metrics():\n    return [MetricSpec('a b', 'a:B', '')]\n",
        "look like",
    ),
    "raises-late": (
        "@hookimpl\ndef foveate_metrics():\n    yield MetricSpec('half', 'a:B', '')\n    raise OSError('disk')\n",
        "OSError: disk",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_one_broken_plugin_is_one_clear_record(case: str, install: Install) -> None:
    code, said = BROKEN[case]
    install(case, code)
    install("zz-good", GOOD.format(name="good_one"))
    manager = Manager()
    record = record_of(manager, case)
    assert record.state == "failed"
    assert said in record.error
    assert record.remedy
    assert "Traceback" in record.traceback or "Error" in record.traceback
    assert record.offers == {}
    assert manager.spec("metric", "good_one").name == "good_one"
    assert "half" not in [spec.name for spec in manager.specs("metric")]


def test_all_broken_at_once_leave_the_good_one(install: Install) -> None:
    for case, (code, _) in BROKEN.items():
        install(case, code)
    install("zz-good", GOOD.format(name="good_one"))
    manager = Manager()
    made = {*BROKEN, "zz-good"}
    states = {r.plugin.distribution: r.state for r in manager.records if r.plugin.distribution in made}
    assert states == dict.fromkeys(BROKEN, "failed") | {"zz-good": "loaded"}


def test_a_missing_import_names_the_package_to_install(install: Install) -> None:
    install("absent", "import no_such_package_at_all.inner\n")
    assert record_of(Manager(), "absent").remedy.startswith("pip install no_such_package_at_all,")


def test_an_optional_hook_of_a_future_version_is_fine(install: Install) -> None:
    install(
        "future", "@hookimpl(optionalhook=True)\ndef foveate_dreams():\n    return []\n" + GOOD.format(name="now")
    )
    manager = Manager()
    assert record_of(manager, "future").state == "loaded"
    assert manager.spec("metrics", "now").kind == "metric"


def test_the_first_owner_keeps_a_name_and_both_are_named(install: Install) -> None:
    install("aaa", GOOD.format(name="same"))
    install(
        "bbb",
        GOOD.format(name="same") + "\n@hookimpl\ndef foveate_checks():\n    return [CheckSpec('c', 'a:b', '')]\n",
    )
    manager = Manager()
    second = record_of(manager, "bbb")
    assert record_of(manager, "aaa").state == "loaded"
    assert second.state == "shadowed"
    assert "metric 'same' of bbb:bbb is already taken by aaa:aaa" in second.error
    assert manager.owner("metric", "same").distribution == "aaa"
    assert manager.spec("check", "c"), "the names that do not clash stay"


def test_one_plugin_twice_the_same_name_is_a_clash(install: Install) -> None:
    spec = "MetricSpec('twin', 'a:B', '')"
    install("selfish", f"@hookimpl\ndef foveate_metrics():\n    return [{spec}, {spec}]\n")
    assert record_of(Manager(), "selfish").state == "shadowed"


def test_a_third_party_cannot_shadow_the_core(install: Install) -> None:
    vit = [record for record in Manager().records if record.plugin.title == "foveate:vit"]
    if not vit or vit[0].state != "loaded":
        pytest.skip("the ViT plugin has not loaded here")
    code = "@hookimpl\ndef foveate_sources():\n    return [SourceSpec('vit', 'a:B', 'evil')]\n"
    install("aaa-evil", code)
    manager = Manager()
    assert manager.owner("source", "vit").distribution == "foveate"
    assert record_of(manager, "aaa-evil").state == "shadowed"


def test_equal_entry_point_names_of_two_distributions_both_load(install: Install) -> None:
    install("first", GOOD.format(name="m1"), groups={"foveate": {"extra": "plugin_first"}})
    install("second", GOOD.format(name="m2"), groups={"foveate": {"extra": "plugin_second"}})
    assert {"m1", "m2"} <= {spec.name for spec in Manager().specs("metric")}


def test_lookup_errors_give_close_names_and_broken_plugins(install: Install) -> None:
    install("fine", GOOD.format(name="entropy_of_tests"))
    install("broken", "1 / 0\n")
    with pytest.raises(UsageError) as caught:
        Manager().spec("metric", "entropy_of_test")
    assert "broken:broken" in caught.value.message
    assert "entropy_of_tests" in caught.value.remedy


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="no kind of plugin named 'gadget'"):
        Manager([]).specs("gadget")


def test_heavy_imports_are_recorded(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.plugins.manager.HEAVY", ("colorsys",))
    import sys

    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    install("heavy", "import colorsys\n" + GOOD.format(name="m"))
    record = record_of(Manager(), "heavy")
    assert record.state == "loaded"
    assert record.heavy == ("colorsys",)


def test_a_plugin_that_prints_does_not_spoil_stdout(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("chatty", "print('hello from me')\n" + GOOD.format(name="m"))
    Manager()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "hello from me" in printed.err


@pytest.mark.parametrize(
    ("listed", "loaded"), [("", set()), ("a", {"a"}), (" a , b ", {"a", "b"}), (None, {"a", "b"})]
)
def test_the_allow_list(
    listed: str | None, loaded: set[str], install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("a", GOOD.format(name="of_a"))
    install("b", GOOD.format(name="of_b"))
    if listed is not None:
        monkeypatch.setenv("FOVEATE_PLUGINS", listed)
    manager = Manager()
    states = {r.plugin.name: r.state for r in manager.records if r.plugin.distribution in ("a", "b")}
    assert {name for name, state in states.items() if state == "loaded"} == loaded
    assert all(state in ("loaded", "disabled") for state in states.values())
    assert not any(record.state == "disabled" for record in manager.records if record.plugin.own)


def test_strict_raises_the_first_failure(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.plugins.discovery import installed

    install("broken", "1 / 0\n")
    monkeypatch.setenv("FOVEATE_STRICT", "1")
    with pytest.raises(PluginError, match="plugin broken:broken: ZeroDivisionError"):
        Manager(plugin for plugin in installed() if not plugin.own)


def test_the_manager_is_one_a_process(install: Install) -> None:
    assert plugin_manager() is plugin_manager()


def test_every_hook_has_a_spec_type_and_none_takes_an_argument() -> None:
    import inspect

    from foveate.plugins import hooks
    from foveate.plugins.specs import SPEC_TYPES

    declared = {name for name in vars(hooks) if name.startswith("foveate_")}
    assert declared == set(HOOKS)
    assert set(HOOKS.values()) == set(SPEC_TYPES)
    assert not any(inspect.signature(getattr(hooks, name)).parameters for name in HOOKS)
