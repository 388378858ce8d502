"""Pictures of results: frames with text or color, as video."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import matplotlib as mpl
import numpy as np
import numpy.typing as npt

from i3d_gn.files import atomic_output
from i3d_gn.video_io.h264 import X264Options, write_h264

Pixels = npt.NDArray[np.uint8]

_OPTIONS = X264Options(crf=20, gop=60, preset="veryfast", tune=None)
_TICKS_PER_SECOND = 90_000
_MOST_OPAQUE = 0.65
VIDEO_SUFFIXES = (".mp4",)  # that `write_video` writes


def write_video(path: Path, frames: Iterable[tuple[float, Pixels]], *, fps: float) -> None:
    """Write H.264 in MP4, atomically.

    Args:
        path: The file.
        frames: When each frame is shown, in seconds from the first one on, increasing; and its RGB
            pixels (H, W, 3), of one size. Odd sizes lose the last row or column, as H.264 needs.
        fps: Nominal frame rate.
    """

    def encoded() -> Iterator[av.VideoFrame]:
        last = -1
        for seconds, pixels in frames:
            height, width = (max(2, side - side % 2) for side in pixels.shape[:2])
            rows, columns = np.arange(height) % len(pixels), np.arange(width) % pixels.shape[1]
            frame = av.VideoFrame.from_ndarray(pixels[rows][:, columns], format="rgb24")
            frame = frame.reformat(format="yuv420p")
            last = max(last + 1, round(seconds * _TICKS_PER_SECOND))
            frame.pts, frame.time_base = last, Fraction(1, _TICKS_PER_SECOND)
            yield frame

    rate = Fraction(fps).limit_denominator(1001)
    with atomic_output(path) as temporary:
        write_h264(temporary, encoded(), frame_rate=rate, options=_OPTIONS)


def heat_overlay(pixels: Pixels, heat: npt.NDArray[np.float32]) -> Pixels:
    """`pixels` (H, W, 3), colored and covered in proportion to `heat` (H, W), in [0, 1]."""
    table = (255 * mpl.colormaps["turbo"](np.arange(256))[:, :3]).astype(np.float32)
    colors = table[(255 * heat).astype(np.uint8)]
    opacity = _MOST_OPAQUE * heat[..., None]
    return (pixels * (1 - opacity) + colors * opacity).astype(np.uint8)
