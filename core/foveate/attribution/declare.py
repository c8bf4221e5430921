"""What this package offers, declared by import string. Imports nothing heavy.

Names without suffix keep the sign of the evidence; ``_abs`` pools absolute values. Both are declared
because the choice can turn a ranking of methods round.
"""

from __future__ import annotations

from collections.abc import Iterable

from foveate.plugins.hooks import hookimpl
from foveate.plugins.specs import AttributionSpec

FOVEATE_API = (1, 0)

_GRADIENTS = {
    "saliency": ("Saliency", "gradient at the input"),
    "inputxgrad": ("InputXGradient", "input times gradient"),
    "ig": ("IntegratedGradients", "integrated gradients from a baseline"),
    "gradshap": ("GradientShap", "expected gradients between a baseline and the noisy input"),
    "smoothgrad": ("SmoothGrad", "mean gradient over noisy copies"),
    "smoothig": ("SmoothIG", "integrated gradients averaged over noisy copies"),
}
_PERTURBATION = {
    "ablation": ("FeatureAblation", "drop of the score without one patch", ()),
    "occlusion": ("Occlusion", "mean drop of the score under sliding windows of patches", ()),
    "kernelshap": ("KernelShap", "Shapley values of patches by regression", ("sklearn",)),
    "lime": ("Lime", "sparse local surrogate over patches", ("sklearn",)),
}
_ATTENTION = {
    "readout": ("ReadoutAttention", "the attention row that the answer is read from", frozenset()),
    "rollout": ("Rollout", "attention followed through all layers", frozenset()),
    "grad_attention": ("GradAttention", "attention times its gradient, last layer", frozenset({"gradients"})),
    "chefer_iccv21": ("CheferICCV21", "gradient-weighted attention through all layers", frozenset({"gradients"})),
    "legrad": (
        "LeGrad",
        "positive attention gradients of the score, mean over layers",
        frozenset({"gradients"}),
    ),
}
_REFERENCE = {
    "uniform": ("Uniform", "control: every cell alike"),
    "random": ("Random", "control: a random order"),
    "centre": ("Centre", "control: a Gaussian at the centre"),
    "edge": ("Edge", "control: edge strength"),
    "saturation": ("Saturation", "control: colourfulness"),
}
_CLIPS = {
    "motion": ("Motion", "control of clips: difference to the neighbouring frames"),
    "one_frame": ("OneFrame", "control of clips: a single moment"),
}
_OBJECTS = {
    "drise": (
        "foveate.attribution.drise:DRise",
        "what must be visible to find the object",
        "perturbation",
    ),
    "own_box": ("foveate.attribution.objects:OwnBox", "control: the object's predicted box", "reference"),
    "own_mask": ("foveate.attribution.objects:OwnMask", "control: the object's predicted mask", "reference"),
}


@hookimpl
def foveate_attributions() -> Iterable[AttributionSpec]:
    """All methods that need no argument; ``untrained`` and ``oracle`` in ``reference`` need one."""
    families = (_gradient_specs, _perturbation_specs, _attention_specs, _reference_specs, _object_specs)
    return [spec for family in families for spec in family()]


def _gradient_specs() -> Iterable[AttributionSpec]:
    gradients = frozenset({"gradients"})
    by_captum = gradients | {"captum"}
    for name, (target, summary) in _GRADIENTS.items():
        module = "foveate.attribution.gradients"
        yield AttributionSpec(name, f"{module}:{target}", f"{summary}, signed", capabilities=by_captum)
        yield AttributionSpec(
            f"{name}_abs", f"{module}:{target}Abs", f"{summary}, absolute", capabilities=by_captum
        )
    yield AttributionSpec(
        "gradcam",
        "foveate.attribution.gradcam:GradCam",
        "Grad-CAM on the tokens entering the last attention",
        capabilities=gradients,
    )
    yield AttributionSpec(
        "odam",
        "foveate.attribution.odam:Odam",
        "gradient times activation of the tokens entering the last attention",
        capabilities=gradients,
    )


def _perturbation_specs() -> Iterable[AttributionSpec]:
    for name, (target, summary, requires) in _PERTURBATION.items():
        yield AttributionSpec(
            name,
            f"foveate.attribution.perturbation:{target}",
            summary,
            requires=requires,
            remedy='pip install "foveate[lime]"' if requires else "",
            capabilities=frozenset({"perturbation", "captum"}),
        )


def _attention_specs() -> Iterable[AttributionSpec]:
    for name, (target, summary, needs) in _ATTENTION.items():
        yield AttributionSpec(
            name, f"foveate.attribution.attention:{target}", summary, capabilities=needs | {"attention"}
        )
    yield AttributionSpec(
        "chefer_cvpr21",
        "foveate.attribution.chefer_cvpr21:CheferCVPR21",
        "gradient-weighted relevance of attention by layer-wise propagation, plain ViTs",
        capabilities=frozenset({"gradients", "attention"}),
    )
    yield AttributionSpec(
        "legrad_layers",
        "foveate.attribution.legrad_layers:LeGradLayers",
        "LeGrad as published, each layer scored by the final head, plain ViTs",
        capabilities=frozenset({"gradients", "attention"}),
    )


def _reference_specs() -> Iterable[AttributionSpec]:
    for module, controls in (("reference", _REFERENCE), ("reference_clips", _CLIPS)):
        for name, (target, summary) in controls.items():
            place = f"foveate.attribution.{module}:{target}"
            yield AttributionSpec(name, place, summary, capabilities=frozenset({"reference"}))


def _object_specs() -> Iterable[AttributionSpec]:
    for name, (target, summary, capability) in _OBJECTS.items():
        yield AttributionSpec(name, target, summary, capabilities=frozenset({capability, "objects"}))
