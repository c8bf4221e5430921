"""What a run says of itself: schema version, configuration, identity.

A reader accepts every minor version of its own major version and refuses a newer major one, so that it never
misreads. Two captures are the same run exactly if their configurations are equal; ``config_hash`` says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from foveate.errors import StoreError

SCHEMA = "1.0"
CONVENTIONS = "foveate-1.0"
STATUS = ("missing", "ok", "failed")
"""What became of a sample; the position is the stored code."""


def plain(value: Any) -> Any:
    """Anything that provenance holds, as JSON types: dataclasses, tuples, paths, numpy numbers and arrays.

    NaN and infinities become the words "NaN", "Infinity", "-Infinity", since JSON has none.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, np.ndarray)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [plain(item) for item in items]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return "NaN" if np.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def root_attrs(config: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a run's root: what fixes the result (``config``, hashed) and what only describes it."""
    attrs: dict[str, Any] = plain(
        {
            "Conventions": CONVENTIONS,
            "schema": SCHEMA,
            "config": config,
            "config_hash": digest(config),
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "creation_library": "foveate",
            "creation_library_version": installed("foveate"),
            "foveate_version": installed("foveate"),
            "versions": versions(),
            **notes,
        }
    )
    return attrs


def installed(package: str) -> str:
    """The installed version of a package, or an empty string."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """Versions of what numbers may depend on."""
    names = ("torch", "numpy", "transformers", "pillow", "zarr", "xarray")
    return {name: installed(name) for name in names if installed(name)}


def check_version(attrs: Mapping[str, Any], path: Path | str) -> None:
    """Raise StoreError where a store is not a run, or is of a newer major version than this reader knows."""
    found = str(attrs.get("schema", ""))
    if not found or not str(attrs.get("Conventions", "")).startswith("foveate-"):
        raise StoreError(
            f"{path}: a zarr store, but not a foveate run (no schema version in its attributes)",
            remedy="give a store that 'foveate capture' wrote",
        )
    if int(found.split(".")[0]) > int(SCHEMA.split(".")[0]):
        raise StoreError(
            f"{path}: written with schema {found} by foveate {attrs.get('foveate_version', '?')};"
            f" this foveate ({installed('foveate')}) reads schemas up to {SCHEMA.split('.')[0]}.x",
            remedy="upgrade: pip install --upgrade foveate",
        )


def differences(stored: Any, wanted: Any, at: str = "") -> list[str]:
    """Where two configurations differ, in words: ``plan.dtype: float16 there, float32 asked``."""
    stored, wanted = plain(stored), plain(wanted)
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = dict.fromkeys([*stored, *wanted])
        return [
            line
            for key in keys
            for line in differences(stored.get(key), wanted.get(key), f"{at}.{key}".lstrip("."))
        ]
    if stored == wanted:
        return []
    return [f"{at}: {json.dumps(stored)} there, {json.dumps(wanted)} asked"]
