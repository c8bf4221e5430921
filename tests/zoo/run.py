"""``python -m zoo.run``: examine some or all of the zoo, say how it went, and write the table."""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

import torch

from zoo.catalogue.all import ZOO
from zoo.examine import Report, examine


def main(arguments: list[str] | None = None) -> int:
    """Examine species by name (default: all); exit code 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names; default: all")
    parser.add_argument("--write", help="write the table to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = [s for s in ZOO if not options.names or any(n.lower() in s.name.lower() for n in options.names)]
    reports = []
    for species in chosen:
        reports.append(examine(species))
        print(line(reports[-1]), flush=True)
    if options.write:
        from zoo.table import write

        write(reports, options.write)
    failed = [report.name for report in reports if report.failures]
    print(f"{len(reports) - len(failed)} of {len(reports)} passed", file=sys.stderr)
    return 1 if failed else 0


def line(report: Report) -> str:
    """One architecture in one line, with its failures below it."""
    caught = f"{sum(report.caught.values())}/{sum(report.tried.values())}"
    head = (
        f"{'FAIL' if report.failures else 'ok  '} {report.name:28s} {report.calls:3d} calls, eager {report.eager},"
        f" recomputed {report.recomputed}, error {report.error:.1e}, PV {report.value_error:.1e},"
        f" entropy {report.peaked:.2f}, mutants {caught}, {report.seconds:.1f} s"
    )
    return "\n".join([head, *(f"       {failure}" for failure in report.failures[:8])])


if __name__ == "__main__":
    sys.exit(main())
