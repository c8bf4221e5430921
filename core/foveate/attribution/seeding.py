"""Randomness that can be repeated by hand, does not depend on the batch, and leaves the caller's alone.

Captum draws from the global generators of torch and numpy. Each target row is explained on its own under
a seed derived from the run's seed and the sample's id, so an image gets the same map in any batch, the
draws of different images are independent, and ``torch.manual_seed(s); np.random.seed(s)`` with
``s = sample_seed(seed, id)`` repeats it in a plain Captum script.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def sample_seed(seed: int, sample: str) -> int:
    """The seed of one sample's draws: 32 bits of SHA-256 over ``"<seed>:<sample id>"``."""
    digest = hashlib.sha256(f"{seed}:{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, numpy and Python inside the block; restore their states after it, whatever happens."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
