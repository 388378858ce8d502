"""Fixtures: small sets of videos, an encoder for odd ones, a web server that fails on request."""

import contextlib
import hashlib
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import av
import numpy as np
import pytest

from data_tools.listed_videos import Annotations
from data_tools.make_motion_clips import make_motion_clips


@pytest.fixture(scope="session")
def motion_clips(tmp_path_factory) -> Path:
    """train/ and val/ with six class folders of one clip of 12 frames each."""
    folder = tmp_path_factory.mktemp("motion_clips")
    make_motion_clips(
        folder, train_clips=1, val_clips=1, num_frames=12, seed=3, workers=2, timeout_seconds=60
    )
    return folder


@pytest.fixture
def output(tmp_path) -> Path:
    """Where a test of `index` writes; the folder does not exist yet."""
    return tmp_path / "out" / "val.parquet"


@pytest.fixture(scope="session")
def clip(motion_clips) -> Path:
    """A valid video: 12 frames of 128x96 at 25 frames per second."""
    return motion_clips / "train" / "move_left" / "move_left_000.mp4"


@pytest.fixture
def place_clip(clip) -> Callable[[Path], Path]:
    """Place a copy of the valid video at a path."""

    def place(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(clip, path))

    return place


@pytest.fixture
def encode() -> Callable[..., Path]:
    """Encode RGB images (T, H, W, 3) as a video, with PyAV only."""

    def write(
        path: Path,
        images: np.ndarray,
        *,
        codec: str = "libx264",
        pixel_format: str = "yuv420p",
        full_range: bool = False,
        rotation: int = 0,
        pts: list[int] | None = None,
        time_base: Fraction = Fraction(1, 25),
        crf: int = 10,
        bframes: int | None = None,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            options = {"crf": str(crf)} | ({} if bframes is None else {"bf": str(bframes)})
            stream = container.add_stream(codec, rate=25, options=options)
            stream.height, stream.width = images.shape[1:3]
            stream.pix_fmt = pixel_format
            stream.codec_context.time_base = time_base
            if full_range:
                stream.codec_context.color_range = 2
            if rotation:
                stream.set_display_rotation(rotation)
            for t, image in enumerate(images):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                    format=pixel_format, dst_color_range=2 if full_range else 1
                )
                frame.pts, frame.time_base = (pts[t] if pts else t), time_base
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return write


HANGS_MIDWAY = """\
import functools, sys, time
from data_tools import {module}

original, calls = {module}.{function}, 0

@functools.wraps(original)
def hang_after_some_calls(*args, **kwargs):
    global calls
    calls += 1
    if calls > {calls}:
        time.sleep(600)
    return original(*args, **kwargs)

{module}.{function} = hang_after_some_calls
if __name__ == "__main__":
    sys.exit({module}.main())
"""


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """Write a list, in UTF-8 and with the given ends of lines."""

    def write_text(text: str, name: str = "list.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return write_text


def named(annotations: Annotations) -> list[tuple[str, int | str | None]]:
    """Names and labels of the videos of a list."""
    return [(video.name, video.label) for video in annotations.videos]


@pytest.fixture
def kill_midway(tmp_path) -> Callable[..., None]:
    """Run `data_tools.<module>` and kill it after a fixed part of its work.

    Each of its processes completes `calls` calls of the module's `function` and hangs in the next.
    The command is killed as soon as `is_midway()` is true.
    """

    def run(
        module: str, function: str, *, calls: int, arguments: list, is_midway: Callable[[], bool]
    ) -> None:
        script = tmp_path / f"{module}_hangs.py"  # worker processes import it, too
        script.write_text(HANGS_MIDWAY.format(module=module, function=function, calls=calls))
        process = subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.DEVNULL)
        try:
            while not is_midway():
                assert process.poll() is None, "the process has ended or failed to start"
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()

    return run


@pytest.fixture
def images() -> np.ndarray:
    """16 smooth moving images of 120x80; all corners differ."""
    rows, columns = np.mgrid[0:80, 0:120].astype(np.float64)
    frames = np.empty((16, 80, 120, 3), np.uint8)
    for t in range(16):
        for channel in range(3):
            wave = np.sin(columns / (8 + channel) + 0.4 * t) + np.cos(rows / 6 - 0.2 * t)
            frames[t, ..., channel] = 110 + 0.3 * columns - 0.4 * rows + 35 * wave
    return frames


class HttpServer:
    """Serves a folder like a bucket (ranges, MD5 as ETag), with faults on request.

    Attributes:
        faults: For each name, faults of the next requests, one per request: ("drop", n) closes the
            connection after n bytes, ("stall", n) sends n bytes and then nothing, ("length", n)
            sends a Content-Length n bytes too long, ("flip", n) changes byte n, ("status", code)
            fails, ("busy", seconds) is 503 with Retry-After, ("no_ranges", 0) ignores Range,
            ("no_if_range", 0) ignores If-Range, ("shifted_range", n) sends another range, ("slow",
            0) waits before it sends.
        headers: Replace the headers of responses; "-" removes a header.
        requests: (name, first byte, last byte) of the requests so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[tuple[str, int]]] = {}
        self.headers: dict[str, str] = {}
        self.requests: list[tuple[str, int | None, int | None]] = []
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, owner: HttpServer, *arguments) -> None:
        self.owner = owner
        with contextlib.suppress(ConnectionError):
            super().__init__(*arguments)

    def log_message(self, format, *arguments):
        pass

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        self._answer(with_body=True)

    def _answer(self, *, with_body):
        name = unquote(self.path).lstrip("/")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(match[1]) if match else None
        last = int(match[2]) if match and match[2] else None
        if with_body:
            self.owner.requests.append((name, first, last))
        queue = self.owner.faults.get(name)
        fault, value = queue.pop(0) if queue and with_body else ("", 0)
        path = self.owner.folder / name
        if fault == "status" or not path.is_file():
            return self._refuse(value if fault == "status" else 404)
        if fault == "busy":
            return self._refuse(503, {"Retry-After": str(value)})
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        headers |= self.owner.headers
        total, status = len(content), 200
        same_version = self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]
        same_version = same_version or fault == "no_if_range"
        if first is not None and same_version and fault != "no_ranges":
            if fault == "shifted_range":
                first += value
            if first >= total:
                return self._refuse(416, {"Content-Range": f"bytes */{total}"})
            last = min(total - 1 if last is None else last, total - 1)
            content = content[first : last + 1]
            headers["Content-Range"], status = f"bytes {first}-{last}/{total}", 206
        if fault == "flip":
            content = content[:value] + bytes([content[value] ^ 1]) + content[value + 1 :]
        headers["Content-Length"] = str(len(content) + (value if fault == "length" else 0))
        self.send_response(status)
        for key, text in headers.items():
            if text != "-":
                self.send_header(key, text)
        self.end_headers()
        if not with_body:
            return None
        self.wfile.write(content[:value] if fault in {"drop", "stall"} else content)
        if fault == "stall":
            self.owner.closing.wait(10)
        if fault == "slow":
            self.owner.closing.wait(0.5)
        if fault in {"drop", "stall", "length"}:
            self.close_connection = True
        return None

    def _refuse(self, status, headers=None):
        self.send_response(status)
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def http_server(tmp_path) -> Iterator[HttpServer]:
    """A local server of the folder `tmp_path / "served"`."""
    (tmp_path / "served").mkdir()
    server = HttpServer(tmp_path / "served")
    yield server
    server.close()
