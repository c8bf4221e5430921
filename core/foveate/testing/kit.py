"""The base of the conformance kits: a class of checks that counts itself.

A kit is subclassed in a test file and run by pytest. A green battery that ran nothing is the failure that
such kits have in the field, so each prints how many checks ran and fails where none did.
"""

from __future__ import annotations

import unittest
from typing import Any, ClassVar, NoReturn


class Kit:
    """Counts its checks; ``self.skip(reason)`` leaves one out. A check is a method named ``test_*``.

    To expect a failure, override the check and mark it ``pytest.mark.xfail(reason=...)``.
    """

    _run: ClassVar[int] = 0
    _skipped: ClassVar[list[str]] = []

    @classmethod
    def setup_class(cls) -> None:
        """Start counting."""
        cls._run, cls._skipped = 0, []

    def setup_method(self, method: Any) -> None:
        """Count one check."""
        type(self)._run += 1

    def skip(self, reason: str) -> NoReturn:
        """Leave this check out, saying why."""
        self._skipped.append(reason)
        raise unittest.SkipTest(reason)

    @classmethod
    def teardown_class(cls) -> None:
        """Print the count; fail where every check was left out."""
        ran, skipped = cls._run - len(cls._skipped), len(cls._skipped)
        reasons = f" ({'; '.join(cls._skipped)})" if skipped else ""
        print(f"\nconformance of {cls.__name__}: {ran} checks ran, {skipped} skipped{reasons}")
        assert ran > 0, f"{cls.__name__}: no conformance check ran{reasons}"
