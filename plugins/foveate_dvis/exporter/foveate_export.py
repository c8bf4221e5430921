"""Record what a model of your own attends to, inside its own environment. Copy this one file there.

It needs numpy and torch alone (torch 1.12 and Python 3.8, or newer), not foveate::

    import foveate_export

    with foveate_export.record(model, "clip.npz"):
        model(batched_inputs)               # your own call, unchanged

and afterwards, where foveate is installed, ``foveate import clip.npz -o clip.zarr``.

Recorded are attention of ``nn.MultiheadAttention``, of multi-scale deformable attention (weights and sampling
points), of slot attention, softmaxes in modules whose class or name says attention, and, of DVIS-DAQ (whose code
and not this file decides), rows, tracks, frame importance, class scores and masks. The model runs as it would:
weights are computed a second time from the arguments of the module and checked against its output
(``error``: largest difference over largest output). Functions are wrapped while the context is open, and
put back when it closes, after exceptions too. The file holds plain arrays and JSON, no pickle.

Limits: one clip or one image a file; what runs in TorchScript or on other threads is not seen.
"""

from __future__ import annotations

import fnmatch
import hashlib
import inspect
import json
import os
import platform
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

FORMAT, VERSION = "foveate-recording", 1
_PACKAGES = ("torch", "torchvision", "numpy", "detectron2", "timm", "mmcv", "mask2former", "dvis_daq", "dvis_Plus")


@contextmanager
def record(
    model: nn.Module,
    out: str | os.PathLike[str],
    sites: Sequence[str] | None = None,
    frames: Any = None,
    channels: str | None = None,
    labels: Sequence[str] = (),
    dtype: str = "float32",
    weights_hash: bool = True,
) -> Iterator[_Recorder]:
    """Record the forwards of ``model`` inside the context into the file ``out`` (``.npz``).

    ``sites``: patterns of module paths (``"tracker.*"``), None for all. ``frames``: the pictures, uint8 (frame, y,
    x, 3) RGB, where the model's input does not tell (detectron2's does). ``channels``: "RGB" or "BGR", the order
    of the model's input; None asks the model. ``labels``: class names. ``dtype``: of attention, "float32" or
    "float16".
    ``weights_hash``: whether to hash the parameters, so that runs of other weights can be told apart.
    Nothing is left behind where the model raises. Yields the recorder, whose ``meta`` says what was seen.
    """
    recorder = _Recorder(model, str(out), sites, channels, dtype)
    patches = _Patches()
    try:
        recorder.install(patches)
        try:
            yield recorder
        finally:
            patches.undo()
        if frames is not None:
            recorder.set_frames(np.asarray(frames), None)
        recorder.close(labels, weights_hash)
    except BaseException:
        recorder.abandon()
        raise


