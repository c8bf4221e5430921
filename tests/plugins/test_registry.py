from __future__ import annotations

from pathlib import Path

import pytest

from fake_packages import Install
from foveate.errors import UsageError
from foveate.plugins.registry import Registry, families, models, registry, resolve

FAMILY = '[[family]]\nid = "fam"\nsource = "src"\nmodel_types = ["fam_type"]\n'
MODEL = '[[model]]\nid = "{id}"\nfamily = "fam"\nlicence = "MIT"\nprovenance = "made for a test"\n'
GOOD = "schema = 1\n" + FAMILY + MODEL.format(id="them/one")
SITE = '[[family.site]]\nid = "s"\nmodule = "a.{layer}"\nkind = "self"\nquery = "t"\nkey = "t"\n'


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Install) -> Path:
    """Where ``$FOVEATE_REGISTRY`` points."""
    path = tmp_path / "mine.toml"
    monkeypatch.setenv("FOVEATE_REGISTRY", str(path))
    return path


def read(path: Path, text: str) -> Registry:
    path.write_text(text, encoding="utf-8")
    registry.cache_clear()
    return registry()


def test_the_packaged_registry_is_sound() -> None:
    registry.cache_clear()
    assert registry().problems == []


def test_rows_carry_what_the_file_says(user_file: Path) -> None:
    more = (
        'revision = "abc"\nweights = "w/x"\nexpect = { grid = [2, 3] }\noptions = { a = 1 }\nsha256 = "'
        + "0" * 64
        + '"\n'
    )
    family = FAMILY + 'layout = { patch = "vision.patch" }\n' + SITE
    read(user_file, "schema = 1\n" + family + MODEL.format(id="mine") + more)
    row = resolve("mine")
    assert (row.revision, row.licence, row.sha256, row.owner) == ("abc", "MIT", "0" * 64, "user")
    assert row.expect == {"grid": [2, 3]}
    assert row.options == {"a": 1}
    assert row.weights == user_file.parent / "w" / "x"
    assert row.source == "src"
    assert row.family is families()["fam"]
    assert row.family.model_types == ("fam_type",)
    assert row.family.layout == {"patch": "vision.patch"}
    assert row.family.sites[0]["module"] == "a.{layer}"


def test_a_package_brings_rows_without_being_imported(install: Install) -> None:
    files = {"package_rows/__init__.py": "raise SystemExit('imported!')", "package_rows/registry.toml": GOOD}
    folder = install("rows", groups={"foveate.registry": {"rows": "package_rows"}}, files=files)
    assert models()["them/one"].owner == "rows"
    with_weights = GOOD + 'weights = "data/model.safetensors"\n'
    (folder / "package_rows/registry.toml").write_text(with_weights)
    registry.cache_clear()
    assert models()["them/one"].weights == folder / "package_rows/data/model.safetensors"


def test_a_package_below_a_package_is_found_too(install: Install) -> None:
    files = {"package_top/__init__.py": "1/0", "package_top/sub/registry.toml": GOOD}
    install("below", groups={"foveate.registry": {"below": "package_top.sub"}}, files=files)
    assert "them/one" in models()


