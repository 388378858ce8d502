"""Re-encode one video for training. Runs in a child process.

The copy is upright, has a limited short side, H.264 with frequent keyframes, and no sound. It keeps
every frame of the source, in order and with its timestamp, so that the same clips are sampled from
it: a variable frame rate stays variable, unless a constant one is requested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.filter import Graph

from i3d_gn.files import atomic_output
from i3d_gn.video_io.decode import VideoDecodeError, probe_video
from i3d_gn.video_io.decode_pyav import open_video, sequential_frames
from i3d_gn.video_io.h264 import X264Options, write_h264
from i3d_gn.video_io.pixels import Orientation, orientation_of


@dataclass(frozen=True, kw_only=True)
class Transcoded:
    """Properties of the copy."""

    num_frames: int
    width: int
    height: int
    num_bytes: int


def transcode(
    source: Path, output: Path, *, short_side: int, fps: float | None, options: X264Options
) -> Transcoded:
    """Write `source` as `output`, which appears complete or not at all.

    Args:
        source: The video.
        output: Its copy.
        short_side: Maximum short side in pixels, even.
        fps: Resample to this many frames per second; None keeps every frame and its timestamp.
        options: Options of x264.

    Raises:
        VideoDecodeError: If any frame of the source cannot be decoded.
    """
    num_expected = probe_video(source).num_frames
    with open_video(source) as (_, stream), atomic_output(output) as temporary:
        time_base = stream.time_base or Fraction(1, 90_000)
        frame_rate = _frame_rate(stream)
        decoded = _Counted(frame for _, frame in sequential_frames(source, stream))
        upright = _Upright(short_side, time_base)
        prepared = _retimed(map(upright, decoded), time_base=time_base, frame_rate=frame_rate)
        if fps is not None:
            nominal, frame_rate = 1 / frame_rate, Fraction(fps).limit_denominator(1001)
            prepared = _resampled(prepared, frame_rate=frame_rate, last_duration=nominal)
        num_frames = write_h264(temporary, prepared, frame_rate=frame_rate, options=options)
        if decoded.count != num_expected:
            raise VideoDecodeError(
                source,
                f"{decoded.count} of {num_expected} frames can be decoded",
                frame=decoded.count,
            )
        width, height = upright.size
        num_bytes = temporary.stat().st_size
    return Transcoded(num_frames=num_frames, width=width, height=height, num_bytes=num_bytes)


class _Counted:
    """Passes frames through and counts them."""

    def __init__(self, frames: Iterator[av.VideoFrame]) -> None:
        self._frames = frames
        self.count = 0

    def __iter__(self) -> Iterator[av.VideoFrame]:
        for frame in self._frames:
            self.count += 1
            yield frame


def output_size(width: int, height: int, *, short_side: int) -> tuple[int, int]:
    """(width, height) with a short side of at most `short_side`, the same aspect ratio, both even.

    H.264 with 4:2:0 chroma has no odd sizes: they are rounded down (1 pixel becomes 2).
    """
    scale = min(1.0, short_side / min(width, height))
    if scale == 1.0:
        return max(2, width // 2 * 2), max(2, height // 2 * 2)
    return 2 * round(width * scale / 2), 2 * round(height * scale / 2)


class _Upright:
    """Scales frames of one video to the size of the output and applies their rotation.

    The first frame determines the size; if later frames of the stream have another size, they are
    scaled to it. Colors are not converted: the output has the color tags of the source.
    """

    def __init__(self, short_side: int, time_base: Fraction) -> None:
        self._short_side = short_side
        self._time_base = time_base
        self._graph: Graph | None = None
        self._graph_input: tuple = ()
        self.size = (0, 0)

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        if self.size == (0, 0):
            self._orientation = orientation_of(frame)
            width, height = frame.width, frame.height
            if self._orientation.transpose:
                width, height = height, width
            self.size = output_size(width, height, short_side=self._short_side)
        frame_input = (
            *(frame.width, frame.height, frame.format.name),
            *(int(frame.colorspace), int(frame.color_range)),
        )
        if self._graph is None or frame_input != self._graph_input:
            self._graph, self._graph_input = self._build_graph(*frame_input), frame_input
        self._graph.vpush(frame)
        return self._graph.vpull()

    def _build_graph(
        self, width: int, height: int, pixel_format: str, colorspace: int, color_range: int
    ) -> Graph:
        graph = Graph()
        graph.threads = 1
        transposed = self._orientation.transpose
        scaled_width, scaled_height = self.size[::-1] if transposed else self.size
        nodes = [
            graph.add(
                "buffer",
                video_size=f"{width}x{height}",
                pix_fmt=pixel_format,
                time_base=str(self._time_base),
                pixel_aspect="1/1",
                colorspace=str(colorspace),
                range=str(color_range),
            ),
            graph.add("scale", f"{scaled_width}:{scaled_height}:flags=bicubic+accurate_rnd"),
            *(graph.add(name, *arguments) for name, *arguments in _turns(self._orientation)),
            graph.add("format", "pix_fmts=yuv420p"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(*nodes).configure()
        return graph


def _turns(orientation: Orientation) -> Iterator[tuple[str, ...]]:
    if orientation.transpose:
        # "cclock_flip" is ffmpeg's name for the plain transpose (rows become columns).
        yield "transpose", "cclock_flip"
    if orientation.flip_rows:
        yield ("vflip",)
    if orientation.flip_columns:
        yield ("hflip",)


def _frame_rate(stream: av.VideoStream) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    return rate if rate else Fraction(25)


def _retimed(
    frames: Iterator[av.VideoFrame], *, time_base: Fraction, frame_rate: Fraction
) -> Iterator[av.VideoFrame]:
    """Shift timestamps to start at 0.

    A frame without timestamp, or with one that does not increase, follows the frame before it after
    one nominal frame duration.
    """
    nominal = max(1, round(1 / (frame_rate * time_base)))
    first, previous = 0, None
    for frame in frames:
        if previous is None:
            first, previous = frame.pts or 0, 0
        elif frame.pts is not None and frame.pts - first > previous:
            previous = frame.pts - first
        else:
            previous += nominal
        frame.pts, frame.time_base = previous, time_base
        yield frame


def _resampled(
    frames: Iterator[av.VideoFrame], *, frame_rate: Fraction, last_duration: Fraction
) -> Iterator[av.VideoFrame]:
    """Frames at 0, 1, 2, ... over `frame_rate`, repeated or dropped as by the fps filter of ffmpeg.

    A source frame is shown from the nearest of these times until that of the next frame; of several
    frames with the same nearest time, the last is shown.
    """
    shown: av.VideoFrame | None = None
    due, seconds = 0, Fraction(0)

    def show_until(end: int) -> Iterator[av.VideoFrame]:
        if shown is not None:
            for t in range(due, end):
                shown.pts, shown.time_base = t, 1 / frame_rate
                yield shown

    for frame in frames:
        assert frame.pts is not None and frame.time_base is not None
        seconds = frame.pts * frame.time_base
        next_due = _nearest(seconds * frame_rate)
        yield from show_until(next_due)
        shown, due = frame, next_due
    yield from show_until(max(due + 1, _nearest((seconds + last_duration) * frame_rate)))


def _nearest(time: Fraction) -> int:
    """The nearest integer; halves are rounded up."""
    return math.floor(time + Fraction(1, 2))
