"""Videos as a player reads them: size, number, times and colours of the frames, and what is refused."""

from __future__ import annotations

import base64
import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foveate.errors import MissingDependencyError, UsageError
from foveate.render.video_file import constant_rate, write_video

RNG = np.random.default_rng(0)
COLOURS = np.array([[230, 40, 40], [40, 200, 60], [50, 70, 230], [250, 250, 250], [10, 10, 10]], np.uint8)


def plain(height: int = 48, width: int = 64) -> list[np.ndarray]:
    return [np.full((height, width, 3), colour, np.uint8) for colour in COLOURS]


def decoded(path: Path) -> tuple[list[np.ndarray], list[float], object]:
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        facts = (stream.codec_context.name, stream.codec_context.pix_fmt, float(stream.average_rate))
        frames = list(container.decode(stream))
        pixels = [frame.to_ndarray(format="rgb24", src_colorspace="ITU709") for frame in frames]
        return pixels, [float(frame.time) for frame in frames], facts


def test_a_player_reads_what_was_drawn(tmp_path: Path) -> None:
    pytest.importorskip("av")
    written = write_video(plain(), tmp_path / "out.mp4", fps=8)
    pixels, times, facts = decoded(written.path)
    assert facts == ("h264", "yuv420p", 8.0)
    assert len(pixels) == written.frames == len(COLOURS)
    np.testing.assert_allclose(times, np.arange(5) / 8, atol=1e-3)
    for frame, colour in zip(pixels, COLOURS, strict=True):
        assert frame.shape == (48, 64, 3)
        assert np.abs(frame.astype(int) - colour).max() <= 6


def test_the_index_stands_at_the_front(tmp_path: Path) -> None:
    pytest.importorskip("av")
    data = write_video(plain(), tmp_path / "out.mp4", fps=8).path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("size", [(47, 64), (48, 63), (31, 33)])
def test_odd_sizes_are_padded_by_their_own_last_pixels(tmp_path: Path, size: tuple[int, int]) -> None:
    pytest.importorskip("av")
    written = write_video(plain(*size), tmp_path / "out.mp4", fps=8)
    assert written.size == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    pixels, _, _ = decoded(written.path)
    assert pixels[0].shape[:2] == written.size
    assert np.abs(pixels[0][-1, -1].astype(int) - COLOURS[0]).max() <= 6