class _Patches:
    """Attributes that were replaced, put back in reverse order."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, bool, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        had = name in vars(owner)
        self._done.append((owner, name, had, vars(owner).get(name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        while self._done:
            owner, name, had, value = self._done.pop()
            if had:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


class _Recorder:
    """Writes each array as soon as it is there, so that long clips need no memory."""

    def __init__(
        self, model: nn.Module, out: str, sites: Sequence[str] | None, channels: str | None, dtype: str
    ) -> None:
        self.model, self.out, self.sites, self.dtype = model, out, sites, np.dtype(dtype)
        self.channels = channels or str(getattr(model, "input_format", "RGB"))
        self.stack: list[str] = []
        self.busy = False
        self.counts: dict[str, int] = {}
        self.names: set[str] = set()
        self.modules = dict(model.named_modules())
        self.meta: dict[str, Any] = {"format": FORMAT, "version": VERSION, "calls": [], "skipped": {}}
        self.meta.update(forwards=0, media="")
        self.tracking = _Tracking(self) if _is_daq(model) else None
        self._zip = zipfile.ZipFile(self.out + ".part", "w", zipfile.ZIP_STORED, allowZip64=True)

    # ------------------------------------------------------------------------- the file

    def write(self, name: str, value: Any) -> None:
        """One array into the file; no name twice."""
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value).numpy()
        if name in self.names:
            raise ValueError(f"foveate_export: {name!r} twice in one recording: record one forward a file")
        self.names.add(name)
        with self._zip.open(name + ".npy", "w", force_zip64=True) as target:
            np.lib.format.write_array(target, np.ascontiguousarray(value), allow_pickle=False)

    def close(self, labels: Sequence[str], weights_hash: bool) -> None:
        """Add what is known at the end, and give the file its name."""
        if not self.meta["calls"]:
            raise RuntimeError(
                "foveate_export: no attention was seen. Was the model called inside the context? Softmaxes in "
                f"other modules: {sorted(self.meta['skipped']) or 'none'} (name them in sites=)"
            )
        if self.tracking is not None:
            self.meta["daq"] = self.tracking.close()
        seen = {call["path"] for call in self.meta["calls"]}
        self.meta["silent"] = sorted(p for p, m in self.modules.items() if _kind(p, m) and p not in seen and p)
        self.meta["model"] = type(self.model).__module__ + "." + type(self.model).__qualname__
        self.meta["labels"] = [str(label) for label in labels] or _labels(self.model)
        self.meta["weights_sha256"] = _hash(self.model) if weights_hash else ""
        self.meta["versions"] = dict(
            {"python": platform.python_version()},
            **{n: str(getattr(sys.modules[n], "__version__", "?")) for n in _PACKAGES if n in sys.modules},
        )
        text = json.dumps(self.meta, sort_keys=True).encode("utf-8")
        self.write("meta", np.frombuffer(text, dtype=np.uint8))
        self._zip.close()
        os.replace(self.out + ".part", self.out)

    def abandon(self) -> None:
        """Leave no half of a file."""
        self._zip.close()
        if os.path.exists(self.out + ".part"):
            os.remove(self.out + ".part")

    # ------------------------------------------------------------------------- watching

    def install(self, patches: _Patches) -> None:
        """Wrap forwards of modules, and the functions that make attention outside known modules."""
        for path, module in self.modules.items():
            if not isinstance(module, torch.jit.ScriptModule):
                patches.set(module, "forward", self._wrapped(path, module, module.forward))
        for owner, name in ((F, "softmax"), (torch, "softmax"), (torch.Tensor, "softmax")):
            patches.set(owner, name, self._softmax(getattr(owner, name)))
        if hasattr(F, "scaled_dot_product_attention"):
            patches.set(F, "scaled_dot_product_attention", self._fused(F.scaled_dot_product_attention))
        if self.tracking is not None:
            self.tracking.install(patches)

    def _wrapped(self, path: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        handler = {"multihead": _multihead, "deformable": _deformable, "slot": _slot, "pool": _pool}.get(
            _kind(path, module)
        )

        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.stack and path == "":
                self._root(args, kwargs)
            if path == "backbone" and args and isinstance(args[0], torch.Tensor) and args[0].dim() == 4:
                self.meta.setdefault("input", [int(side) for side in args[0].shape[-2:]])
            if self.tracking is not None:
                self.tracking.before(path, args, kwargs)
            self.stack.append(path)
            try:
                out = forward(*args, **kwargs)
            finally:
                self.stack.pop()
            with torch.no_grad():
                if handler is not None and not self.busy and self._wanted(path):
                    self.busy = True
                    try:
                        form, arrays, error = handler(module, _bound(module, args, kwargs), out)
                        self._keep(path, form, arrays, error, _precision(out))
                    finally:
                        self.busy = False
                if self.tracking is not None:
                    self.tracking.after(path, args, kwargs, out)
            return out

        return run

    def _wanted(self, path: str) -> bool:
        return self.sites is None or any(fnmatch.fnmatch(path, pattern) for pattern in self.sites)

    def _keep(
        self,
        path: str,
        form: str,
        arrays: dict[str, torch.Tensor] | None,
        error: float | None,
        precision: str = "float32",
    ) -> None:
        """Note one call: ``arrays`` by field (None: ``form`` says why), ``precision`` of the model's output."""
        if arrays is None:
            self.meta["skipped"][path] = form
            return
        number = self.counts.get(path, 0)
        self.counts[path] = number + 1
        key = f"attention/{path}::{number}"
        for field, value in arrays.items():
            floating = value.dtype.is_floating_point
            numbers = value.float().cpu().numpy() if floating else value.cpu().numpy()
            small = floating and field != "locations"
            self.write(key + "::" + field, numbers.astype(self.dtype) if small else numbers)
        kind = type(self.modules[path]).__name__
        call = {"path": path, "call": number, "form": form, "class": kind, "fields": sorted(arrays)}
        self.meta["calls"].append(dict(call, error=error, dtype=precision))

    # ------------------------------------------------------------------------- softmax and fused attention

    def _softmax(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def softmax(*args: Any, **kwargs: Any) -> Any:
            if self.busy or not self.stack:
                return original(*args, **kwargs)
            self.busy = True
            try:
                out = original(*args, **kwargs)
                self._seen(args[0] if args else kwargs["input"], out, args, kwargs)
            finally:
                self.busy = False
            return out

        return softmax

    def _seen(self, scores: torch.Tensor, out: Any, args: Any, kwargs: Any) -> None:
        path = self.stack[-1]
        if isinstance(self.modules[path], nn.Softmax):
            path = path.rpartition(".")[0]
        known = any(_kind(p, self.modules[p]) in ("multihead", "deformable", "slot") for p in self.stack)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if known or not isinstance(out, torch.Tensor) or out.dim() < 3 or dim not in (-1, out.dim() - 1):
            return
        chosen = self.sites is not None and self._wanted(path)
        if not (chosen or (self.sites is None and _kind(path, self.modules[path]) == "softmax")):
            self.meta["skipped"][path] = f"a softmax of shape {tuple(out.shape)}"
            return
        with torch.no_grad():
            arrays = {"weights": _by_head(out, self.modules[path])}
            if bool(torch.isinf(scores).any()):
                arrays["blocked"] = _by_head(torch.isinf(scores), self.modules[path])
            self._keep(path, "dense", arrays, None)

    def _fused(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def scaled_dot_product_attention(
            query: Any,
            key: Any,
            value: Any,
            attn_mask: Any = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            **more: Any,
        ) -> Any:
            out = original(query, key, value, attn_mask, dropout_p, is_causal, **more)
            known = [p for p in self.stack if _kind(p, self.modules[p]) == "multihead"]
            if self.busy or not self.stack or known or query.dim() < 4 or not self._wanted(self.stack[-1]):
                return out
            with torch.no_grad():
                self.busy = True
                try:
                    form, arrays, error = _of_fused(query, key, value, attn_mask, is_causal, more, out)
                    self._keep(self.stack[-1], form, arrays, error, _precision(out))
                finally:
                    self.busy = False
            return out

        return scaled_dot_product_attention

    # ------------------------------------------------------------------------- pictures

    def _root(self, args: Any, kwargs: Any) -> None:
        """The model's own call: how often it ran, and detectron2's list of dictionaries."""
        self.meta["forwards"] += 1
        given = args[0] if args else next(iter(kwargs.values()), None)
        if not (isinstance(given, (list, tuple)) and len(given) == 1 and isinstance(given[0], dict)):
            return
        image = given[0].get("image")
        if image is None or self.meta["media"]:
            return
        clip = isinstance(image, (list, tuple)) or image.dim() == 4
        given_as = torch.stack([torch.as_tensor(one) for one in image]) if clip else torch.as_tensor(image)[None]
        pictures = given_as.detach().float().round().clamp(0, 255).byte().cpu().permute(0, 2, 3, 1).numpy()
        self.meta["media"] = "clip" if clip else "image"
        told: dict[str, Any] = given[0]
        sizes = (("height", pictures.shape[1]), ("width", pictures.shape[2]))
        original = [int(told[name]) if name in told else int(given_size) for name, given_size in sizes]
        self.set_frames(pictures if self.channels == "RGB" else pictures[..., ::-1], original)

    def set_frames(self, pictures: Any, original: list[int] | None) -> None:
        """Pictures (frame, y, x, 3) uint8 RGB as the model was given them; ``original``: size before resizing."""
        if "frames" in self.names:
            return
        self.meta["media"] = self.meta["media"] or "clip"
        size = [int(side) for side in pictures.shape[1:3]]
        self.meta["frames_sha256"] = [
            hashlib.sha256(np.ascontiguousarray(one).tobytes()).hexdigest() for one in pictures
        ]
        self.meta["geometry"] = {"original": original or size, "image": size}
        self.write("frames", pictures)


# ------------------------------------------------------------------------------ which modules attend


def _kind(path: str, module: Any) -> str:
    """multihead, deformable, slot, pool, softmax (a softmax in it is attention), or "" """
    if isinstance(module, nn.MultiheadAttention):
        return "multihead"
    if all(hasattr(module, n) for n in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")):
        return "deformable"
    if all(hasattr(module, n) for n in ("project_q", "project_k", "norm_inputs", "attn_scale", "eps")):
        return "slot"
    if path.rpartition(".")[2] == "activation_proj":
        return "pool"
    name = (type(module).__name__ + " " + path.rpartition(".")[2]).lower()
    own = any(True for _ in module.children()) and not any(
        isinstance(m, nn.MultiheadAttention) for m in module.modules()
    )
    inner = any(hasattr(module, n) for n in ("qkv", "query", "q_proj", "to_q", "to_qkv", "q"))
    return "softmax" if own and inner and ("attention" in name or "attn" in name) else ""


def _bound(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments of a forward by name."""
    signature = inspect.signature(type(module).forward)
    return signature.bind(module, *args, **kwargs).arguments


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest value, as a plain number."""
    found, expected = torch.nan_to_num(found.float()), torch.nan_to_num(expected.float())
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)) if found.numel() else 0.0


def _precision(out: Any) -> str:
    """ "float16" and so on: how exactly a module's output can be compared."""
    first = out[0] if isinstance(out, (tuple, list)) else out
    return str(first.dtype).replace("torch.", "")


def _by_head(weights: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """(batch, head, query, key) from what a softmax gave."""
    if weights.dim() >= 4:
        return weights.reshape((-1, *tuple(weights.shape[-3:])))
    names = ("num_heads", "n_heads", "nhead", "heads", "num_attention_heads")
    heads = next((int(getattr(module, n)) for n in names if isinstance(getattr(module, n, None), int)), 1)
    heads = heads if len(weights) % heads == 0 else 1
    return weights.reshape((-1, heads, *tuple(weights.shape[-2:])))


# ------------------------------------------------------------------------------ the second computation


def _multihead(module: Any, given: dict[str, Any], out: Any) -> Any:
    """softmax(q k' / sqrt(d) + mask) of nn.MultiheadAttention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1)."""
    if module.bias_k is not None or module.add_zero_attn or module.training:
        return "bias_k, add_zero_attn and training mode are not recorded", None, None
    parts = [given["query"].float(), given["key"].float(), given["value"].float()]
    if parts[0].dim() == 2:
        parts = [part.unsqueeze(1) for part in parts]
    elif module.batch_first:
        parts = [part.transpose(0, 1) for part in parts]
    same = module.in_proj_weight is not None
    maps = (
        module.in_proj_weight.chunk(3)
        if same
        else [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    )
    biases = [None] * 3 if module.in_proj_bias is None else module.in_proj_bias.float().chunk(3)
    q, k, v = [
        F.linear(part, map_.float(), bias).unflatten(-1, (module.num_heads, -1)).permute(1, 2, 0, 3)
        for part, map_, bias in zip(parts, maps, biases)  # noqa: B905  # Python 3.8
    ]
    bias = _bias(given.get("attn_mask"), q, k)
    padding = given.get("key_padding_mask")
    if padding is not None:
        bias = bias + _additive(padding)[:, None, None, :]
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias).softmax(-1)
    joined = (weights @ v).permute(2, 0, 1, 3).flatten(2)
    found = F.linear(
        joined,
        module.out_proj.weight.float(),
        None if module.out_proj.bias is None else module.out_proj.bias.float(),
    )
    told = out[0]
    told = told.unsqueeze(1) if told.dim() == 2 else (told.transpose(0, 1) if module.batch_first else told)
    return "dense", _with_blocked(weights, bias), _error(found, told)


def _additive(mask: torch.Tensor) -> torch.Tensor:
    return (
        torch.zeros_like(mask, dtype=torch.float32).masked_fill_(mask, -np.inf)
        if mask.dtype == torch.bool
        else mask.float()
    )


def _bias(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """A mask of (query, key) or (batch * head, query, key) as what is added to (batch, head, query, key)."""
    if mask is None:
        return q.new_zeros(1, 1, q.shape[2], k.shape[2])
    mask = _additive(mask)
    return mask[None, None] if mask.dim() == 2 else mask.reshape((q.shape[0], q.shape[1], *tuple(mask.shape[1:])))


def _with_blocked(weights: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights, and where the model was not allowed to read; one head where all heads are alike."""
    blocked = torch.isinf(bias)
    if not bool(blocked.any()):
        return {"weights": weights}
    if bool((blocked == blocked[:, :1]).all()):
        blocked = blocked[:, :1]
    full = (weights.shape[0], blocked.shape[1], *tuple(weights.shape[2:]))
    return {"weights": torch.nan_to_num(weights), "blocked": blocked.expand(full)}


def _of_fused(query: Any, key: Any, value: Any, mask: Any, causal: bool, more: dict[str, Any], out: Any) -> Any:
    """The same of F.scaled_dot_product_attention."""
    if more.get("enable_gqa") or query.shape[:-2] != key.shape[:-2]:
        return "grouped queries are not recorded", None, None
    q, k, v = [one.float().flatten(0, -4) for one in (query, key, value)]
    scores = q @ k.transpose(-1, -2) * (more.get("scale") or q.shape[-1] ** -0.5)
    bias = torch.zeros_like(scores)
    if causal:
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        bias = bias.masked_fill(later, -np.inf)
    if mask is not None:
        bias = bias + _additive(~mask if mask.dtype == torch.bool else mask)
    weights = (scores + bias).softmax(-1)
    return "dense", _with_blocked(weights, bias), _error(weights @ v, out.flatten(0, -4))


def _deformable(module: Any, given: dict[str, Any], out: Any) -> Any:
    """Weights and points of multi-scale deformable attention (Zhu et al. 2021, arXiv:2010.04159, eq. 3)."""
    names = list(given)
    query, reference, value, shapes = [given[name] for name in names[1:5]]
    hidden = given.get("input_padding_mask")
    heads = module.n_heads
    batch, queries = query.shape[:2]
    levels = shapes.shape[0]
    weights = (
        module.attention_weights(query)
        .view(batch, queries, heads, -1)
        .softmax(-1)
        .view(batch, queries, heads, levels, -1)
    )
    points = weights.shape[-1]
    offsets = module.sampling_offsets(query).view(batch, queries, heads, levels, points, 2)
    centre = reference[:, :, None, :, None, :2]
    if reference.shape[-1] == 2:
        locations = centre + offsets / shapes.flip(-1)[None, None, None, :, None, :].to(offsets)
    else:
        locations = centre + offsets / points * reference[:, :, None, :, None, 2:] * 0.5
    values = module.value_proj(value)
    if hidden is not None:
        values = values.masked_fill(hidden[..., None], 0.0)
    found = _sampled(
        values.view(batch, values.shape[1], heads, -1).float(), shapes, locations.float(), weights.float()
    )
    arrays = {"weights": weights, "locations": locations, "shapes": shapes}
    if hidden is not None and bool(hidden.any()):
        arrays["hidden"] = hidden
    return "deformable", arrays, _error(module.output_proj(found.to(value.dtype)), out)


def _sampled(
    values: torch.Tensor, shapes: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Sum over levels and points of weight times the bilinear value at its location, (batch, query, channel)."""
    batch, queries, heads, _, points = weights.shape
    total, start = values.new_zeros(()), 0
    for level, (rows, columns) in enumerate(shapes.tolist()):
        cells = values[:, start : start + rows * columns].permute(0, 2, 3, 1).flatten(0, 1)
        start += rows * columns
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        picked = F.grid_sample(cells.unflatten(-1, (rows, columns)), grid, align_corners=False)
        total = total + picked * weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
    return total.sum(-1).view(batch, -1, queries).transpose(1, 2)


def _slot(module: Any, given: dict[str, Any], out: Any) -> Any:
    """Slot attention (Locatello et al. 2020, arXiv:2006.15055): softmax over slots, renormalised over inputs."""
    names = list(given)
    inputs, told, slots = [given[name] for name in names[1:4]]
    keys = module.project_k(module.norm_inputs(told))
    scores = module.attn_scale * torch.einsum("bnc,bmc->bnm", keys, module.project_q(slots))
    over_slots = scores.softmax(-1)
    weights = over_slots + module.eps
    weights = weights / weights.sum(1, keepdim=True)
    found = torch.einsum("bnm,bnc->mbc", weights, inputs)
    return "slot", {"softmax": over_slots, "weights": weights}, _error(found, out)


def _pool(module: Any, given: dict[str, Any], out: Any) -> Any:
    """Softmax over frames of the refiner's importance scores, (layer, batch, frame, instance, 1)."""
    if out.dim() != 5 or out.shape[-1] != 1:
        return "not (layer, batch, frame, instance, 1)", None, None
    return "pool", {"weights": out.softmax(2)}, None


# ------------------------------------------------------------------------------ DVIS-DAQ


def _is_daq(model: nn.Module) -> bool:
    tracker = getattr(model, "tracker", None)
    return tracker is not None and hasattr(tracker, "last_seq_ids") and hasattr(tracker, "video_ins_hub")


class _Tracking:
    """Which row was which track: read from the tracker's own memory before and after every frame."""

    def __init__(self, recorder: _Recorder) -> None:
        self.to = recorder
        self.model = cast("Any", recorder.model)
        self.tracker = self.model.tracker
        self.frames: list[dict[str, Any]] = []
        self.tracks: dict[int, dict[str, Any]] = {}
        self.open: dict[str, Any] | None = None
        self.answer: dict[str, Any] = {}
        self.last = f"tracker.transformer_ffn_layers.{self.tracker.num_layers - 1}"

    def install(self, patches: _Patches) -> None:
        """Wrap the methods that are called without ``forward``."""
        tell = self._telling
        patches.set(self.tracker, "inference", tell(self.tracker.inference, self._tracked))
        patches.set(
            self.model, "run_window_inference", tell(self.model.run_window_inference, self._answered, self._begin)
        )
        if hasattr(self.model, "common_inference"):
            patches.set(self.model, "common_inference", tell(self.model.common_inference, self._gathered))

    @staticmethod
    def _telling(method: Callable[..., Any], done: Callable[[Any], None], start: Any = None) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if start is not None:
                start(args, kwargs)
            out = method(*args, **kwargs)
            with torch.no_grad():
                done(out)
            return out

        return run

    def _begin(self, args: Any, kwargs: Any) -> None:
        images = args[0] if args else kwargs["images_tensor"]
        meta = self.to.meta
        meta["forwards"] = max(meta["forwards"], 1)
        meta["input"] = [int(side) for side in images.shape[-2:]]
        meta["media"] = "clip"
        if "frames" not in self.to.names:  # called below ``forward``: undo the normalisation
            pictures = images.float() * self.model.pixel_std + self.model.pixel_mean
            pictures = pictures.round().clamp(0, 255).byte().cpu().permute(0, 2, 3, 1).numpy()
            self.to.set_frames(pictures if self.to.channels == "RGB" else pictures[..., ::-1], None)

    def before(self, path: str, args: Any, kwargs: Any) -> None:
        """A frame begins at the tracker's first attention."""
        if path == "tracker.transformer_cross_attention_layers.0":
            self._finish()
            rows = (args[0] if args else kwargs["tgt"]).shape[0]
            ids = [int(i) for i in self.tracker.last_seq_ids or []]
            self.open = {"ids": ids, "rows": rows, "logits": []}

    def after(self, path: str, args: Any, kwargs: Any, out: Any) -> None:
        """Keep what later decisions are read off."""
        if path == "sem_seg_head":
            number = self.to.counts.get("sem_seg_head", 0)
            self.to.counts["sem_seg_head"] = number + 1
            self.to.write(f"segmenter/logits::{number}", out["pred_logits"][0])
            self.to.write(f"segmenter/embeds::{number}", out["pred_embds"][0].permute(1, 2, 0))
            self.answer.setdefault("segmenter", []).append(out["pred_embds"][0].permute(1, 2, 0).cpu().clone())
        elif path == self.last and self.open is not None:
            self.open.setdefault("states", out[:, 0].detach().clone())
        elif path == "tracker.class_embed" and self.open is not None:
            self.open["logits"].append(out[-1, 0].detach())
        elif path == "refiner":
            entered = list(args) + list(kwargs.values())
            self.answer["embeds"] = entered[0][0].permute(2, 1, 0).cpu()  # (instance, frame, channel)
            self.to.write("refiner/padding", entered[1][0])
            self.to.write("refiner/embeds", out["pred_embds"][0].permute(2, 1, 0))

    def _tracked(self, out: Any) -> None:
        """The tracker has read its frames: the last one is over, and tracks may be looked at."""
        self._finish()
        for track, one in self.tracker.video_ins_hub.items():
            appearance = [bool(seen) for seen in one.appearance]
            self.tracks[int(track)] = {"start": int(one.sT), "appearance": appearance, "dead": bool(one.dead)}

    def _finish(self) -> None:
        """Decisions about the frame that was open: they are in the tracker's memory now."""
        frame, self.open = self.open, None
        if frame is None:
            return
        now = [int(i) for i in self.tracker.last_seq_ids or []]
        hub, carried, rows = self.tracker.video_ins_hub, frame["ids"], frame["rows"]
        valid = [i in now and bool(hub[i].appearance[-1]) for i in carried] + [False] * (rows - len(carried))
        births, row = [], len(carried)
        for track in now:
            if track in carried:
                continue
            while row < rows and not torch.equal(frame["states"][row], hub[track].embeds[-1]):
                row += 1
            if row == rows:
                raise RuntimeError(
                    f"foveate_export: track {track} began in no row: this tracker is not DVIS-DAQ's"
                )
            births.append([row, track])
            valid[row] = True
            row += 1
        number = len(self.frames)
        self.to.write(f"tracker/logits::{number}", frame["logits"][0])
        scores = frame["logits"][0].new_zeros(0)
        if len(frame["logits"]) > 1:
            scores = frame["logits"][1][: len(carried)].softmax(-1)[:, :-1].amax(-1)
        self.to.write(f"tracker/slot_scores::{number}", scores)
        deaths = [track for track in carried if track not in now]
        self.frames.append({"ids": carried, "rows": rows, "valid": valid, "births": births, "deaths": deaths})

    def _gathered(self, common: Any) -> None:
        """What goes into the refiner, and in which order."""
        self.answer["ids"] = [int(i) for i in common["seq_id_list"]]
        self.to.write("online/logits", common["online_out"]["pred_logits"][0])
        self.to.write("online/masks", common["online_out"]["pred_masks"][0])

    def _answered(self, out: Any) -> None:
        """The answer before it is turned into masks of the original pictures."""
        if not len(out["pred_logits"]):
            self.answer["final"] = []
            return
        self.answer["final"] = [int(i) for i in out["pred_ids"][0]]
        self.to.write("final/logits", out["pred_logits"][0])
        self.to.write("final/masks", out["pred_masks"][0])
        if "full_logits" in out:
            self.to.write("online/frame_logits", out["full_logits"][0])
            self.to.write("online/padding", out["padding_masks"][0])

    def close(self) -> dict[str, Any]:
        """Everything that is no array: tracks in the order of their birth, rows, order of the answers, rules."""
        born = [track for frame in self.frames for _, track in frame["births"]]
        order = {track: number for number, track in enumerate(born)}
        answer = self.answer
        instances = answer.get("ids", answer.get("final", []))
        chains = {}
        if "embeds" in answer:
            seen = torch.cat(answer["segmenter"])
            for i, track in enumerate(instances):
                if track not in order:
                    chains[i] = [
                        int((answer["embeds"][i, t] - seen[t]).abs().sum(-1).argmin()) for t in range(len(seen))
                    ]
        return {
            "tracks": [dict(self.tracks[track], id=number) for track, number in order.items()],
            "frames": [self._numbered(frame, order) for frame in self.frames],
            "instances": [order.get(track, -1) for track in instances],
            "answered": bool(answer.get("final")),
            "chains": chains,
            "config": _config(self.model),
        }

    @staticmethod
    def _numbered(frame: dict[str, Any], order: dict[int, int]) -> dict[str, Any]:
        """A frame with tracks by their number: the original's are random."""
        births = [[row, order[track]] for row, track in frame["births"]]
        deaths, ids = [order[i] for i in frame["deaths"]], [order[i] for i in frame["ids"]]
        return dict(frame, ids=ids, births=births, deaths=deaths)


def _config(model: Any) -> Any:
    """Sizes and rules in force, by the names that foveate reads."""
    head, tracker, refiner = model.sem_seg_head, model.tracker, getattr(model, "refiner", None)
    predictor, encoder = head.predictor, head.pixel_decoder.transformer.encoder
    numbers = {
        "num_classes": head.num_classes,
        "num_queries": predictor.query_feat.num_embeddings,
        "hidden_dim": tracker.hidden_dim,
        "conv_dim": tracker.hidden_dim,
        "mask_dim": tracker.hidden_dim,
        "nheads": tracker.num_heads,
        "encoder_layers": len(encoder.layers),
        "decoder_layers": len(predictor.transformer_cross_attention_layers),
        "segmenter_window": 5,
        "size_divisibility": model.size_divisibility,
        "max_num": model.max_num,
        "aux_inference_select_thr": model.aux_inference_select_thr,
        "noise_frame_num": model.noise_frame_num,
    }
    names = (
        "num_new_ins",
        "num_slots",
        "inference_select_thr",
        "keep_threshold",
        "kick_out_frame_num",
        "ovis_infer",
    )
    numbers["tracker"] = dict({n: getattr(tracker, n) for n in names}, layers=tracker.num_layers)
    numbers["pixel_mean"] = model.pixel_mean.flatten().tolist()
    numbers["pixel_std"] = model.pixel_std.flatten().tolist()
    if refiner is not None:
        own = {"layers": refiner.num_layers, "use_local_attn": bool(refiner.use_local_attn)}
        numbers["refiner"] = dict(own, offline_topk_ins=model.offline_topk_ins)
    return json.loads(json.dumps(numbers, default=float))


def _labels(model: nn.Module) -> list[str]:
    """Class names that detectron2's metadata holds, if any."""
    names = getattr(getattr(model, "metadata", None), "thing_classes", None)
    return [str(name) for name in names or []]


def _hash(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of parameters and buffers."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            raw = value.detach().cpu().contiguous()
            total.update(f"{name} {raw.dtype} {tuple(raw.shape)}".encode())
            total.update((raw.float() if raw.dtype == torch.bfloat16 else raw).numpy().tobytes())
    return total.hexdigest()
