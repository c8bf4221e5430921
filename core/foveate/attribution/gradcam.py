"""Grad-CAM where it belongs in a transformer: on the tokens that enter the last attention.

Channels are the embedding dimensions and places are the patch tokens, laid out by the source's own labels.
Generic tools read axis 1 of ``(sample, token, channel)`` as channels and return a map over features
(Captum's LayerGradCam does, without an error). The tokens are read by forward pre-hooks on the modules
that the source declares for its sites; the hooks exist for one forward pass and go whatever happens.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from foveate.attribution.clips import frame_count
from foveate.attribution.levels import patches_by_level, tokens_on_cells
from foveate.attribution.objective import Objective
from foveate.attribution.pixels import Cost
from foveate.attribution.readout_rows import places_of
from foveate.capture.streams import stream_tokens
from foveate.errors import CaptureError, UsageError
from foveate.geometry import CellGrid, tokens_to_cells
from foveate.interfaces import AttentionStep, Attribution, AttributionMap, CallKey, CallLabels, TokenAxis

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.interfaces import AttentionSource, Batch, BoundTarget

KEY_ARGUMENTS = ("value", "key", "key_states", "key_value_states", "encoder_hidden_states", "hidden_states")
"""Names under which attention modules take the tokens they read from, most telling first.

Where key and value differ the key is the value with positions added: the gradient at the value is the whole, that
at the key alone sums to 0 over tokens, since softmax does not see what all keys share.
"""

Entries = dict[tuple[str, int], list[tuple[torch.nn.Module, Mapping[str, Any]]]]
"""(site, layer) -> for each call, the owning module and its arguments by name."""


@dataclass(frozen=True)
class TokenGradients(Attribution):
    """A map from the tokens that enter the last attention and the score's gradient there.

    Of a detector, these are the encoder's output, which every decoder layer reads. ``relu`` False keeps
    evidence against the target.
    """

    relu: bool = True
    rows: int | None = None

    @abstractmethod
    def weigh(self, activations: torch.Tensor, gradients: torch.Tensor, tokens: TokenAxis) -> torch.Tensor:
        """One signed number a token, ``(target, token)``, from two tensors ``(target, token, channel)``."""

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """One forward and one backward pass.

        Raises UsageError where the tokens of the last attention are not grids of patches a sample
        (windows), CaptureError where they were not seen or carry no gradient.
        """
        objective = Objective(source, batch, bound, rows=self.rows)
        cells, parts, call = source.cells(batch), [], None
        for block in objective.blocks():
            activations, gradients, tokens, call = tokens_and_gradients(block)
            weighed = self.weigh(activations, gradients, tokens)
            parts.append(lay(weighed, tokens, cells, relu=self.relu, frames=frame_count(block.frames) or None))
        grid = parts[0][1]
        info = {
            "citation": self.citation,
            "relu": self.relu,
            "scale": bound.scale,
            "seed": seed,
            "activations": f"tokens entering {call.site}, layer {call.layer}" if call else "",
            "forward_passes": 1,
            "backward_passes": 1,
            **({"frame_cells": objective.frames} if objective.frames else {}),
        }
        values = np.concatenate([part for part, _ in parts])
        return AttributionMap(self.name, values, grid, signed=not self.relu, info=info)

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """One forward and one backward pass."""
        return Cost(1, 1)


@dataclass(frozen=True)
class GradCam(TokenGradients):
    """ReLU of the channel-weighted sum of activations; weights are the gradient's mean over the patches.

    The levels of a pyramid are feature maps of their own: each has its own weights. All frames of a clip share
    them, as in a network of three-dimensional convolutions.
    """

    name: ClassVar[str] = "gradcam"
    citation: ClassVar[str] = "Selvaraju et al. 2017, arXiv:1610.02391, eq. 1 and 2, on patch tokens"

    def weigh(self, activations: torch.Tensor, gradients: torch.Tensor, tokens: TokenAxis) -> torch.Tensor:
        """Equation 2 before its ReLU, with the weights of equation 1."""
        values = activations.new_zeros(activations.shape[:2])
        for level in patches_by_level(tokens):
            patches = torch.as_tensor(level, device=activations.device)
            weights = gradients[:, patches].mean(1, keepdim=True)  # (target, 1, channel)
            values[:, patches] = (weights * activations[:, patches]).sum(-1)
        return values


def lay(
    values: torch.Tensor, tokens: TokenAxis, cells: CellGrid, *, relu: bool, frames: int | None = None
) -> tuple[NDArray[np.float32], CellGrid]:
    """Signed numbers a token as a map: one grid stays as it is, the levels of a pyramid add up on ``cells``.

    Of a clip with ``frames`` frame cells, the tokens of each lie on ``cells``: ``(target, frame, y, x)``.
    """
    array = values.detach().double().cpu().numpy()
    if frames is not None or len(patches_by_level(tokens)) > 1:
        laid = _on_cells(array, tokens, cells, frames)
        return (np.maximum(laid, 0.0) if relu else laid).astype(np.float32), cells
    laid, grid = tokens_to_cells(array, tokens)
    return (np.maximum(laid, 0.0) if relu else laid).astype(np.float32), grid


def _on_cells(
    array: NDArray[np.float64], tokens: TokenAxis, cells: CellGrid, frames: int | None
) -> NDArray[np.float64]:
    try:
        return tokens_on_cells(array, tokens, cells, frames=frames)
    except ValueError as error:
        raise UsageError(
            f"gradcam: {error}", remedy="use a gradient or perturbation method for this model"
        ) from error


def tokens_and_gradients(block: Objective) -> tuple[torch.Tensor, torch.Tensor, TokenAxis, CallKey]:
    """Tokens entering the last attention that reads patches, their gradients, labels and (last) call.

    ``(target, token, channel)`` both. Where a layer attends within frames, in one call or in several, the
    tokens of all frames follow each other.
    """
    source = block.source
    batch = block.batch.replace(block.inputs.clone().requires_grad_(), block.index)
    with torch.enable_grad():
        with watched(source) as entries:
            outputs = source.forward(batch, grad=True)
        scores = source.score(outputs, batch, block.bound)
        calls = last_patch_reading(source, batch, outputs)
        entered = [
            _entering(entries, call, math.prod(size for _, size in labels.leading), len(labels.key))
            for call, labels in calls.items()
        ]
        slopes = torch.autograd.grad(scores.sum(), entered, allow_unused=True)
    last = next(reversed(calls))
    if all(slope is None for slope in slopes):
        raise CaptureError(f"gradcam: the score does not depend on the tokens entering {last.site}[{last.layer}]")
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(entered, slopes, strict=True)]
    both = (
        [_batch_first(entries, call, one) for call, one in zip(calls, parts, strict=True)]
        for parts in (entered, gradients)
    )
    activations, weights = (_over_frames(parts, list(calls.values())) for parts in both)
    return activations, weights, stream_tokens(next(iter(calls.values()))), last


def _over_frames(parts: Sequence[torch.Tensor], labels: Sequence[CallLabels]) -> torch.Tensor:
    """``(sample, token, channel)`` from the calls of a layer, the tokens frame after frame where calls have
    frames."""
    if [name for name, _ in labels[0].leading] == ["sample"] and not labels[0].partial:
        return parts[-1].detach()
    whole = [dict(labels[0].leading).get(name, 1) for name in ("sample", "frame")]
    samples, frames = (
        labels[0].at[name].size if name in labels[0].at else size
        for name, size in zip(("sample", "frame"), whole, strict=True)
    )
    joined = parts[0].new_zeros(samples, frames, len(labels[0].key_axis), parts[0].shape[-1])
    for part, one in zip(parts, labels, strict=True):
        tokens = range(len(one.key)) if one.key_place is None else one.key_place.index
        for values, (sample, frame) in zip(part.detach(), places_of(one), strict=True):
            joined[sample, max(frame, 0), list(tokens)] = values
    return joined.flatten(1, 2)


def last_patch_reading(source: AttentionSource, batch: Batch, outputs: Any) -> dict[CallKey, CallLabels]:
    """The last layer of the flow whose keys are patches of whole samples or of their frames: its calls, in order.

    Of a layer that sees whole samples and runs more than once, the last call. Raises UsageError where keys are
    within windows or tracks, or no attention reads patches.
    """
    found: dict[CallKey, CallLabels] = {}
    for step in reversed(source.flow(batch, outputs)):
        if not isinstance(step, AttentionStep) or (found and step.call[:2] != next(iter(found))[:2]):
            continue
        labels = source.label(step.call, batch, outputs)
        if not labels.key.where("patch").size:
            continue
        if not {name for name, _ in labels.leading} <= {"sample", "frame"}:
            raise UsageError(
                f"gradcam: {step.call.site} attends within {', '.join(name for name, _ in labels.leading)}; "
                "its tokens are not one grid a sample",
                remedy="use a gradient or perturbation method for this model",
            )
        found[step.call] = labels
        if not labels.partial:
            return found
    if not found:
        raise UsageError("gradcam: no attention of this model reads patches")
    return dict(reversed(found.items()))


@contextmanager
def watched(source: AttentionSource) -> Iterator[Entries]:
    """Collect what enters the modules of the source's sites; nothing stays on the model afterwards."""
    entries: Entries = {}
    handles = []
    try:
        for site in source.sites:
            for path, layer in site.modules.items():
                module = source.module.get_submodule(path.partition("#")[0])
                hook = _note(entries.setdefault((site.id, layer), []))
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield entries
    finally:
        for handle in handles:
            handle.remove()


