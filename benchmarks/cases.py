"""Which towers are measured: CLIP vision transformers by model, input pixels and batch, written ``l14-336x8``."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """One architecture."""

    width: int
    layers: int
    heads: int
    patch: int


SIZES = {"tiny": Size(32, 2, 2, 8), "b16": Size(768, 12, 12, 16), "l14": Size(1024, 24, 16, 14)}


@dataclass(frozen=True)
class Case:
    """A tower of ``model`` size at ``pixels`` x ``pixels`` with ``batch`` images."""

    model: str
    pixels: int
    batch: int = 1

    @classmethod
    def parse(cls, text: str) -> Case:
        """``l14-336x8``, or ``b16-224`` for one image. Raises ValueError."""
        match = re.fullmatch(r"(\w+)-(\d+)(?:x(\d+))?", text)
        if match is None or match[1] not in SIZES:
            raise ValueError(f"case {text!r}: expected MODEL-PIXELS[xBATCH] with MODEL of {', '.join(SIZES)}")
        return cls(match[1], int(match[2]), int(match[3] or 1))

    def __str__(self) -> str:
        return f"{self.model}-{self.pixels}x{self.batch}"

    @property
    def size(self) -> Size:
        """Its architecture."""
        return SIZES[self.model]

    @property
    def tokens(self) -> int:
        """Patches that fit, and the class token."""
        return (self.pixels // self.size.patch) ** 2 + 1

    @property
    def matrices(self) -> int:
        """Bytes of all attention matrices of one forward in float32: layers x batch x heads x N x N."""
        return 4 * self.size.layers * self.batch * self.size.heads * self.tokens**2


FORWARD = ("plain", "rows", "reductions", "rollout")
GRADIENT = ("backward", "relevance", "grad x attention", "legrad")
ROLLOUTS = ("rollout max", "rollout min", "rollout discard", "rollout discard row")
EAGER = ("eager attentions", "eager rollout", "eager relevance")


@dataclass(frozen=True)
class Plan:
    """What is measured of one case.

    ``timed`` methods run in interleaved rounds; ``weighed`` ones only once, for their memory (their CPU time, with
    the page faults that the memory setting costs, is printed in brackets).
    """

    case: Case
    timed: tuple[str, ...]
    weighed: tuple[str, ...] = ()
    rounds: int = 3

    @classmethod
    def of(cls, case: str, timed: tuple[str, ...], weighed: tuple[str, ...] = (), rounds: int = 3) -> Plan:
        """A plan for a case by its name."""
        return cls(Case.parse(case), timed, weighed, rounds)


FULL = (
    Plan.of("l14-336x8", ("plain", "rows"), ("eager attentions",), rounds=2),
    Plan.of("l14-336x1", (*FORWARD, *GRADIENT), ("eager attentions", "eager relevance"), rounds=2),
    Plan.of("b16-224x1", (*FORWARD, *ROLLOUTS, "top-k", *GRADIENT, *EAGER), rounds=7),
    Plan.of("b16-336x1", (*FORWARD, *GRADIENT, *EAGER)),
    Plan.of("b16-448x1", (*FORWARD, *GRADIENT, *EAGER), rounds=2),
    Plan.of("l14-224x1", (*FORWARD, "eager attentions", "eager rollout")),
    Plan.of("l14-448x1", ("plain", "rows", "rollout", "eager attentions"), rounds=2),
    Plan.of("b16-1024x1", FORWARD, ("eager attentions", "eager rollout", "eager relevance"), rounds=2),
    Plan.of("l14-1022x1", (), (*EAGER,)),
)
"""The table, the most telling cases first. 1022 is the multiple of 14 below 1024: one forward takes minutes on a
core, so only what the eager methods would need is printed."""
QUICK = (Plan.of("b16-224x1", (*FORWARD, *GRADIENT, *EAGER)),)
TINY = (Plan.of("tiny-32x2", (*FORWARD, *GRADIENT, *EAGER), ("top-k",), rounds=2),)
PEERS = "b16-224x1"
"""Where peers are compared: the size at which each of them runs."""
