"""``docs/zoo.md``: what the last full run of the zoo found, one row an architecture."""

from __future__ import annotations

import datetime
import platform
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from zoo.aliases import fingerprint
from zoo.compare import CAUGHT, EAGER_TOLERANCE, TOLERANCE
from zoo.coverage import left_out
from zoo.examine import Report
from zoo.weights import PEAKED

HEAD = """\
# The zoo

What the engine gives on {count} architectures of transformers {transformers}: tiny random models on their default
(fast) attention. Written by `make zoo`; do not edit. Last full run: {date}, Python {python}, torch {torch},
CPU, float32, {seconds:.0f} s on one thread. Every test run repeats a fixed choice ([tests/zoo](../tests/zoo)).

**{passed} pass, {failed} fail, {empty} have no attention matrix to record** (see the remarks). They run {distinct}
distinct pieces of attention code: classes whose source differs by more than names; {aliases} rows run none that an
earlier row does not, and are marked `=`. {calls} calls were checked, {eager} of them against matrices that the
model itself returned.

Weights are drawn anew, and q and k scaled until the median row entropy of every call is below {peaked} ln K: on
random initialisation attention is uniform to five digits and any comparison succeeds. Then, for each:

- **error**: largest |A - reference| / max |reference| of any call. References are the kernels' own inputs,
  recorded below Python in a forward without the tap and evaluated in float64 (bound {tolerance:.0e}, plus
  4 · 6e-8 of the largest score: float32 does not know it better), and the `output_attentions` of a twin on eager
  attention, where the model returns matrices (bound {eager_tolerance:.0e}, plus ten times the same: two forwards
  drift apart). For deformable attention: torch's own sampling of a one-hot picture of every cell.
- **PV**: A times V against the output of the model's own attention call.
- **census**: every softmax, attention and grid-sample kernel that ran is a recorded call, or is ignored for the
  reason given below.
- **mutants**: records with heads swapped, scale lost, mask or bias lost, queries and keys exchanged, another
  layer's weights in their place, sampling axes exchanged, pixels shifted by half. Caught: off by more than
  {caught:.0e}. Made wherever that changes something by construction; a lost scale or mask needs a call that is
  given q, k and a mask (SDPA), since weights that the model computes itself are read, not recomputed.
- Outputs with and without the tap are equal to the bit, and an exception in mid-forward leaves the model
  unchanged.

| architecture | attention | sites | calls | via | error | PV | reference | census | mutants |
|---|---|---:|---:|---|---:|---:|---|---|---:|
"""

OUTSIDE = """\
## Not in the zoo

Folders of transformers {transformers} that take pictures and attend, of which nothing was run:

"""


def write(reports: Sequence[Report], path: str) -> None:
    """Write the table of a full run."""
    aliases = alias_of(reports)
    total = Counter[str]()
    for report in reports:
        total += Counter(calls=report.calls, eager=report.eager)
    text = HEAD.format(
        count=len(reports),
        transformers=version("transformers"),
        torch=version("torch").partition("+")[0],
        python=platform.python_version(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        seconds=sum(report.seconds for report in reports),
        passed=sum(bool(report.calls and not report.failures) for report in reports),
        failed=sum(bool(report.failures) for report in reports),
        empty=sum(not report.calls and not report.failures for report in reports),
        distinct=len({fingerprint(cls) for report in reports if not report.failures for cls in report.attention}),
        aliases=len(aliases),
        calls=total["calls"],
        eager=total["eager"],
        peaked=PEAKED,
        tolerance=TOLERANCE,
        eager_tolerance=EAGER_TOLERANCE,
        caught=CAUGHT,
    )
    rows = [row(report, aliases.get(report.name, "")) for report in reports]
    notes = [f"- **{r.name}**: {note}" for r in reports for note in remarks(r)]
    failed = [f"- **{r.name}**: {failure}" for r in reports for failure in r.failures]
    outside = [f"- `{name}`: {why}" for name, why in left_out(reports).items()]
    parts = (
        text + "\n".join(rows),
        "## Failures\n\n" + ("\n".join(failed) or "None."),
        "## Remarks\n\n" + "\n".join(notes),
        OUTSIDE.format(transformers=version("transformers")) + "\n".join(outside),
    )
    Path(path).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def row(report: Report, alias: str) -> str:
    """One architecture."""
    name = f"**{report.name}: FAILS**" if report.failures else report.name
    attention = ", ".join(f"`{cls.__name__}`" for cls in report.attention) or "none"
    if alias:
        attention += f" = {alias}"
    via = ", ".join(f"{count} {kind}" for kind, count in sorted(report.via.items()))
    reference = ", ".join(
        f"{n} {kind}" for n, kind in ((report.eager, "eager"), (report.recomputed, "recomputed")) if n
    )
    census = f"{report.kernels}" + (f", {sum(report.ignored.values())} ignored" if report.ignored else "")
    mutants = f"{sum(report.caught.values())}/{sum(report.tried.values())}"
    cells = (
        name,
        attention,
        report.sites,
        report.calls,
        via,
        number(report.error),
        number(report.value_error),
        reference,
        census,
        mutants,
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def remarks(report: Report) -> list[str]:
    """What a reader must know about a row."""
    ignored = [f"{count} kernels ignored: {reason}" for reason, count in report.ignored.items()]
    return [remark.replace("|", "\\|") for remark in [*filter(None, [report.note]), *ignored]]


def number(value: float) -> str:
    """Two digits, or a dash where nothing was compared."""
    return "-" if value != value else f"{value:.1e}"


def alias_of(reports: Sequence[Report]) -> dict[str, str]:
    """Architectures all of whose attention code earlier rows have run -> those rows."""
    seen: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for report in reports:
        prints = [fingerprint(cls) for cls in report.attention]
        if prints and all(p in seen for p in prints):
            aliases[report.name] = ", ".join(dict.fromkeys(seen[p] for p in prints))
        for p in prints:
            seen.setdefault(p, report.name)
    return aliases
