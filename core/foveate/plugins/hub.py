"""One short question before the model hub's client is used: is the hub there, and does it know the model?

The client retries a connection that cannot be made for half a minute. A person who mistyped an id, or has no
network, should read the reason at once.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

CONFIG = "config.json"
SECONDS = 10.0
"""How long the hub may take to answer."""


def cached(reference: str, name: str = CONFIG, *, revision: str | None = None) -> Path | None:
    """The file of a model that was downloaded before, None where it was not."""
    from huggingface_hub import hf_hub_download

    with suppress(OSError, ValueError):
        return Path(hf_hub_download(reference, name, revision=revision, local_files_only=True))
    return None


def ask(reference: str, *, revision: str | None = None) -> None:
    """Return at once where the model is cached or the hub knows it. Raises OSError with the reason."""
    if cached(reference, revision=revision) is not None:
        return
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(reference, revision=revision, timeout=SECONDS)
    except Exception as error:  # the client's HTTP library has its own tree of exceptions, and it has changed
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"the model hub did not give {reference}: {type(error).__name__}: {reason}") from error
