"""Videos written by PyAV for tests: every frame tells its number by its colour."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

av = __import__("pytest").importorskip("av", reason="videos need PyAV")


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (frame, y, x, 3): a grey level by frame, a red square that moves, a blue corner at the top left."""
    clip = np.zeros((count, height, width, 3), np.uint8)
    for i in range(count):
        clip[i] = 40 + (i * 150) // max(1, count - 1)
        x = (i * 3) % max(1, width - 12)
        clip[i, height // 2 : height // 2 + 10, x : x + 10] = (220, 30, 30)
        clip[i, : height // 4, : width // 4] = (20, 20, 220)
    return clip


def write_video(
    path: Path,
    clip: np.ndarray,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: int = 25,
    pts: list[int] | None = None,
    time_base: Fraction | None = None,
    options: dict[str, str] | None = None,
    source: str = "rgb24",
    turn: int = 0,
) -> Path:
    """Encode ``clip`` (frame, y, x, ...) of PyAV format ``source``; ``pts`` in units of ``time_base``."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        if time_base is not None:
            stream.time_base = stream.codec_context.time_base = time_base
        if turn:
            stream.set_display_rotation(turn)
        for i, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source)
            if pts is not None:
                frame.pts, frame.time_base = pts[i], time_base
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


LOSSLESS = {"codec": "libx264rgb", "pix_fmt": "rgb24", "options": {"qp": "0", "g": "12", "bf": "2"}}
"""H.264 without loss, with B frames and a key frame every 12: frames come back as they were."""
