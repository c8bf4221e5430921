"""The house keeps its rules: arrows point one way, packages import nothing, docs name every hook."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import foveate
from foveate.cli import VERBS
from foveate.plugins.hooks import HOOKS
from foveate.plugins.rows import FAMILY_RULES, MODEL_RULES
from foveate.plugins.specs import SPEC_TYPES

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("core/**/*.py"), *ROOT.glob("plugins/**/*.py"), *ROOT.glob("examples/**/*.py")]
HEAVY = ("torch", "numpy", "xarray", "zarr", "matplotlib", "transformers", "captum", "scipy", "pandas")
VARIABLES = ("FOVEATE_API", "FOVEATE_PLUGINS", "FOVEATE_STRICT", "FOVEATE_DEBUG", "FOVEATE_REGISTRY")
TEXT = {".py", ".md", ".toml", ".txt", ".json"}
LIGHT = [p for p in SOURCES if p.name in ("__init__.py", "declare.py") or "foveate/cli/" in p.as_posix()]


def test_arrows_point_one_way() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: str(path.relative_to(ROOT)))
def test_light_modules_import_nothing_heavy(path: Path) -> None:
    """At module level; inside functions anything goes."""
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [name for name in names if name.split(".")[0] in HEAVY], f"line {node.lineno}"


def test_every_hook_and_row_key_is_documented() -> None:
    text = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
    missing = [name for name in HOOKS if f"`{name}`" not in text and f"{name}(" not in text]
    missing += [cls.__name__ for cls in SPEC_TYPES.values() if cls.__name__ not in text]
    missing += [key for rules in (FAMILY_RULES, MODEL_RULES) for key in rules if f"`{key}`" not in text]
    missing += [name for name in VARIABLES if name not in text]
    assert missing == []


def test_the_code_on_the_plugin_page_runs() -> None:
    text = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {"__name__": "docs_plugins"}
    for block in blocks:
        exec(compile(block, "docs/plugins.md", "exec"), names)
    assert len(blocks) >= 7
    _run_documented(names)


def _run_documented(names: dict[str, Any]) -> None:
    """What the page declares, put to work."""
    from foveate.interfaces import Target
    from foveate.testing.tiny import TinySource, tiny_samples

    for hook, kind in HOOKS.items():
        assert all(spec.kind == kind for spec in names[hook]())
    source = TinySource()
    batch = source.encode(tiny_samples(2))
    outputs = source.forward(batch)
    bound = source.bind(outputs, batch, Target())
    found = names["EdgeDistance"]().attribute(source, batch, bound)
    assert found.values.shape == (2, 4, 4)
    assert found.values[0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert names["licence"]()[0].status == "warn"


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in foveate.__all__:
        value = getattr(foveate, name)
        assert value is not None
        if isinstance(value, type) or callable(value):
            assert value.__doc__, f"foveate.{name} has no docstring"
    assert set(foveate.__all__) == set(foveate._HOMES) | {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        foveate.nonsense  # noqa: B018


def test_public_names_shadow_no_subpackage() -> None:
    packages = {path.parent.name for path in (ROOT / "core/foveate").glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / "core/foveate").glob("*.py")}
    assert not set(foveate.__all__) & (packages | modules)


def test_every_verb_is_there() -> None:
    missing = [verb for verb in VERBS if not (ROOT / f"core/foveate/cli/{verb}.py").exists()]
    assert missing == []


def test_nothing_of_the_machine_is_committed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    texts = [ROOT / name for name in listed.stdout.splitlines() if Path(name).suffix in TEXT]
    traces = ["/" + "root/", "/" + "work/", "/" + "tmp/"]
    found = [
        f"{path.relative_to(ROOT)}: {trace}"
        for path in texts
        if path.exists()
        for trace in traces
        if trace in path.read_text(encoding="utf-8", errors="replace")
    ]
    assert found == []
