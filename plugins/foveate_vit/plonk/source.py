"""PLONK as an attention source: its image encoder's attention, explained by where it places the photo.

The flow network has no attention, so the sites are the encoder's (StreetCLIP's 24 layers). Targets, all
differentiable down to the pixels:

- ``cosine``: mean cosine of the sampled places to the bound location;
- ``geodesic``: minus their mean great-circle distance to it, km (rounded off below 1 km);
- ``log_likelihood``: log density of the bound location, nats per steradian.

The noise that sampling starts from is drawn once from ``seed``, the same for every photo, and frozen in the
bound target. The bound location is the medoid of the sampled places, unless ``label`` says otherwise:
``"48.86, 2.35"`` (degrees), or ``"true"`` for the manifest's columns ``latitude`` and ``longitude``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foveate.errors import ModelError, UsageError
from foveate.interfaces import Batch, BoundTarget, Prediction, Sample, Target, TargetRow
from foveate_vit import weights as files
from foveate_vit.choices import one_kind
from foveate_vit.loading import Loaded, load_model, read_side_file, torch_dtype
from foveate_vit.plonk import upstream
from foveate_vit.plonk.flow import endpoints, log_likelihood
from foveate_vit.plonk.network import VelocityNetwork, network_fields
from foveate_vit.plonk.sphere import medoid, resultant_length, softened_km, to_degrees, to_unit
from foveate_vit.vision import VisionSource, adapter_of

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("auto", "direct", "diff-plonk")
STREETCLIP_LICENCE = "the encoder StreetCLIP is CC-BY-NC-4.0"


class Geolocator(nn.Module):
    """The two parts under one root; its own call is the encoder's, as the network only reads its output."""

    def __init__(self, encoder: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.vision_model = encoder
        self.network = network

    def forward(self, **inputs: Any) -> Any:
        """The encoder's output."""
        return self.vision_model(**inputs)


@dataclass(frozen=True)
class EncoderRow:
    """What :func:`~foveate_vit.loading.load_model` needs to know of the encoder."""

    id: str
    family: Any
    revision: str = ""
    licence: str = "unverified"


class PlonkSource(VisionSource):
    """PLONK with its encoder.

    Options of :meth:`open`: ``encoder`` (hub id or folder; default StreetCLIP), ``backend`` ("auto" takes
    the authors' network where diff-plonk is installed, "direct" foveate's own, "diff-plonk" insists),
    ``samples`` (places drawn a photo), ``steps`` (of the sampler), ``likelihood_steps``, ``seed``, and for
    random weights ``config`` (encoder) and ``network_config``.
    """

    targets = ("cosine", "geodesic", "log_likelihood")

    def __init__(
        self,
        loaded: Loaded,
        family: Any,
        *,
        samples: int = 16,
        steps: int = 32,
        likelihood_steps: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(loaded, family)
        if samples < 2:
            raise UsageError(
                f"plonk: samples={samples}: one draw is its own predicted place, so the cosine has zero gradient",
                remedy="at least 2, by default 16",
            )
        self.targets = type(self).targets
        self.steps, self.likelihood_steps = steps, likelihood_steps
        self.noise = torch.randn(samples, 3, generator=torch.Generator().manual_seed(seed))

    @classmethod
    def open(  # type: ignore[override]
        cls,
        row: Any,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        encoder: Path | str = "geolocal/StreetCLIP",
        backend: str = "auto",
        config: Mapping[str, Any] | Path | str | None = None,
        network_config: Mapping[str, Any] | None = None,
        samples: int = 16,
        steps: int = 32,
        likelihood_steps: int = 32,
        seed: int = 0,
    ) -> PlonkSource:
        """Open a registry row; see the class. Raises ModelError, UsageError, MissingDependencyError."""
        build, used = _backend(backend)
        place = str(weights or getattr(row, "weights", None) or row.id)
        random = place == "random"
        eye = load_model(
            EncoderRow(str(encoder), row.family),
            adapter=adapter_of(cls),
            weights="random" if random else encoder,
            device=device,
            dtype=dtype,
            architecture="CLIPVisionModel",
            config=config,
            seed=seed,
        )
        network, digest = _open_network(build, place, row, network_config, seed)
        network.to(device=device, dtype=torch_dtype(dtype)).eval().requires_grad_(False)
        loaded = replace(
            eye, model=Geolocator(eye.model, network).eval(), card=_card(row, eye, place, used, digest)
        )
        return cls(loaded, row.family, samples=samples, steps=steps, likelihood_steps=likelihood_steps, seed=seed)

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """As :meth:`VisionSource.encode`; ``per_sample["location"]``: true unit vectors, NaN where unknown."""
        batch = super().encode(samples)
        degrees = torch.tensor([_true_degrees(sample) for sample in samples]).view(-1, 2)
        return replace(batch, per_sample={"location": to_unit(degrees).to(batch.inputs.device)})

    def embedding(self, outputs: Any) -> Tensor:
        """The class token before the encoder's last normalisation, ``(sample, channel)``: PLONK's condition."""
        found: Tensor = outputs.last_hidden_state[:, 0]
        return found

    def places(self, outputs: Any, noise: Tensor | None = None) -> Tensor:
        """Sampled places, unit vectors ``(sample, draw, 3)``; ``noise`` is ``(sample, draw, 3)``."""
        embedding = self.embedding(outputs)
        start = self.noise.expand(len(embedding), -1, -1) if noise is None else noise
        return self._places_of(embedding, start.to(embedding))

    def predictions(self, outputs: Any, batch: Batch) -> list[list[Prediction]]:
        """One place a photo, the medoid of the draws; its score is how far the draws agree (0 to 1)."""
        with torch.no_grad():
            places = self.places(outputs).float()
        degrees, score = to_degrees(medoid(places)), resultant_length(places)
        return [[_prediction(d, s)] for d, s in zip(degrees.tolist(), score.tolist(), strict=True)]

    def bind(self, outputs: Any, batch: Batch, target: Target) -> BoundTarget:
        """Freeze noise and location; ``label`` may give the location (see the module docstring)."""
        kind = self._kind(target)
        location = self._location(outputs, batch, target.label)
        names = [f"{lat:.3f}, {lon:.3f}" for lat, lon in to_degrees(location).tolist()]
        rows = tuple(TargetRow(i, kind, label=name) for i, name in enumerate(names))
        noise = self.noise.to(location).expand(len(rows), -1, -1)
        return BoundTarget(rows, "value", {"location": location, "noise": noise})

    def score(self, outputs: Any, batch: Batch, bound: BoundTarget) -> Tensor:
        """Cosine, minus kilometres, or nats per steradian: float32 ``(target,)``, one scale only."""
        chosen = [row.sample for row in bound.rows]
        embedding = self.embedding(outputs)[chosen]
        location = bound.context["location"].to(embedding)
        if one_kind(bound) == "log_likelihood":
            return log_likelihood(
                self._module.network,
                embedding,
                location,
                steps=self.likelihood_steps,
            ).float()
        places = self._places_of(embedding, bound.context["noise"].to(embedding))
        if one_kind(bound) == "geodesic":
            return -softened_km(places, location[:, None]).mean(1).float()
        return (places * location[:, None]).sum(-1).mean(1).float()

    def facts(self) -> Mapping[str, Any]:
        """As :meth:`VisionSource.facts` of the encoder, with the sampler's settings."""
        return {
            **super().facts(),
            "architecture": f"{type(self.tower).__name__} + {type(self._module.network).__name__}",
            "samples": len(self.noise),
            "steps": self.steps,
            "likelihood_steps": self.likelihood_steps,
        }

    def _places_of(self, embedding: Tensor, noise: Tensor) -> Tensor:
        rows = embedding.repeat_interleave(noise.shape[1], dim=0)
        ends = endpoints(self._module.network, rows, noise.reshape(-1, 3), steps=self.steps)
        return ends.view(len(embedding), -1, 3)

    def _remedy(self, kind: str) -> str:
        return f"one of {', '.join(self.targets)}"

    def _location(self, outputs: Any, batch: Batch, label: str | int | None) -> Tensor:
        if label is None:
            with torch.no_grad():
                return medoid(self.places(outputs).float()).detach()
        if label == "true":
            return self._true_location(batch)
        return to_unit(_parse_degrees(label)).to(batch.inputs.device).expand(len(batch), 3)

    def _true_location(self, batch: Batch) -> Tensor:
        known = batch.per_sample["location"]
        unknown = [name for name, point in zip(batch.ids, known, strict=True) if not bool(point.isfinite().all())]
        if unknown:
            raise UsageError(
                f"plonk: no true location for sample {unknown[0]!r} ({len(unknown)} of {len(batch)})",
                remedy="give a manifest with columns latitude and longitude, in degrees",
            )
        return known


# ------------------------------------------------------------------------------- opening


def _backend(backend: str) -> tuple[type[nn.Module], str]:
    """The network class and which backend it is."""
    if backend not in BACKENDS:
        raise UsageError(f"plonk: backend {backend!r}", remedy=f"one of {', '.join(BACKENDS)}")
    if backend == "diff-plonk" or (backend == "auto" and upstream.is_available()):
        return upstream.network_class(), "diff-plonk"
    return VelocityNetwork, "direct"


def _open_network(
    build: type[nn.Module], place: str, row: Any, config: Mapping[str, Any] | None, seed: int
) -> tuple[nn.Module, str]:
    """The flow network and the hash of its weights."""
    if place == "random":
        if config is None:
            raise ModelError("plonk: random weights need network_config", remedy="input_dim, dim, depth, ...")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(**network_fields(config)), f"random:{build.__name__}:{seed}"
    path = _network_file(place, getattr(row, "revision", "") or "")
    found = read_side_file(str(path), "config.json") or config
    if found is None:
        raise ModelError(f"plonk: no config.json beside {path}", remedy="keep it there, or give network_config=")
    network = build(**network_fields(found))
    missing = network.load_state_dict(files.read_state(path), strict=False)
    files.check_keys(row.id, missing.missing_keys, [f"unexpected {k}" for k in missing.unexpected_keys])
    files.check_finite(row.id, files.all_tensors(network))
    digest = files.sha256_of([path])
    files.check_hash(row.id, getattr(row, "sha256", ""), digest)
    return network, digest


def _network_file(place: str, revision: str) -> Path:
    path = Path(place)
    if path.is_file():
        return path
    if path.is_dir():
        found = files.weight_files(path)
        if len(found) != 1:
            raise ModelError(f"plonk: {len(found)} weight files in {path}", remedy="one file")
        return found[0]
    from transformers.utils import cached_file

    try:
        cached_file(place, "config.json", revision=revision or None)
        return Path(cached_file(place, "model.safetensors", revision=revision or None))
    except OSError as error:
        raise ModelError(
            f"plonk: cannot fetch {place!r}: {str(error).strip().splitlines()[0][:200]}",
            remedy=f"where there is a network: hf download {place} --local-dir DIR; then weights=DIR",
        ) from error


def _card(row: Any, eye: Loaded, place: str, backend: str, digest: str) -> Any:
    return replace(
        eye.card,
        id=row.id,
        source=place,
        licence=getattr(row, "licence", "unverified"),
        provenance=getattr(row, "provenance", ""),
        revision=getattr(row, "revision", "") or "",
        weights_sha256=digest,
        notes=(
            *eye.card.notes,
            f"network: {backend}",
            f"encoder: {eye.card.id}, sha256 {eye.card.weights_sha256 or 'unknown'}",
            *([STREETCLIP_LICENCE] if "StreetCLIP" in eye.card.id else []),
        ),
    )


def _prediction(degrees: Sequence[float], score: float) -> Prediction:
    latitude, longitude = degrees
    where = {"latitude": latitude, "longitude": longitude}
    return Prediction(f"{latitude:.3f}, {longitude:.3f}", score, extra=where)


def _true_degrees(sample: Sample) -> tuple[float, float]:
    values: list[Any] = [sample.columns.get(name) for name in ("latitude", "longitude")]
    try:
        latitude, longitude = (float(v) for v in values)
    except (TypeError, ValueError):
        return float("nan"), float("nan")
    return latitude, longitude


def _parse_degrees(label: str | int) -> Tensor:
    parts = str(label).replace(";", ",").split(",")
    try:
        latitude, longitude = (float(part) for part in parts)
    except ValueError:
        latitude = longitude = float("nan")
    if not (isfinite(latitude) and isfinite(longitude) and abs(latitude) <= 90 and abs(longitude) <= 360):
        raise UsageError(
            f"plonk: label {label!r} is no location",
            remedy="'latitude, longitude' in degrees, for instance '48.86, 2.35'; or 'true'",
        )
    return torch.tensor([[latitude, longitude]])