def test_frames_are_taken_one_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("av")
    alive, most = 0, 0

    class Frame(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream() -> Iterator[np.ndarray]:
        nonlocal alive, most
        for _ in range(40):
            frame = RNG.integers(0, 255, (32, 32, 3), dtype=np.uint8).view(Frame)
            alive += 1
            most = max(most, alive)
            yield frame
            del frame

    assert write_video(stream(), tmp_path / "out.mp4", fps=10).frames == 40
    assert most <= 4


def test_webp(tmp_path: Path) -> None:
    written = write_video(plain(), tmp_path / "out.webp", fps=8)
    assert written.frames == 5
    with Image.open(written.path) as image:
        assert image.n_frames == 5
        image.seek(2)
        assert np.abs(np.asarray(image.convert("RGB")).astype(int)[4, 4] - COLOURS[2]).max() <= 12


def test_what_is_refused_leaves_no_file(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(UsageError, match=r"ending in \.mp4"):
        write_video(plain(), tmp_path / "out.avi", fps=8)
    with pytest.raises(UsageError, match="no frame"):
        write_video([], tmp_path / "out.mp4", fps=8)
    with pytest.raises(UsageError, match="frame 1 is uint8"):
        write_video([plain()[0], plain(32, 32)[0]], tmp_path / "out.mp4", fps=8)
    with pytest.raises(UsageError, match="float64"):
        write_video([np.zeros((8, 8, 3))], tmp_path / "out.mp4", fps=8)

    def stopped() -> Iterator[np.ndarray]:
        yield plain()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(stopped(), tmp_path / "out.mp4", fps=8)
    assert list(tmp_path.iterdir()) == []


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingDependencyError) as caught:
        write_video(plain(), tmp_path / "out.mp4", fps=8)
    assert "foveate[video]" in caught.value.remedy


def test_constant_rate_of_even_times() -> None:
    rate, index, note = constant_rate(3 + np.arange(6) / 25)
    assert rate == pytest.approx(25)
    assert index.tolist() == list(range(6))
    assert note == ""
    assert constant_rate([0.0, 1 / 240])[0] == 60.0
    assert constant_rate([7.0])[:2][0] == 10.0
    assert constant_rate(np.arange(4) / 25, fps=5)[0] == 5


def test_variable_rate_shows_each_frame_when_its_time_has_come() -> None:
    times = np.array([0.0, 0.1, 0.2, 0.5, 0.6, 1.0])
    rate, index, note = constant_rate(times)
    assert rate == pytest.approx(10)
    expected = [max(i for i, t in enumerate(times) if t <= k / 10 + 1e-5) for k in range(len(index))]
    assert index.tolist() == expected
    assert index[-1] == 5
    assert "variable frame rate: 6 frames shown as" in note
    slow = constant_rate(times, fps=2)
    assert "left out" in slow[2]


@pytest.mark.parametrize("fps", [0.0, -1.0, 61.0])
def test_a_rate_that_is_none(fps: float) -> None:
    with pytest.raises(UsageError, match="frames a second"):
        constant_rate([0.0, 0.1], fps=fps)
    with pytest.raises(UsageError, match="one time a frame"):
        constant_rate([])


def test_unknown_times_are_told() -> None:
    rate, index, note = constant_rate([np.nan, np.nan])
    assert (rate, index.tolist(), note) == (10.0, [0, 1], "times unknown: 10 frames a second")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE = """<body><script>
const video = document.createElement("video");
video.muted = true;
const tell = facts => fetch("/told", {method: "POST", body: JSON.stringify(facts)});
function sample() {
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth; canvas.height = video.videoHeight;
  const pen = canvas.getContext("2d");
  pen.drawImage(video, 0, 0);
  return [...pen.getImageData(9, 9, 1, 1).data].slice(0, 3);
}
video.onloadeddata = async () => {
  const pixels = [];
  for (const time of TIMES) {
    await new Promise(done => { video.onseeked = done; video.currentTime = time; });
    // A browser may say that it has sought before it shows the frame; neighbours here differ in colour.
    const begun = performance.now(), before = String(pixels.at(-1));
    while (String(sample()) === before && performance.now() - begun < 5000)
      await new Promise(done => setTimeout(done, 50));
    pixels.push(sample());
  }
  tell({width: video.videoWidth, height: video.videoHeight, duration: video.duration, pixels});
};
video.onerror = () => tell({error: video.error.message});
video.src = "data:video/mp4;base64,DATA";
</script></body>"""


class Teller(BaseHTTPRequestHandler):
    """Gives the page, and keeps what it tells."""

    page = b""
    told: queue.Queue[dict[str, Any]]

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.page if self.path == "/" else b"")

    def do_POST(self) -> None:
        self.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Quiet."""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: nothing to play the video in")
def test_a_browser_plays_it_with_the_colours_that_were_drawn(tmp_path: Path) -> None:
    pytest.importorskip("av")
    data = base64.b64encode(write_video(plain(), tmp_path / "out.mp4", fps=8).path.read_bytes()).decode()
    times = [(k + 0.5) / 8 for k in range(5)]
    Teller.page = PAGE.replace("TIMES", json.dumps(times)).replace("DATA", data).encode()
    Teller.told = queue.Queue()
    with ThreadingHTTPServer(("127.0.0.1", 0), Teller) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([str(CHROMIUM), *options, address], **quiet) as browser:
            try:
                told = Teller.told.get(timeout=120)
            finally:
                browser.kill()
                server.shutdown()
    assert "error" not in told, told
    assert (told["width"], told["height"]) == (64, 48)
    assert told["duration"] == pytest.approx(5 / 8, abs=0.05)
    np.testing.assert_allclose(told["pixels"], COLOURS, atol=12)
