"""Everything the zoo asks of one architecture, as a report that names what failed."""

from __future__ import annotations

import math
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from foveate.capture.certificate import check_record
from foveate.capture.records import Record
from foveate.capture.tap import Tap
from foveate.testing.state import module_state, same, tensors_of
from zoo.compare import TOLERANCE, References, assign, assign_eager, distance
from zoo.eager import matrices
from zoo.kernels import Recorder, python_paths
from zoo.mutants import mutants
from zoo.species import Species
from zoo.weights import PEAKED, revive, sharpen

HEAD_NAMES = ("num_attention_heads", "num_heads", "n_heads", "nhead", "heads", "n_head", "attention_heads")


@dataclass
class Report:
    """What was found about one architecture; ``failures`` is empty where all is as it must be."""

    name: str
    model: str = ""
    attention: tuple[type, ...] = ()
    folders: frozenset[str] = frozenset()
    sites: int = 0
    calls: int = 0
    via: Counter[str] = field(default_factory=Counter)
    eager: int = 0
    recomputed: int = 0
    error: float = math.nan
    value_error: float = math.nan
    peaked: float = math.nan
    kernels: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    caught: Counter[str] = field(default_factory=Counter)
    tried: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    note: str = ""
    seconds: float = 0.0


def folder_of(cls: type) -> str:
    """The folder of transformers' models that defines a class; empty for others."""
    found = re.match(r"transformers\.models\.(\w+)\.", cls.__module__)
    return found[1] if found else ""


class InterruptedForwardError(Exception):
    """Raised inside a forward, on purpose."""


def examine(species: Species) -> Report:
    """Build one architecture, peak its attention and check all that the zoo promises."""
    remarks = [
        species.note,
        species.matrixless,
        species.not_eager,
        *(f"{p}: {why}" for p, why in species.uniform.items()),
    ]
    report, start = Report(species.name, note="; ".join(filter(None, remarks))), time.perf_counter()
    try:
        with torch.no_grad(), python_paths():
            _examine(species, report)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        report.failures.append(f"{type(error).__name__}: {text} ({last.name}, line {last.lineno})")
    report.seconds = time.perf_counter() - start
    return report


def _examine(species: Species, report: Report) -> None:
    model, inputs = species.build()
    report.model = type(model).__name__
    revive(model)
    run = forward(model, inputs)
    report.peaked = sharpen(model, lambda: tapped(model, run, species)[1], species.sharpen, species.uniform)
    plain = tensors_of(run())
    outputs, records, tap = tapped(model, run, species)
    with Recorder(model) as recorder:
        run()
    _describe(report, model, records, len(recorder.calls), species.matrixless)
    references = assign(records, recorder.calls, dict(species.ignored))
    assign_eager(references, records, _returned(model, inputs, species, report))
    _compare(report, records, references)
    _stray(report, tap, species)
    if not same(plain, tensors_of(outputs)):
        report.failures.append("outputs differ with and without capture")
    _mutate(report, records, references, species)
    _interrupt(report, model, run, records, species, plain)


def _returned(model: nn.Module, inputs: Mapping[str, Any], species: Species, report: Report) -> list[Tensor]:
    """The eager twin's matrices; where its own code raises, that is noted and kernels alone are the reference."""
    if species.not_eager:
        return []
    try:
        return matrices(model, inputs)
    except Exception as error:
        report.note = f"{report.note}; its eager path raises {type(error).__name__}: {error}".lstrip("; ")
        return []


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """The model's own call, with the random state it draws from (masks of pretraining) always the same."""

    def run() -> Any:
        torch.manual_seed(0)
        return model(**inputs)

    return run


def tapped(model: nn.Module, run: Callable[[], Any], species: Species) -> tuple[Any, list[Record], Tap]:
    """Outputs, records and the tap of one forward."""
    tap = Tap(model, heads=lambda path: heads_of(model, path, species))
    with tap:
        outputs = run()
    return outputs, tap.records, tap