def test_a_missing_package_or_file_is_a_problem_of_its_owner(install: Install) -> None:
    install("gone", groups={"foveate.registry": {"gone": "package_gone"}})
    install("bare", groups={"foveate.registry": {"bare": "package_bare"}}, files={"package_bare/__init__.py": ""})
    said = {problem.owner: problem.message for problem in registry().problems}
    assert "package 'package_gone' is not there" in said["gone"]
    assert "cannot be read" in said["bare"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schema = 1\n[[family]\n", "cannot be read: "),
        (FAMILY, "lacks the line: schema = 1"),
        ("schema = 2\n" + FAMILY, "schema 2 is newer than 1: pip install --upgrade foveate"),
        ("schema = 1\n[[modle]]\nid = 'x'\n", "unknown table 'modle'; known: family, model"),
        ("schema = 1\n[model]\nid = 'x'\n", "write [[model]], not [model]"),
        ("schema = 1\n[[family]]\nsource = 's'\n", "[[family]] number 1: lacks 'id'"),
        ("schema = 1\n[[model]]\nid = 'm'\nfamily = 'f'\n", "model 'm': lacks 'licence'"),
        ("schema = 1\n" + FAMILY + "papr = 'x'\n", "family 'fam': unknown key 'papr' (did you mean 'paper'?)"),
        (
            "schema = 1\n" + FAMILY + SITE.replace('"self"', '"slef"'),
            "family 'fam', site 's': kind must be one of cross, self, temporal, not 'slef'",
        ),
        ("schema = 1\n" + FAMILY + SITE.replace("query", "qeury"), "site 's': lacks 'query'"),
        ("schema = 1\n" + FAMILY + "requires = 'torch'\n", "requires must be a list of strings, not 'torch'"),
        (GOOD + "sha256 = 'abc'\n", "model 'them/one': sha256 must be 64 lower-case hexadecimal digits"),
        (GOOD + "weights = '../../etc'\n", "weights must be a path below the package"),
        (GOOD + "weights = '/etc/passwd'\n", "weights must be a path below the package"),
        (GOOD + "expect = 3\n", "expect must be a table, not 3"),
        (
            "schema = 1\n" + FAMILY + MODEL.format(id="x").replace('"fam"', '"fma"'),
            "no family 'fma' (did you mean 'fam'?)",
        ),
    ],
)
def test_mistakes_are_told_with_their_place(text: str, said: str, user_file: Path) -> None:
    own = len(models())
    found = read(user_file, text)
    assert any(said in problem.message for problem in found.problems), found.problems
    assert {problem.owner for problem in found.problems} == {"user"}
    assert {problem.path for problem in found.problems} == {str(user_file)}
    assert len(found.models) == own, "a bad fragment adds nothing and takes nothing away"


def test_all_mistakes_of_a_file_are_told_at_once(user_file: Path) -> None:
    found = read(user_file, "schema = 1\n[[model]]\nid = 'a'\n[[model]]\nid = 'b'\n")
    assert len(found.problems) == 6


def test_a_file_that_is_not_there_is_a_problem(user_file: Path) -> None:
    registry.cache_clear()
    assert "cannot be read" in registry().problems[0].message


def test_the_first_owner_keeps_an_id_and_both_are_named(install: Install) -> None:
    for name in ("aa", "bb"):
        files = {f"package_{name}/registry.toml": GOOD, f"package_{name}/__init__.py": ""}
        install(name, groups={"foveate.registry": {name: f"package_{name}"}}, files=files)
    assert models()["them/one"].owner == "aa"
    said = [problem.message for problem in registry().problems]
    assert "model 'them/one' of bb is already defined by aa" in said
    assert "family 'fam' of bb is already defined by aa" in said


def test_the_user_may_override(install: Install, user_file: Path) -> None:
    files = {"package_aa/registry.toml": GOOD, "package_aa/__init__.py": ""}
    install("aa", groups={"foveate.registry": {"aa": "package_aa"}}, files=files)
    found = read(user_file, GOOD.replace("MIT", "CC0-1.0"))
    assert found.problems == []
    assert resolve("them/one").licence == "CC0-1.0"
    twice = read(user_file, GOOD + MODEL.format(id="them/one"))
    assert "already defined by user" in twice.problems[0].message


def test_the_allow_list_holds_for_rows(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"package_aa/registry.toml": GOOD, "package_aa/__init__.py": ""}
    install("aa", groups={"foveate.registry": {"aa": "package_aa"}}, files=files)
    monkeypatch.setenv("FOVEATE_PLUGINS", "")
    assert "them/one" not in models()


def test_an_unknown_model_names_close_ones(user_file: Path) -> None:
    read(user_file, GOOD)
    with pytest.raises(UsageError) as caught:
        resolve("them/onee")
    assert "them/one" in caught.value.remedy
