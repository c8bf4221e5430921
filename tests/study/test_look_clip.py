"""A first look at a clip: maps are the attention itself, frame by frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from foveate.attribution.attention import ReadoutAttention, Rollout
from foveate.errors import SampleError, UsageError
from foveate.interfaces import Sample, Target
from foveate.study.look import look
from video_models import clips, open_sam2, open_tiny, open_videomt


def panels(found: Any, kind: str) -> np.ndarray:
    return np.stack([panel.values for name, panel in found.maps.items() if name.startswith(f"{kind},")])


@pytest.mark.parametrize(
    "case", ["VideoMAEForVideoClassification", "TimesformerForVideoClassification", "VJEPA2Model"]
)
def test_the_maps_are_the_attributions(case: str) -> None:
    source = open_tiny(case)
    clip = clips(1)[0]
    found = look(source, clip.pixels)
    batch = source.encode([Sample("array", clip.pixels)])
    bound = source.bind(source.forward(batch), batch, Target())
    for kind, method in (("attention", ReadoutAttention()), ("rollout", Rollout())):
        wanted = method.attribute(source, batch, bound).values[0]
        np.testing.assert_allclose(panels(found, kind), wanted, atol=1e-6)
    named = [name for name in found.maps if name.startswith("attention")]
    read = batch.per_sample["frame_index"][0].tolist()[:: 4 // len(named)]
    assert named == [f"attention, cell {cell}, frame {frame}" for cell, frame in enumerate(read)]
    divided = case.startswith("Times")
    assert any("only rollout compares frames" in note for note in found.caveats) == divided
    assert found.rule.keys == {"V": 32, "T": 17}[case[0]]


def test_a_track_is_followed() -> None:
    source = open_videomt(frames=3)
    found = look(source, clips(1)[0].pixels, object=4, target="LABEL_2")
    assert found.predictions[0].object == 4
    assert found.target == "LABEL_2"
    assert "(track 4)" in str(found.rule)
    np.testing.assert_allclose(panels(found, "attention").shape, (3, 4, 4))


def test_a_row_over_memory_is_shown_by_rollout() -> None:
    source = open_sam2(frames=4)
    found = look(source, clips(1)[0].pixels)
    assert {name.partition(",")[0] for name in found.maps} == {"rollout"}
    assert "rollout of the readout row" in str(found.rule)
    assert panels(found, "rollout")[-1].max() == 0


@pytest.mark.parametrize("scale", ["lift", "linear", "per-image"])
def test_frames_on_disk_and_one_frame_are_drawn(scale: str, tmp_path: Path) -> None:
    source = open_tiny("TimesformerForVideoClassification")
    for i, frame in enumerate(clips(1)[0].pixels):
        Image.fromarray(frame).save(tmp_path / f"{i:03d}.png")
    drawn = look(source, tmp_path, scale=scale).save(tmp_path / "look.png")
    with Image.open(drawn) as image:
        assert image.size[0] > 600
    alone = look(source, clips(1)[0].pixels[:1], scale=scale)
    assert len(alone.maps) == 8  # the one frame, read four times


def test_the_command_line_takes_a_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    from foveate.cli import main

    open_tiny("VideoMAEForVideoClassification").module.save_pretrained(tmp_path / "model")
    with av.open(tmp_path / "clip.mp4", "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for pixels in np.random.default_rng(0).integers(0, 256, (10, 48, 64, 3), dtype=np.uint8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    arguments = ["look", str(tmp_path / "model"), str(tmp_path / "clip.mp4"), "-o", str(tmp_path / "look.svg")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "token mean" in done.output
    assert (tmp_path / "look.svg").stat().st_size > 10_000
    inspected = CliRunner().invoke(main, ["inspect", str(tmp_path / "model")])
    assert "2 frame cells of 4 x 4 cells" in inspected.output


def test_what_is_no_clip_is_said(tmp_path: Path) -> None:
    source = open_tiny("VideoMAEForVideoClassification")
    with pytest.raises(SampleError, match="expected a video"):
        look(source, np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(UsageError, match="no layer 7"):
        look(source, clips(1)[0].pixels, layer=7)
    with pytest.raises(UsageError, match="no head 9"):
        look(source, clips(1)[0].pixels, head=9)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i, frame in enumerate(clips(1)[0].pixels[:2]):
            Image.fromarray(frame).save(tmp_path / name / f"{i}.png")
    with pytest.raises(UsageError, match="holds 2 clips"):
        look(source, tmp_path)
