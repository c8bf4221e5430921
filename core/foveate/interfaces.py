"""The contracts between the core and everything that knows a model.

A plugin implements :class:`AttentionSource`, :class:`Attribution`, :class:`Metric` or :class:`Renderer`;
the rest of this module is the vocabulary they share. Nothing heavy is imported here: torch, numpy and
xarray appear in annotations only, so that declaring a plugin costs nothing.

Axes are named in docstrings as ``(sample, head, query, key)``. ``frame`` appears only for clips.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from foveate.geometry import CellGrid, Geometry

SiteKind = Literal["self", "cross", "temporal"]
SiteForm = Literal["dense", "deformable", "pool", "slot"]
Scale = Literal["probability", "logit", "value"]

TOKEN_KINDS: tuple[str, ...] = (
    "patch",
    "cls",
    "register",
    "text",
    "object",
    "track",
    "slot",
    "frame",
    "background",
    "pool",
    "readout",
    "padding",
)
"""What a token can be; the position in this tuple is the code that is stored. Append only."""

Outputs = Any
"""What the model's own forward returned. Opaque to the core: it only travels back to the source."""


# ---------------------------------------------------------------------------------------- samples


@dataclass(frozen=True, eq=False)
class Sample:
    """One image or clip, decoded, with what the user's manifest says of it.

    ``pixels`` is uint8 RGB, ``(y, x, channel)`` for an image and ``(frame, y, x, channel)`` for a clip;
    ``mask`` is bool over the same pixels without the channel: where the evidence for the answer lies,
    if anybody knows. ``sha256`` is of the encoded file (or of the pixels where there is no file).
    """

    id: str
    pixels: NDArray[np.uint8]
    sha256: str = ""
    path: str = ""
    times: NDArray[np.float64] | None = None
    mask: NDArray[np.bool_] | None = None
    columns: Mapping[str, object] = field(default_factory=dict)

    @property
    def is_clip(self) -> bool:
        """Whether ``pixels`` has a frame axis."""
        return self.pixels.ndim == 4


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples as the model takes them.

    ``inputs`` is the one differentiable tensor, ``(sample, channel, y, x)`` or
    ``(sample, frame, channel, y, x)``, already normalised. ``per_sample`` holds tensors whose first axis
    is the sample (padding masks, per-sample text); ``shared`` holds what does not change with the sample
    (prompt embeddings). Of clips, ``per_sample["frame_index"]`` is int64 ``(sample, frame)``: which frame of the
    sample each frame of ``inputs`` is; ``shared["state"]`` is what a streaming model carries from earlier frames.
    """

    inputs: torch.Tensor
    geometry: tuple[Geometry, ...]
    ids: tuple[str, ...]
    per_sample: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def replace(self, inputs: torch.Tensor, index: Sequence[int] | torch.Tensor) -> Batch:
        """The same context around other inputs: row ``j`` of ``inputs`` belongs to sample ``index[j]``.

        Captum expands and perturbs inputs; geometry, masks, text and ids are repeated to match.
        """
        rows = [int(i) for i in index]
        if len(rows) != inputs.shape[0]:
            raise ValueError(f"Batch.replace: {inputs.shape[0]} inputs but {len(rows)} indices")
        return replace(
            self,
            inputs=inputs,
            geometry=tuple(self.geometry[i] for i in rows),
            ids=tuple(self.ids[i] for i in rows),
            per_sample={name: value[rows] for name, value in self.per_sample.items()},
        )


# ------------------------------------------------------------------------------ tokens and sites


@dataclass(frozen=True, eq=False)
class TokenAxis:
    """The labelled table behind ``query`` or ``key``, one row a token, in pixels of the model's input.

    ``kind`` holds codes into :data:`TOKEN_KINDS` (uint8). ``y``, ``x`` are token centres and ``height``,
    ``width`` their extents (float32, NaN for tokens without a place). ``level`` (pyramid level) and
    ``frame`` are int32, -1 where they do not apply. ``label`` is free text (track ids, words) or None.
    """

    kind: NDArray[np.uint8]
    y: NDArray[np.float32]
    x: NDArray[np.float32]
    height: NDArray[np.float32]
    width: NDArray[np.float32]
    level: NDArray[np.int32]
    frame: NDArray[np.int32]
    label: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return int(self.kind.size)

    def where(self, kind: str) -> NDArray[np.intp]:
        """Positions of all tokens of one kind."""
        import numpy as np

        return np.flatnonzero(self.kind == TOKEN_KINDS.index(kind))

    def take(self, index: Sequence[int]) -> TokenAxis:
        """The tokens at some positions, in that order."""
        import numpy as np

        chosen = np.asarray(index, dtype=np.intp)
        kept = {
            name: getattr(self, name)[chosen] for name in ("kind", "y", "x", "height", "width", "level", "frame")
        }
        return replace(self, **kept, label=None if self.label is None else tuple(self.label[i] for i in chosen))

    @classmethod
    def of_kind(cls, kind: str, count: int, *, label: tuple[str, ...] | None = None) -> TokenAxis:
        """``count`` tokens of one kind without a place in the picture."""
        import numpy as np

        nowhere = np.full(count, np.nan, np.float32)
        none = np.full(count, -1, np.int32)
        code = np.full(count, TOKEN_KINDS.index(kind), np.uint8)
        return cls(code, nowhere, nowhere, nowhere, nowhere, none, none, label)

    @classmethod
    def patches(cls, rows: int, columns: int, *, height: float, width: float, level: int = 0) -> TokenAxis:
        """A ``rows x columns`` grid of patches, row by row, that tiles an input of ``height x width`` pixels."""
        import numpy as np

        patch_h, patch_w = height / rows, width / columns
        y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
        count = rows * columns
        return cls(
            np.full(count, TOKEN_KINDS.index("patch"), np.uint8),
            ((y + 0.5) * patch_h).ravel().astype(np.float32),
            ((x + 0.5) * patch_w).ravel().astype(np.float32),
            np.full(count, patch_h, np.float32),
            np.full(count, patch_w, np.float32),
            np.full(count, level, np.int32),
            np.full(count, -1, np.int32),
        )

    @classmethod
    def concat(cls, *parts: TokenAxis) -> TokenAxis:
        """One axis after the other, for instance CLS, registers, patches."""
        import numpy as np

        labelled = any(part.label is not None for part in parts)
        return cls(
            kind=np.concatenate([part.kind for part in parts]),
            y=np.concatenate([part.y for part in parts]),
            x=np.concatenate([part.x for part in parts]),
            height=np.concatenate([part.height for part in parts]),
            width=np.concatenate([part.width for part in parts]),
            level=np.concatenate([part.level for part in parts]),
            frame=np.concatenate([part.frame for part in parts]),
            label=tuple(t for part in parts for t in (part.label or ("",) * len(part))) if labelled else None,
        )


@dataclass(frozen=True)
class Site:
    """One place where attention happens: one softmax space and one key grid.

    ``modules`` maps the path of each owning module (below the source's root module) to its true layer
    number. Where one module attends several times, ``path#0``, ``path#1`` ... are its softmaxes in order.
    ``query`` and ``key`` name token streams; two sites that share a stream share its tokens.
    ``group`` lists further batch axes of a call besides ``sample``, in order. ``ragged`` names the axes whose
    tokens differ from call to call (tracks come and go): :class:`CallLabels` places them on one common axis.
    An ``optional`` site may not run in a forward (it needs a second frame, or a track).
    """

    id: str
    modules: Mapping[str, int]
    heads: int
    query: str
    key: str
    kind: SiteKind = "self"
    form: SiteForm = "dense"
    normalised_over: Literal["key", "query", "point"] = "key"
    masks: tuple[str, ...] = ()
    group: tuple[Literal["frame", "window", "track", "position"], ...] = ()
    summary: str = ""
    ragged: tuple[Literal["query", "key"], ...] = ()
    optional: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        """True layer numbers, ascending."""
        return tuple(sorted(set(self.modules.values())))


class CallKey(NamedTuple):
    """Which execution: the ``number``-th time that this layer of this site ran in one forward."""

    site: str
    layer: int
    number: int = 0


@dataclass(frozen=True)
class Part:
    """Some entries of an axis that several calls share: their positions on it, and its whole size."""

    index: tuple[int, ...]
    size: int


@dataclass(frozen=True, eq=False)
class Place:
    """Where the tokens of one call lie on the axis that all calls of their site share.

    ``index`` holds a position on ``axis`` for each token of the call. What is not there in a call (a track before
    its birth) has attention 0 and is not ``allowed``.
    """

    axis: TokenAxis
    index: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CallLabels:
    """What the axes of one call mean.

    ``leading`` names the call's batch axes in order with their sizes, for instance
    ``(("sample", 8),)`` or ``(("sample", 8), ("window", 4))``; their product is the call's batch size.
    ``valid`` is bool ``(sample, key)``, False where the model hides a sample's key without a mask on the scores
    (deformable attention zeroes the values of padding), or None.

    A call that holds only a part of the samples, frames or tracks says which in ``at``: frames 5 and 6 of 7 are
    ``{"frame": Part((5, 6), 7)}``. An axis that is in ``at`` but not in ``leading`` has one position. At sites
    with ``ragged`` axes, ``query`` and ``key`` are the call's own tokens, in its order, and ``query_place`` and
    ``key_place`` say where on the common axis each lies.
    """

    leading: tuple[tuple[str, int], ...]
    query: TokenAxis
    key: TokenAxis
    valid: torch.Tensor | None = None
    at: Mapping[str, Part] = field(default_factory=dict)
    query_place: Place | None = None
    key_place: Place | None = None

    @property
    def query_axis(self) -> TokenAxis:
        """The query axis that all calls of the site share."""
        return self.query if self.query_place is None else self.query_place.axis

    @property
    def key_axis(self) -> TokenAxis:
        """The key axis that all calls of the site share."""
        return self.key if self.key_place is None else self.key_place.axis

    @property
    def partial(self) -> bool:
        """Whether the call holds only some samples, frames, tracks or tokens of its site."""
        return bool(self.at) or self.query_place is not None or self.key_place is not None


@dataclass(frozen=True, eq=False)
class Readout:
    """Where the answer is read from: weights over one site's queries.

    ``weights`` is float32 ``(sample or target, query)`` over the site's common query axis, rows summing to 1 (of a
    site with group axes: the same row of every group, each counting alike); or
    ``(sample or target, *site.group, query)`` where the row differs from frame to frame (a track's row), zero
    where there is none, all of it summing to 1 or, without any row, to 0. ``rule`` says in words what
    was chosen: ``cls``, ``patch mean``, ``cls + patch mean``, ``pooling head``, ``object query``, ``track``.
    """

    weights: torch.Tensor
    rule: str


# ------------------------------------------------------------------------------ flow of information


@dataclass(frozen=True)
class AttentionStep:
    """Tokens of stream ``query`` read from stream ``key``; with ``residual`` they also keep themselves."""

    call: CallKey
    query: str
    key: str
    residual: bool = True


@dataclass(frozen=True, eq=False)
class MergeStep:
    """A linear map of tokens (windows, patch merging, pooling): ``(target tokens, source tokens)`` weights.

    ``matrix`` may be sparse; with a first axis ``sample`` it differs from sample to sample.
    Where tokens of several streams come together (a class token that has gone its own way), ``others`` holds the
    further sources with their matrices: ``target = matrix source + sum of the others' matrix source``. A stream
    may be its own source.
    """

    source: str
    target: str
    matrix: torch.Tensor
    name: str = ""
    others: tuple[tuple[str, torch.Tensor], ...] = ()

    @property
    def parts(self) -> tuple[tuple[str, torch.Tensor], ...]:
        """Every source with its matrix."""
        return (self.source, self.matrix), *self.others


@dataclass(frozen=True)
class OpaqueStep:
    """Something that mixes tokens in a way attention does not describe; a sweep stops here and says so."""

    stream: str
    name: str


Step = AttentionStep | MergeStep | OpaqueStep


# ------------------------------------------------------------------------------ targets


@dataclass(frozen=True)
class Target:
    """What the user wants explained, before it is bound to an output.

    ``kind`` is one of the source's own (``AttentionSource.targets``); "default" takes its first.
    ``label`` is a class name, prompt or index; None means what the model predicts.
    """

    kind: str = "default"
    label: str | int | None = None
    object: int | None = None
    scale: Scale = "probability"


@dataclass(frozen=True)
class TargetRow:
    """One explained number: which sample, what kind, which class or object."""

    sample: int
    kind: str
    class_index: int | None = None
    label: str = ""
    object: int | None = None


@dataclass(frozen=True, eq=False)
class BoundTarget:
    """A target frozen to one output: argmax and matching are decided and detached.

    ``context`` holds tensors whose first axis is the row (frozen noise, matched masks, text embeddings).
    """

    rows: tuple[TargetRow, ...]
    scale: Scale = "probability"
    context: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Sequence[int] | torch.Tensor) -> BoundTarget:
        """Rows for an expanded batch: row ``j`` is old row ``index[j]`` and belongs to sample ``j``."""
        chosen = [int(i) for i in index]
        return replace(
            self,
            rows=tuple(replace(self.rows[i], sample=j) for j, i in enumerate(chosen)),
            context={name: value[chosen] for name, value in self.context.items()},
        )

    def at(self, scale: Scale) -> BoundTarget:
        """The same target on another output scale."""
        return replace(self, scale=scale)


@dataclass(frozen=True)
class Prediction:
    """One answer of the model, in original pixels. ``box`` is (top, left, bottom, right)."""

    label: str
    score: float
    class_index: int | None = None
    object: int | None = None
    box: tuple[float, float, float, float] | None = None
    mask: NDArray[np.bool_] | None = None
    track: str | None = None
    extra: Mapping[str, float | str] = field(default_factory=dict)


# ------------------------------------------------------------------------------ capture plan


RowRule = Literal["readout", "all", "none"]


@dataclass(frozen=True)
class SitePlan:
    """What is kept of one site.

    ``rows``: "readout" (the rows the answer is read from, weighted), "all" (full matrices), "none", or
    explicit query positions. ``reductions`` are exact over all rows in linear memory: any of
    ``entropy`` (sample, head, query), ``received`` (sample, head, key: mean over queries of the column),
    ``head_mean`` (sample, query, key), ``topk`` (values and indices of the k largest keys a row). At deformable
    sites ``points`` keeps the sampling points of the rows kept: location, weight, inside, level.
    """

    site: str
    layers: tuple[int, ...] | None = None
    heads: Literal["keep", "mean"] = "keep"
    rows: RowRule | tuple[int, ...] = "readout"
    reductions: tuple[str, ...] = ("entropy", "received")
    topk: int = 16


@dataclass(frozen=True)
class CapturePlan:
    """What a run keeps, decided before it starts. Sites that are not listed are not kept."""

    sites: tuple[SitePlan, ...]
    dtype: Literal["float16", "float32"] = "float16"

    def site(self, site_id: str) -> SitePlan | None:
        """The plan for one site, or None where it is not kept."""
        return next((plan for plan in self.sites if plan.site == site_id), None)


@dataclass(frozen=True)
class ModelCard:
    """Which model this is, for provenance: enough to fetch and check the same weights again."""

    id: str
    source: str
    adapter: str
    revision: str = ""
    weights_sha256: str = ""
    licence: str = "unverified"
    family: str = ""
    provenance: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


# ------------------------------------------------------------------------------ what plugins implement


class AttentionSource(ABC):
    """An opened model with its preprocessing and its declared sites.

    The core captures, measures, attributes and perturbs through these methods alone. ``module`` must be
    in eval mode; ``forward`` must be the model's own call, unchanged.
    """

    card: ModelCard
    targets: tuple[str, ...] = ()
    """Kinds of target that ``bind`` accepts; the first is the default."""
    media: Literal["image", "clip"] = "image"
    """What a sample is: an image, or a clip of frames."""
    carries: bool = False
    """Whether a clip can be read in consecutive blocks of frames, with :meth:`carry` between them."""
    ignored: Mapping[str, str] = {}
    """Module path (or prefix ending in ``*``) -> why its softmax, SDPA or grid-sample is not attention."""
    kernels: tuple[str, ...] = ()
    """``"package.module:function"``: compiled deformable attention that it calls; see foveate.capture.kernels."""

    @classmethod
    @abstractmethod
    def open(
        cls,
        row: Any,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        **options: Any,
    ) -> AttentionSource:
        """Open a registry row (:class:`foveate.plugins.registry.ModelRow`).

        ``weights`` is a local folder or file, ``"random"``, or None for the row's own id.
        Raises ModelError or MissingDependencyError.
        """

    @property
    @abstractmethod
    def module(self) -> torch.nn.Module:
        """The root under which sites' module paths are resolved."""

    @property
    @abstractmethod
    def sites(self) -> tuple[Site, ...]:
        """Every place where this model attends."""

    @abstractmethod
    def encode(self, samples: Sequence[Sample]) -> Batch:
        """Preprocess samples as the model's own processor does, keeping the exact geometry."""

    @abstractmethod
    def forward(self, batch: Batch, *, grad: bool = False) -> Outputs:
        """Run the model. With ``grad`` the graph back to ``batch.inputs`` is kept."""

    @abstractmethod
    def predictions(self, outputs: Outputs, batch: Batch) -> list[list[Prediction]]:
        """What the model answers, best first, one list a sample."""

    @abstractmethod
    def bind(self, outputs: Outputs, batch: Batch, target: Target) -> BoundTarget:
        """Freeze a target to this output: at least one row a sample, or none where it does not exist."""

    @abstractmethod
    def score(self, outputs: Outputs, batch: Batch, bound: BoundTarget) -> torch.Tensor:
        """One differentiable number a row of ``bound``, float32 ``(target,)``, on ``bound.scale``."""

    def hold(self, batch: Batch, outputs: Outputs) -> Batch:
        """The batch with the discrete decisions of ``outputs``, which further forwards on it keep.

        Trackers decide by thresholds which rows are tracks. Held, "track 3" of a perturbed clip is track 3 of the
        intact one. Other models decide nothing: the batch itself.
        """
        return batch

    @abstractmethod
    def label(self, call: CallKey, batch: Batch, outputs: Outputs) -> CallLabels:
        """Name the axes of one call. Asked after the forward, when tracks and windows are known."""

    @abstractmethod
    def readout(self, batch: Batch, outputs: Outputs, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """Per site: the query weights that the answer is read from (by target when ``bound`` is given).

        A site that is missing here has no readout rows. The first entry is the site where reading starts.
        """

    def fixed_readout(self, batch: Batch) -> Mapping[str, Readout]:
        """Those of :meth:`readout` (without ``bound``) that are known before the forward: CLS, means, pools.

        Optional: the engine then keeps these rows during the forward and holds no q and k; sites that are
        missing here wait for the outputs. Must equal ``readout(batch, outputs)`` where it answers.
        """
        return {}

    @abstractmethod
    def flow(self, batch: Batch, outputs: Outputs) -> list[Step]:
        """In execution order, what rollout and relevance need to follow information through the model."""

    @abstractmethod
    def cells(self, batch: Batch) -> CellGrid:
        """The model's natural cells (patches) tiling its input, used to perturb and to pool maps."""

    def frame_cells(self, batch: Batch) -> tuple[int, ...]:
        """The frame cell of each input frame of a clip, from 0 up: one each, unless tubelets share them."""
        return tuple(range(batch.inputs.shape[1])) if batch.inputs.dim() == 5 else ()

    def carry(self, outputs: Outputs) -> Mapping[str, Any]:
        """What the model remembers after this block of frames: the next batch's ``shared["state"]``, detached.

        Asked only where ``carries``. Blocks one after the other must answer as the whole clip at once does.
        """
        raise NotImplementedError

    def stream(self, batch: Batch) -> str:
        """The token stream at the bottom of the flow, whose patches lie on :meth:`cells`."""
        return self.sites[0].key

    def bounds(self, header: Mapping[str, Any]) -> Mapping[str, int]:
        """Capacity of every ragged axis for samples described by ``header``; none for constant grids."""
        return {}

    def facts(self) -> Mapping[str, Any]:
        """What the live model is (image, patch, grid, prefix, layers, heads ...), to check ``expect``."""
        return {}


@dataclass(frozen=True, eq=False)
class AttributionMap:
    """An explanation on cells of the model's input, ready to be scored whatever made it.

    ``values`` is float32 ``(target, y, x)`` (``(target, frame, y, x)`` for clips) on ``grid`` (input
    pixels). ``signed`` maps keep negative evidence. ``info`` records all that fixes the result: pooling,
    baseline, steps, seed, convergence. ``converged`` False keeps a map out of rankings.
    """

    method: str
    values: NDArray[np.float32]
    grid: CellGrid
    signed: bool = False
    converged: bool = True
    info: Mapping[str, Any] = field(default_factory=dict)


class Attribution(ABC):
    """A way of explaining: gradients, perturbation or attention."""

    name: ClassVar[str]
    citation: ClassVar[str]

    @abstractmethod
    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """Explain each row of ``bound``. Must leave the model as it was."""


@dataclass(frozen=True)
class MetricInfo:
    """What a metric is, for its labels and for readers.

    ``consumes`` and ``produces`` are the dims that the kernel removes and adds; ``accumulate`` says how
    results of successive row blocks join: side by side ("rows"), or as a "mean" or "sum" over queries.
    """

    name: str
    summary: str
    unit: str
    citation: str
    consumes: tuple[str, ...] = ("key",)
    produces: tuple[str, ...] = ()
    accumulate: Literal["rows", "mean", "sum"] = "rows"
    bounds: tuple[float, float] = (float("-inf"), float("inf"))
    better: Literal["higher", "lower", "none"] = "none"
    needs: tuple[Literal["key_positions", "query_positions", "heads", "all_rows", "all_keys"], ...] = ()


class Metric(ABC):
    """A number about attention rows."""

    info: ClassVar[MetricInfo]

    @abstractmethod
    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """Reduce complete rows ``(..., head, query, key)``, torch or numpy, over ``info.consumes``.

        Rows are non-negative over valid keys; they need not sum to 1 (a CLS row without its self-weight).
        """


class Renderer(ABC):
    """Draws one kind of picture from a run."""

    name: ClassVar[str]
    draws: ClassVar[str]
    """In words, what it can draw; shown by ``foveate plot --list``."""

    @abstractmethod
    def render(self, selection: Any, *, out: Path, scale: str = "lift", **options: Any) -> Path:
        """Draw ``selection`` (a :class:`foveate.data.run.Run` or part of one) to ``out`` and return it."""