def _note(calls: list[tuple[torch.nn.Module, Mapping[str, Any]]]) -> Any:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        calls.append((module, dict(bound.arguments)))

    return hook


def _entering(entries: Entries, call: CallKey, samples: int, tokens: int) -> torch.Tensor:
    """The tensor of tokens among a call's arguments, ``(sample, token, channel)`` or token first."""
    calls = entries.get((call.site, call.layer), [])
    if call.number >= len(calls):
        raise CaptureError(
            f"gradcam: {call.site}[{call.layer}] ran {len(calls)} times, call {call.number} is missing"
        )
    module, arguments = calls[call.number]
    named = [arguments[name] for name in KEY_ARGUMENTS if name in arguments]
    wanted = (samples, tokens) if _is_batch_first(module) else (tokens, samples)
    for value in (*named, *arguments.values()):
        if isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[:2] == wanted:
            if not value.requires_grad:
                raise CaptureError(f"gradcam: the tokens entering {call.site}[{call.layer}] carry no gradient")
            return value
    shapes = {name: tuple(v.shape) for name, v in arguments.items() if isinstance(v, torch.Tensor)}
    raise CaptureError(
        f"gradcam: {type(module).__name__} of {call.site}[{call.layer}] takes no tokens of shape "
        f"({wanted[0]}, {wanted[1]}, channel); it got {shapes}"
    )


def _batch_first(entries: Entries, call: CallKey, values: torch.Tensor) -> torch.Tensor:
    """Tokens of a call with the sample axis first."""
    module, _ = entries[call.site, call.layer][call.number]
    return values if _is_batch_first(module) else values.transpose(0, 1)


def _is_batch_first(module: torch.nn.Module) -> bool:
    """``nn.MultiheadAttention`` may take tokens first; everything else takes samples first."""
    return not isinstance(module, torch.nn.MultiheadAttention) or bool(module.batch_first)
