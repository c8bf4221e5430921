from __future__ import annotations

import sys

import pytest

from foveate.errors import MissingDependencyError, PluginError
from foveate.plugins.specs import SPEC_TYPES, CheckSpec, MetricSpec, SourceSpec, is_installed


def test_loads_a_class_that_keeps_its_contract() -> None:
    from foveate.testing.tiny import TinySource

    spec = SourceSpec("tiny", "foveate.testing.tiny:TinySource", "for tests")
    assert spec.load() is TinySource
    assert isinstance(spec.create(seed=3), TinySource)


def test_declaring_imports_nothing() -> None:
    sys.modules.pop("colorsys", None)
    spec = CheckSpec("lazy", "colorsys:hls_to_rgb", "for tests")
    assert "colorsys" not in sys.modules
    assert callable(spec.load())
    assert "colorsys" in sys.modules


@pytest.mark.parametrize("kind", sorted(set(SPEC_TYPES) - {"check"}))
def test_a_class_of_another_kind_is_refused(kind: str) -> None:
    spec = SPEC_TYPES[kind]("wrong", "json:JSONDecoder", "for tests")
    with pytest.raises(PluginError, match=f"{kind} 'wrong': json:JSONDecoder must be a subclass of"):
        spec.load()


@pytest.mark.parametrize("target", ["no_such_module_here:X", "json:NoSuchClass", "json:JSONDecoder.nothing"])
def test_a_target_that_does_not_import_names_itself(target: str) -> None:
    with pytest.raises(PluginError, match=f"cannot import {target}"):
        MetricSpec("gone", target, "for tests").load()


def test_a_missing_package_names_the_command() -> None:
    spec = MetricSpec("needs", "json:JSONDecoder", "for tests", requires=("json", "no_such_pkg"))
    assert spec.missing() == ("no_such_pkg",)
    with pytest.raises(MissingDependencyError) as caught:
        spec.load()
    assert caught.value.remedy == "pip install no_such_pkg"
    told = MetricSpec("needs", "json:JSONDecoder", "", requires=("no_such_pkg",), remedy='pip install "x[y]"')
    with pytest.raises(MissingDependencyError) as caught:
        told.load()
    assert caught.value.remedy == 'pip install "x[y]"'


@pytest.mark.parametrize(
    ("name", "target"), [("", "a:B"), ("two words", "a:B"), ("fine", "a.b"), ("fine", "a:"), ("fine", ":B")]
)
def test_malformed_declarations_are_refused(name: str, target: str) -> None:
    with pytest.raises(PluginError, match="must look like"):
        MetricSpec(name, target, "for tests")


def test_a_string_is_no_collection() -> None:
    with pytest.raises(PluginError, match="requires must be a collection"):
        MetricSpec("fine", "a:B", "", requires="torch")  # type: ignore[arg-type]


def test_is_installed_survives_nonsense() -> None:
    assert is_installed("json")
    assert not is_installed("no_such_pkg.below.it")
