"""The authors' own network, where their package diff-plonk is installed.

``import plonk`` pulls in its pipeline and with it torchvision, which many machines lack or have built for
another torch. The network itself needs neither, so the package is entered below its ``__init__``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

from foveate.errors import MissingDependencyError

if TYPE_CHECKING:
    from torch import nn

INSTALL = "pip install --no-deps diff-plonk && pip install geoopt einops torchdiffeq huggingface_hub tqdm"
"""--no-deps, because diff-plonk pins scipy==1.13.1 and asks for a GPL map server that inference never uses."""


def is_available() -> bool:
    """Whether the distribution diff-plonk and what its network imports are installed. Imports nothing.

    The distribution, not the name: a folder called ``plonk`` in the working directory is no package.
    """
    try:
        distribution("diff-plonk")
    except PackageNotFoundError:
        return False
    return all(find_spec(name) is not None for name in ("plonk", "einops", "huggingface_hub"))


def network_class() -> type[nn.Module]:
    """The authors' ``Plonk`` network. Raises MissingDependencyError with the install command."""
    try:
        with _without_init("plonk"):
            found: type[nn.Module] = import_module("plonk.models.pretrained_models").Plonk
    except ImportError as error:
        raise MissingDependencyError(
            f"diff-plonk cannot be used: {error}",
            remedy=f"{INSTALL}; or backend='direct', foveate's own reading of the same checkpoint",
        ) from error
    return found


@contextmanager
def _without_init(package: str) -> Iterator[None]:
    """While inside, submodules of ``package`` import although its own ``__init__`` has not run."""
    if package in sys.modules:
        yield
        return
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"no package {package!r}")
    stand_in = ModuleType(package)
    stand_in.__path__ = list(spec.submodule_search_locations)
    sys.modules[package] = stand_in
    try:
        yield
    finally:
        del sys.modules[package]  # a later `import plonk` gets the real package
