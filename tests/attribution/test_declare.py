"""What is declared exists, is named as it is declared, and costs nothing to list."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from foveate.attribution.declare import foveate_attributions
from foveate.interfaces import Attribution

SPECS = tuple(foveate_attributions())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_declaration_loads_under_its_name(spec):
    method = spec.create()
    assert isinstance(method, Attribution)
    assert method.name == spec.name
    assert method.citation


def test_the_page_names_every_method():
    page = (Path(__file__).parents[2] / "docs" / "attribution.md").read_text()
    assert [spec.name for spec in SPECS if f"`{spec.name}`" not in page] == []


def test_names_are_unique_and_absolute_twins_pool_absolutely():
    names = [spec.name for spec in SPECS]
    assert len(names) == len(set(names))
    for spec in SPECS:
        if spec.name.endswith("_abs"):
            assert spec.create().pooling == "abs"
            assert names[names.index(spec.name) - 1] == spec.name.removesuffix("_abs")


def test_listing_imports_nothing_heavy():
    heavy = ("torch", "numpy", "captum", "xarray", "zarr", "matplotlib", "scipy")
    code = (
        "import sys; import foveate.attribution.declare as d; assert len(tuple(d.foveate_attributions())) > 20;"
        f"sys.exit(','.join(m for m in {heavy} if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