def heads_of(model: nn.Module, path: str, species: Species) -> int | None:
    """Heads that a module declares, for calls that fold them into the batch."""
    for pattern, count in species.heads.items():
        if fnmatchcase(path, pattern):
            return count
    module = model.get_submodule(path)
    found = [getattr(module, name) for name in HEAD_NAMES if isinstance(getattr(module, name, None), int)]
    return found[0] if found else None


def _describe(report: Report, model: nn.Module, records: list[Record], kernels: int, matrixless: str) -> None:
    report.sites, report.calls, report.kernels = len({r.name for r in records}), len(records), kernels
    report.via = Counter(r.via for r in records)
    report.folders = frozenset(folder_of(type(part)) for part in model.modules())
    owners = {type(model.get_submodule(record.name)) for record in records}
    report.attention = tuple(sorted(owners, key=lambda cls: (cls.__module__, cls.__qualname__)))
    if bool(records) == bool(matrixless):
        report.failures.append("attention was recorded after all" if records else "no attention was recorded")
    if not report.peaked < PEAKED:
        report.failures.append(f"attention is not peaked: median row entropy {report.peaked:.2f} ln K")


def _compare(report: Report, records: list[Record], references: References) -> None:
    report.eager, report.ignored = len(references.eager), references.ignored
    report.recomputed = len(references.kernels)
    report.failures += references.unmatched
    report.failures += [f"unclaimed: {count} x {who}" for who, count in references.unclaimed.items()]
    errors, checks = [], []
    for position, record in enumerate(records):
        errors.append(references.error(position, record))
        check = check_record(record)
        checks.append(check.value_error)
        kernel = references.kernels.get(position)
        if kernel is not None and not (off := distance(record, kernel)) < TOLERANCE + references.slack[position]:
            report.failures.append(f"{record.name}: weights off by {off:.1e}")
        if check.value_error > 1e-4 or math.isinf(check.value_error) or not check.row_error < 1e-5:
            report.failures.append(
                f"{record.name}: certificate {check.value_error:.1e}, rows {check.row_error:.1e}"
            )
    report.error = max((e for e in errors if not math.isnan(e)), default=math.nan)
    report.value_error = max((c for c in checks if not math.isnan(c)), default=math.nan)
    blind = sum(map(math.isnan, checks))
    if blind:
        report.note = f"{report.note} {blind} calls without a P V check.".strip()


def _stray(report: Report, tap: Tap, species: Species) -> None:
    """Softmaxes that the tap saw but could not follow to values must be ignored by name."""
    for record in tap.unlinked:
        if not any(fnmatchcase(record.name, pattern) for pattern in species.ignored):
            report.failures.append(f"{record.name or 'root'}: a softmax {tuple(record.shape)} met no values")


def _mutate(report: Report, records: list[Record], references: References, species: Species) -> None:
    for kind, position, mutant in mutants(records):
        uniform = any(fnmatchcase(records[position].name, pattern) for pattern in species.uniform)
        if position in references.kernels and not uniform:
            report.tried[kind] += 1
            if references.noticed(position, mutant):
                report.caught[kind] += 1
            else:
                report.failures.append(f"mutant not caught: {kind} at {records[position].name}")


def _interrupt(
    report: Report, model: nn.Module, run: Callable[[], Any], records: list[Record], species: Species, plain: Any
) -> None:
    """An exception in the middle of a tapped forward leaves the model as it was."""
    if not records:
        return

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise InterruptedForwardError

    owner = model.get_submodule(records[len(records) // 2].name)
    handle = (owner if owner is not model else next(model.children())).register_forward_hook(stop)
    before = module_state(model)
    try:
        tapped(model, run, species)
    except InterruptedForwardError:
        pass
    else:
        report.failures.append("the exception in mid-forward was not raised")
    if module_state(model) != before:
        report.failures.append("the model changed after an exception in mid-forward")
    handle.remove()
    if not same(plain, tensors_of(run())):
        report.failures.append("outputs changed after an exception in mid-forward")
