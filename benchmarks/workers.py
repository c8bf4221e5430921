"""One fresh process: ``python -m benchmarks.workers time|memory|accuracy CASE [METHOD ...]`` prints JSON.

``time`` runs all methods of a case in rounds, in another order each round, so that a slow moment of the machine
meets all of them. ``memory`` runs one method once, after a run of it on a tiny tower that loads all code.
"""

from __future__ import annotations

import argparse
import json
import os
import random

from benchmarks.cases import Case


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("time", "memory", "accuracy"))
    parser.add_argument("case", type=Case.parse)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    if options.what == "accuracy":
        from benchmarks.accuracy import errors

        found: dict[str, object] = dict(errors(options.case))
    elif options.what == "time":
        found = dict(times(options.case, options.methods, options.rounds))
    else:
        found = dict(memory(options.case, options.methods[0]))
    print("\n" + json.dumps({**found, "load": os.getloadavg()[0]}))


def times(case: Case, names: list[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU seconds of each method by round, and foveate's own part where it can be told apart."""
    from benchmarks.meters import cpu, engine_clock
    from benchmarks.peers import find
    from benchmarks.towers import build

    tower = build(case)
    methods = [find(name) for name in names]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    engine: dict[str, list[float]] = {method.name: [] for method in methods if method.reads_forward}
    methods[0].run(tower)
    for method in methods:
        if method.prepare is not None:
            method.prepare(tower)
    for number in range(rounds):
        for method in random.Random(number).sample(methods, len(methods)):
            if method.reads_forward:
                with engine_clock(tower.source) as clock:
                    total = cpu(lambda run=method.run: run(tower))  # type: ignore[misc]
                engine[method.name].append(clock.engine(total))
            else:
                total = cpu(lambda run=method.run: run(tower))  # type: ignore[misc]
            seconds[method.name].append(total)
    return {"seconds": seconds, "engine": engine}


def memory(case: Case, name: str) -> dict[str, float]:
    """Peak megabytes of one call above the loaded model, and its CPU seconds."""
    from benchmarks.meters import cpu, peak
    from benchmarks.peers import find
    from benchmarks.towers import build

    method = find(name)
    method.run(build(Case("tiny", 32)))
    tower = build(case)
    if method.prepare is not None:
        method.prepare(tower)
    seconds: list[float] = []
    megabytes = peak(lambda: seconds.append(cpu(lambda: method.run(tower))))
    return {"megabytes": megabytes, "seconds": seconds[0]}


if __name__ == "__main__":
    main()
