"""One thread, and no environment of the developer: the same numbers and the same speed on every machine."""

from __future__ import annotations

import os

import pytest

from fake_packages import install

__all__ = ["install"]  # a fixture for every folder

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a developer has set for foveate must not change a test."""
    for name in [name for name in os.environ if name.startswith("FOVEATE_")]:
        monkeypatch.delenv(name)
