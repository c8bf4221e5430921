"""A traced forward: lazy records of every call, for methods that follow information through the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from foveate.capture.certificate import Certificate, check_record
from foveate.capture.forward import tapped_forward
from foveate.capture.labels import call_labels
from foveate.capture.records import Check, Record
from foveate.errors import UsageError
from foveate.interfaces import (
    AttentionSource,
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    Outputs,
    Readout,
    Step,
)


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward with all its attention, evaluated on demand.

    ``records`` is in execution order; without ``grad`` they hold q and k only, since each was checked during
    the forward (``certificate``). ``batch.inputs`` is the leaf that gradients reach, where ``grad``.
    """

    source: AttentionSource
    batch: Batch
    outputs: Outputs
    records: Mapping[CallKey, Record]
    certificate: Certificate
    grad: bool = False

    @cached_property
    def flow(self) -> list[Step]:
        """The source's steps, in execution order."""
        return self.source.flow(self.batch, self.outputs)

    @property
    def stream(self) -> str:
        """The token stream at the bottom, whose patches lie on the source's cells."""
        return self.source.stream(self.batch)

    def record(self, call: CallKey) -> Record:
        """One call's record. Raises UsageError where it was not traced."""
        if call not in self.records:
            raise UsageError(f"trace: no call {tuple(call)} among {len(self.records)} traced calls")
        return self.records[call]

    def labels(self, call: CallKey) -> CallLabels:
        """Names of one call's axes, checked against its shape."""
        return call_labels(self.source, call, self.batch, self.outputs, self.record(call).shape)

    def readout(self, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """Where the answer is read from, per site; by target row with ``bound``."""
        return self.source.readout(self.batch, self.outputs, bound)

    def certify(self) -> Certificate:
        """The proof that every record reproduces its module's own output, made while the model ran."""
        return self.certificate


def trace(
    source: AttentionSource, batch: Batch, *, grad: bool = False, sites: Sequence[str] | None = None
) -> Trace:
    """Run the source's forward once under the tap.

    With ``grad`` the autograd graph is kept, from the inputs (a fresh leaf, unless they require a gradient
    already) through every call. ``sites`` limits which are recorded (default: all). Raises UsageError for
    an unknown site, CaptureError where a layer of a wanted site was missed.
    """
    known = {site.id: site for site in source.sites}
    unknown = sorted(set(sites or ()) - set(known))
    if unknown:
        raise UsageError(f"trace: no sites {unknown}", remedy=f"choose from {', '.join(known)}")
    wanted = list(known if sites is None else sites)
    if grad and not batch.inputs.requires_grad:
        batch = replace(batch, inputs=batch.inputs.detach().requires_grad_())
    records: dict[CallKey, Record] = {}
    checks: dict[CallKey, Check] = {}

    def take(call: CallKey, record: Record) -> None:
        if call.site in wanted:
            checks[call] = check_record(record)
            records[call] = record if grad else record.light()

    outputs, claims = tapped_forward(source, batch, take, needed=[known[s] for s in wanted], grad=grad)
    return Trace(source, batch, outputs, records, Certificate(checks, dict(claims.undeclared)), grad)
