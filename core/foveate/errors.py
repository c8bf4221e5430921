"""One family of errors, so that a caller (or the command line) can catch foveate's own and show the remedy.

Every message says what failed, where, what was expected and what arrived; ``remedy`` says what to do.
"""

from __future__ import annotations


class FoveateError(Exception):
    """Base of every error that foveate raises on purpose.

    ``exit_code`` is what the command line ends with: 1 runtime, 2 usage, 3 environment or plugin,
    4 store, 5 some samples failed, 6 a threshold was not met.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}" if self.remedy else self.message


class UsageError(FoveateError, ValueError):
    """The caller asked for something that does not exist or does not fit together."""

    exit_code = 2


class PluginError(FoveateError):
    """A plugin could not be loaded, or broke its contract."""

    exit_code = 3


class MissingDependencyError(FoveateError, ImportError):
    """An optional package is absent; the remedy is the command that installs it."""

    exit_code = 3


class ModelError(FoveateError):
    """A model could not be opened, or its weights, layout or outputs are not what was declared."""

    exit_code = 3


class SampleError(FoveateError):
    """One sample (image or clip) cannot be used; a run records it as failed and goes on."""

    exit_code = 5


class CaptureError(FoveateError):
    """Attention was not captured exactly: a missed layer, a failed certificate, a changed output."""


class StoreError(FoveateError):
    """A run on disk is invalid, of another plan, or of a newer version."""

    exit_code = 4
