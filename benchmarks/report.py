"""Measurements as a Markdown page: the issue's limits first, then one table a case."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.methods import METHODS, Method
from benchmarks.peers import PEERS

Results = dict[str, Any]


@dataclass(frozen=True)
class Limit:
    """A figure the engine promises: CPU time and peak memory as ratios to the baseline, or memory in megabytes."""

    case: str
    method: str
    ratio: float
    memory_ratio: float | None = None
    megabytes: float | None = None


LIMITS = (
    Limit("l14-336x8", "rows", 1.03, memory_ratio=1.1),
    Limit("b16-1024x1", "rollout", 1.6, megabytes=500),
    *(Limit("l14-336x1", name, 1.2, memory_ratio=1.05) for name in ("relevance", "grad x attention", "legrad")),
)
EXPLANATION = """\
CPU s is the least of the rounds, on one thread. Ratio is the median over rounds of (method / baseline of the
same round), in brackets the ratio of the least times; the baseline is `plain` or `backward`. Methods run in one
process, in another order each round. Own share is what foveate itself took, in percent of the model's forward
in the same call, clocked at the tap: it does not feel how fast the machine was during another call. MB is peak
resident memory above the loaded model, in a fresh process for each method, with `MALLOC_MMAP_THRESHOLD_=65536`
and VmHWM reset after a warm-up on a tiny tower. A dash: not measured so. Times in brackets were taken once, in
the memory process, with the page faults that its setting costs.
"""


def table(results: Results) -> str:
    """The whole page."""
    parts = [f"# Benchmarks of the engine, {results['date']}\n", _machine(results["machine"]), EXPLANATION]
    parts += ["## Limits\n", *_rows(("case", "method", "ratio", "limit", "MB", "limit", ""), _limits(results))]
    for name, case in results.items():
        if isinstance(case, dict) and "skipped" in case:
            parts += [f"\n## {name}\n", *_case(case)]
    if "peers" in results:
        parts += ["\n## Peers\n", *_peers(results["peers"])]
    return "\n".join(parts) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    return "; ".join(f"{name} {value}" for name, value in machine.items()) + "\n"


def _rows(header: tuple[str, ...], body: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield _line(header)
    yield _line(("---",) * len(header))
    yield from map(_line, body)


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def _limits(results: Results) -> Iterator[tuple[str, ...]]:
    for limit in LIMITS:
        case = results.get(limit.case)
        if case is None:
            continue
        ratio, _ = ratios(case, METHODS[limit.method])
        size, base = (_megabytes(case, name) for name in (limit.method, METHODS[limit.method].against))
        most = limit.megabytes if limit.megabytes is not None else (limit.memory_ratio or 0) * (base or 0)
        met = ratio is not None and size is not None and ratio <= limit.ratio and size <= most
        said = "unknown" if ratio is None or size is None else "met" if met else "missed"
        yield (
            limit.case,
            limit.method,
            _number(ratio, 3),
            _number(limit.ratio, 2),
            _number(size),
            _number(most),
            said,
        )


def _case(case: Results) -> Iterator[str]:
    timing, load = case["time"], case["time"].get("load", float("nan"))
    if timing.get("failed"):
        yield f"Timing failed: {timing['failed']}\n"
    elif timing:
        rounds = max(map(len, timing["seconds"].values()))
        yield f"{rounds} rounds; load average at the end {load:.1f}.\n"
    names = [name for name in METHODS if name in case["memory"] or name in timing.get("seconds", {})]
    if names:
        header = ("method", "CPU s", "ratio", "own share %", "MB", "MB / baseline")
        yield from _rows(header, (_method(case, METHODS[name]) for name in names))
    for name, why in case["skipped"].items():
        yield f"\n{name}: skipped, {why}."
    if "accuracy" in case:
        yield "\n"
        yield from _rows(("against an oracle", "error"), _accuracy(case["accuracy"]))


def _method(case: Results, method: Method) -> tuple[str, ...]:
    weighed = case["memory"].get(method.name, {})
    if "failed" in weighed:
        return (method.name, "failed", weighed["failed"], "", "", "")
    seconds = case["time"].get("seconds", {}).get(method.name)
    ratio, least = ratios(case, method)
    size, base = _megabytes(case, method.name), _megabytes(case, method.against)
    return (
        method.name,
        _number(min(seconds), 2) if seconds else f"({_number(weighed.get('seconds'), 1)})",
        "-" if ratio is None else f"{ratio:.3f} ({least:.3f})",
        _own_share(case, method),
        _number(size),
        _number(size / base, 3) if size and base else "-",
    )


def ratios(case: Results, method: Method) -> tuple[float | None, float | None]:
    """(median over rounds of method / baseline, ratio of the least times); None where not timed."""
    seconds = case["time"].get("seconds", {})
    if method.name not in seconds or method.against not in seconds:
        return None, None
    own, base = seconds[method.name], seconds[method.against]
    return statistics.median(a / b for a, b in zip(own, base, strict=True)), min(own) / min(base)


def _own_share(case: Results, method: Method) -> str:
    engine = case["time"].get("engine", {}).get(method.name)
    if not engine:
        return "-"
    totals = case["time"]["seconds"][method.name]
    return _number(100 * statistics.median(e / (t - e) for e, t in zip(engine, totals, strict=True)), 2)


def _megabytes(case: Results, name: str) -> float | None:
    found: float | None = case["memory"].get(name, {}).get("megabytes")
    return found


def _accuracy(found: Results) -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        if name != "load":
            yield name, value if isinstance(value, str) else f"{value:.2g}"


def _peers(found: Results) -> Iterator[str]:
    yield f"{found['case']}; each beside the plain forward in its own processes.\n"
    body = []
    for name, method in PEERS.items():
        timed, weighed = (found.get(name, {}).get(part, {}) for part in ("time", "memory"))
        why = timed.get("failed") or weighed.get("failed")
        if why or not timed:
            body.append((name, method.summary, f"skipped: {why or 'not measured'}", "", ""))
            continue
        ratio, least = ratios({"time": timed}, method)
        size = _number(weighed["megabytes"])
        body.append(
            (name, method.summary, _number(min(timed["seconds"][name]), 2), f"{ratio:.2f} ({least:.2f})", size)
        )
    yield from _rows(("peer", "keeps", "CPU s", "ratio", "MB"), iter(body))


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
