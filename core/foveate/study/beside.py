"""The job behind ``foveate beside``: a picture-text model beside a detector, on files.

Two passes over the pictures. The first asks the detector alone what it finds, so that the other model can be
opened with a prompt for each of those labels; the second explains and compares, by
:mod:`foveate.study.clip_beside_detr`. Pictures are decoded when they are needed, one at a time; one that cannot
be read is told and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from foveate.errors import SampleError, UsageError
from foveate.study.clip_beside_detr import (
    TEMPLATE,
    BesideReport,
    clip_beside_detr,
    prompts_for,
    surest,
)

if TYPE_CHECKING:
    from foveate.data.manifest import Manifest
    from foveate.interfaces import AttentionSource, Sample

OpenWithPrompts = Callable[[tuple[str, ...]], "AttentionSource"]


@dataclass(frozen=True)
class Found:
    """What the detector sees: positions of readable pictures, the labels of their surest objects, what failed."""

    positions: tuple[int, ...]
    labels: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)

    @property
    def distinct(self) -> tuple[str, ...]:
        """Every label once, in order of appearance; pictures without an object have none."""
        return tuple(dict.fromkeys(label for label in self.labels if label))


class Pictures(Sequence["Sample"]):
    """Some pictures of a manifest, decoded one at a time."""

    def __init__(self, manifest: Manifest, positions: Sequence[int]) -> None:
        self.manifest, self.positions = manifest, tuple(positions)

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Pictures: ...
    def __getitem__(self, index: int | slice) -> Sample | Pictures:
        if isinstance(index, slice):
            return Pictures(self.manifest, self.positions[index])
        return self.manifest.load(self.positions[index])

    def named(self, sample_id: str) -> Pictures:
        """The one picture of that id."""
        ids = self.manifest.ids
        return Pictures(self.manifest, [p for p in self.positions if ids[p] == sample_id])


def find_labels(detector: AttentionSource, manifest: Manifest) -> Found:
    """The label of the surest object of every picture ("" where there is none).

    Raises UsageError where no picture can be read.
    """
    positions, labels, failed = [], [], {}
    for position, name in enumerate(manifest.ids):
        try:
            sample = manifest.load(position)
        except SampleError as error:
            failed[name] = str(error)
            continue
        positions.append(position)
        labels.append(surest(detector, sample) or "")
    if not positions:
        raise UsageError(f"none of {len(manifest)} pictures can be read: {next(iter(failed.values()))}")
    return Found(tuple(positions), tuple(labels), failed)


@dataclass(frozen=True, eq=False)
class BesideJob:
    """The comparison, the pictures that could not be read, and the prompts that the other model was given."""

    report: BesideReport
    pictures: Pictures
    prompts: tuple[str, ...]
    failed: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.report.to_dict(), "prompts": list(self.prompts), "failed": dict(self.failed)}

    def to_text(self) -> str:
        """For a terminal."""
        return "\n".join(self._lines()) + "\n" + self.report.to_text()

    def _lines(self) -> Iterator[str]:
        more = " ..." if len(self.prompts) > 8 else ""
        yield f"{len(self.prompts)} prompts: {', '.join(self.prompts[:8])}{more}"
        if len(self.prompts) == 1:
            yield "a single prompt has probability 1 whatever the picture; its logit is what is explained"
        for name, reason in self.failed.items():
            yield f"  {name}: not read, {reason}"

    def draw(self, out: Path) -> Path:
        """Both maps on the picture of median agreement. Raises UsageError where nothing was compared."""
        shown = [pair.sample for pair in self.report.pairs if not pair.reason]
        wanted = [sample for name in shown for sample in self.pictures.named(name)]
        return self.report.draw(wanted, out)


def run_beside(
    open_clip: OpenWithPrompts,
    detector: AttentionSource,
    manifest: Manifest,
    *,
    found: Found | None = None,
    label: str | None = None,
    method: str = "chefer_iccv21",
    template: str = TEMPLATE,
    seed: int = 0,
) -> BesideJob:
    """Compare ``open_clip(prompts)`` with ``detector`` on every picture of ``manifest``.

    ``found`` is :func:`find_labels`' answer, where it is known already. Prompts are made of the labels found, and
    of ``label``, which is asked of every picture where it is given. Raises UsageError where there is no label.
    """
    found = found or find_labels(detector, manifest)
    labels = tuple(dict.fromkeys((*([label] if label is not None else []), *found.distinct)))
    if not labels:
        raise UsageError(
            f"the detector found no object in {len(found.positions)} pictures",
            remedy="lower its threshold (--detector-option threshold=0.3), or ask for a --label",
        )
    prompts = prompts_for(labels, template)
    pictures = Pictures(manifest, found.positions)
    report = clip_beside_detr(
        open_clip(prompts), detector, pictures, method=method, label=label, template=template, seed=seed
    )
    return BesideJob(report, pictures, prompts, found.failed)
