"""Who may change an attention call before it runs.

Every tap of a thread asks here, so that interventions and recording compose in either order: the tap that sees a
call first lets the editor change its arguments, the taps behind it record what then runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

Run = Callable[[Any, Any, Any], Any]
"""A tap's handler: ``run(func, args, kwargs)`` calls ``func`` and records it."""


class Editor(Protocol):
    """Something that changes attention calls."""

    def around(self, run: Run, func: Any, args: Any, kwargs: Any) -> Any:
        """Return ``run`` of the call, or of a changed one."""


_local = threading.local()


def current() -> Editor | None:
    """The editor of this thread, unless the call at hand has been edited already."""
    return None if getattr(_local, "edited", False) else getattr(_local, "editor", None)


def outer() -> Editor | None:
    """The editor of this thread, whatever runs."""
    return getattr(_local, "editor", None)


@contextmanager
def active(editor: Editor) -> Iterator[None]:
    """Let ``editor`` change this thread's attention calls."""
    before = outer()
    _local.editor = editor
    try:
        yield
    finally:
        _local.editor = before


@contextmanager
def edited() -> Iterator[None]:
    """The call at hand has been edited: other taps that see it must only record."""
    before = getattr(_local, "edited", False)
    _local.edited = True
    try:
        yield
    finally:
        _local.edited = before
