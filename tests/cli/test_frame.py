"""The frame around every verb: what happens to errors, unknown words and missing modules."""

from __future__ import annotations

import subprocess
import sys
import types

import click
import pytest
from click.testing import CliRunner

from foveate import cli
from foveate.cli import VERBS, main
from foveate.cli._common import find_device, parse_settings, table
from foveate.errors import (
    CaptureError,
    FoveateError,
    MissingDependencyError,
    PluginError,
    SampleError,
    StoreError,
    UsageError,
)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A verb ``audit`` that does what the test sets as ``.does``."""
    state = types.SimpleNamespace(does=lambda: None)
    module = types.ModuleType("foveate.cli.audit")
    module.command = click.Command("audit", callback=lambda: state.does())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "foveate.cli.audit", module)
    return state


def throw(error: BaseException) -> object:
    def does() -> None:
        raise error

    return does


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (FoveateError, 1),
        (CaptureError, 1),
        (UsageError, 2),
        (PluginError, 3),
        (MissingDependencyError, 3),
        (StoreError, 4),
        (SampleError, 5),
    ],
)
def test_own_errors_end_in_message_remedy_and_code(
    kind: type[FoveateError], code: int, verb: types.SimpleNamespace
) -> None:
    verb.does = throw(kind("it broke", remedy="mend it"))
    result = CliRunner().invoke(main, ["audit"])
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr == "error: it broke\nremedy: mend it\n"


def test_unexpected_errors_are_one_line_and_a_hint(verb: types.SimpleNamespace) -> None:
    verb.does = throw(KeyError("inner"))
    result = CliRunner().invoke(main, ["audit"])
    assert result.exit_code == 1
    assert "error: KeyError: 'inner'" in result.stderr
    assert "FOVEATE_DEBUG=1" in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(verb: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_DEBUG", "1")
    verb.does = throw(KeyError("inner"))
    result = CliRunner().invoke(main, ["audit"])
    assert isinstance(result.exception, KeyError)


def test_an_interrupt_is_130(verb: types.SimpleNamespace) -> None:
    verb.does = throw(KeyboardInterrupt())
    result = CliRunner().invoke(main, ["audit"])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_a_verb_sets_its_own_code(verb: types.SimpleNamespace) -> None:
    verb.does = lambda: click.get_current_context().exit(6)
    assert CliRunner().invoke(main, ["audit"]).exit_code == 6


def test_a_verb_without_its_module_is_no_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERBS, "nowhere", "A verb that was never written.")
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert "nowhere" not in result.stdout
    assert "doctor" in result.stdout
    assert CliRunner().invoke(main, ["nowhere"]).exit_code == 2


def test_a_verb_whose_module_breaks_does_not_break_help(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> types.ModuleType:
        raise ImportError("half installed")

    monkeypatch.setattr(cli, "import_module", broken)
    assert CliRunner().invoke(main, ["--help"]).exit_code == 0
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "half installed" in result.stderr


def test_a_misspelt_verb_gets_the_near_one() -> None:
    result = CliRunner().invoke(main, ["docter"])
    assert result.exit_code == 2
    assert "Did you mean 'doctor'?" in result.stderr


def test_version_and_module_entry() -> None:
    from importlib.metadata import version

    assert CliRunner().invoke(main, ["--version"]).stdout == f"foveate {version('foveate')}\n"


def test_every_verb_there_is_has_json_and_help() -> None:
    for name in main.list_commands(click.Context(main)):  # type: ignore[attr-defined]
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0, (name, result.output)
        assert "--json" in result.stdout, f"{name} lacks --json"


def test_json_output_survives_a_closed_pipe() -> None:
    command = f"{sys.executable} -c 'from foveate.cli import main; main()' models --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


def test_settings_are_json_where_they_parse() -> None:
    assert parse_settings(("a=1", "b=[1, 2]", "c=x=y", "d=true")) == {"a": 1, "b": [1, 2], "c": "x=y", "d": True}
    with pytest.raises(UsageError, match="is not KEY=VALUE"):
        parse_settings(("nonsense",))


def test_json_knows_numpy_and_refuses_nan() -> None:
    import numpy as np

    from foveate.cli._common import _plain

    given = {"a": np.float32(0.5), "b": np.arange(2), "c": float("nan"), "d": np.array([np.inf, 1.0]), 3: {1}}
    assert _plain(given) == {"a": 0.5, "b": [0, 1], "c": None, "d": [None, 1.0], "3": [1]}


def test_devices() -> None:
    assert find_device("cpu") == "cpu"
    assert find_device("auto") in ("cpu", "cuda", "mps")
    with pytest.raises(UsageError, match="device 'toaster' cannot be used"):
        find_device("toaster")


def test_tables_align() -> None:
    assert table([("aa", 1), ("b", 22)], ("x", "yy")) == "x   yy\naa  1\nb   22"
