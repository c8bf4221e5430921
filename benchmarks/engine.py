"""What exact attention costs: ``python -m benchmarks.engine [--quick] [--out benchmarks/results/DATE.md]``.

Prints CPU time and peak extra memory of foveate, of the eager textbook and of peers next to the model's own
forward (or forward and backward), and how exact each result is. Every number comes from a fresh process. With
``--out`` the measurements are kept beside the table as JSON; running again with other ``--case`` adds to them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.cases import FULL, PEERS, QUICK, TINY, Case, Plan
from benchmarks.machine import available_gigabytes, describe
from benchmarks.report import table

TIMING = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
WEIGHING = {**TIMING, "MALLOC_MMAP_THRESHOLD_": "65536"}
"""Tensors above 64 KiB in mappings of their own: freed memory leaves the process, so the peak is the true one."""
Results = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write where asked to."""
    options = _options(arguments)
    plans = TINY if options.tiny else QUICK if options.quick else FULL
    if options.case:
        plans = tuple(plan for plan in plans if str(plan.case) in options.case)
    kept = options.out.with_suffix(".json") if options.out else None
    results: Results = json.loads(kept.read_text()) if kept and kept.exists() else {}
    results["machine"] = describe()
    results.setdefault("date", datetime.datetime.now(datetime.UTC).date().isoformat())
    for _ in run(plans, options, results):
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    print(text)
    if options.out:
        options.out.write_text(text)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="ViT-B/16 at 224 pixels only, about two minutes")
    size.add_argument("--tiny", action="store_true", help="a toy tower: checks the harness, times mean nothing")
    parser.add_argument("--case", action="append", help="only this case of the table, such as l14-336x8")
    parser.add_argument("--rounds", type=int, help="instead of each case's own number")
    parser.add_argument("--skip", nargs="*", default=[], choices=("time", "memory", "accuracy", "peers"))
    parser.add_argument("--limit", type=float, default=20.0, help="gigabytes no method may need (default 20)")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers installed")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    return parser.parse_args(arguments)


def run(plans: Iterable[Plan], options: argparse.Namespace, results: Results) -> Iterator[None]:
    """Fill ``results``; yields after every process, so that nothing measured is lost."""
    limit = min(options.limit, 0.9 * available_gigabytes())
    for plan in plans:
        case = results.setdefault(str(plan.case), {"time": {}, "memory": {}, "skipped": {}})
        if "time" not in options.skip and plan.timed:
            allowed = _within(plan.timed, plan.case, limit, case)
            case["time"] = _worker("time", plan.case, *allowed, "--rounds", str(options.rounds or plan.rounds))
            yield
        for name in _within((*plan.timed, *plan.weighed), plan.case, limit, case):
            if "memory" not in options.skip:
                case["memory"][name] = _worker("memory", plan.case, name, environment=WEIGHING)
                yield
        if "accuracy" not in options.skip and plan.case.matrices < 2e9 and "relevance" in plan.timed:
            case["accuracy"] = _worker("accuracy", plan.case)
            yield
    if "peers" not in options.skip and not options.case:
        yield from _peers(Case.parse("tiny-32x2" if options.tiny else PEERS), options, results)


def _peers(case: Case, options: argparse.Namespace, results: Results) -> Iterator[None]:
    """Each peer in processes of its own: some of them change torch for good."""
    from benchmarks.peers import PEERS as PEER_METHODS

    found = results.setdefault("peers", {"case": str(case)})
    for name in PEER_METHODS:
        python = options.peer_python
        timed = _worker("time", case, "plain", name, "--rounds", str(options.rounds or 5), python=python)
        weighed = _worker("memory", case, name, environment=WEIGHING, python=python)
        found[name] = {"time": timed, "memory": weighed}
        yield


def _within(names: Iterable[str], case: Case, limit: float, found: Results) -> list[str]:
    """The methods that fit into memory; the others are noted with the size they would need."""
    from benchmarks.methods import METHODS

    fitting = []
    for name in names:
        needed = METHODS[name].stacks * case.matrices / 1e9
        if needed > limit:
            found["skipped"][name] = f"needs {needed:.0f} GB of attention matrices"
        else:
            found["skipped"].pop(name, None)
            fitting.append(name)
    return fitting


def _worker(
    what: str, case: Case, *arguments: str, environment: dict[str, str] = TIMING, python: str = sys.executable
) -> Results:
    """One fresh process; its JSON, or ``{"failed": the last line it wrote}``."""
    print(f"{what} {case} {' '.join(arguments)}", file=sys.stderr, flush=True)
    command = [python, "-m", "benchmarks.workers", what, str(case), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": lines[-1]}
    result: Results = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
