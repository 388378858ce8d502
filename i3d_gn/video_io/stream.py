"""All frames of a video in order, one at a time: memory does not grow with the video."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from av.error import FFmpegError
from av.video.stream import VideoStream

from i3d_gn.video_io.crop_plan import CropPlan
from i3d_gn.video_io.decode_pyav import frame_writer, open_video, sequential_frames
from i3d_gn.video_io.errors import VideoDecodeError
from i3d_gn.video_io.pixels import orientation_of


class StreamedFrame(NamedTuple):
    """A frame of a video.

    Attributes:
        number: Its index, in presentation order.
        seconds: When it is shown, from the first frame on.
        pixels: RGB, uint8 (H, W, 3), as `decode_frames` returns them; None if not wanted.
    """

    number: int
    seconds: float
    pixels: np.ndarray | None


class FrameStream(NamedTuple):
    """The nominal frame rate of a video, and its frames, which can be read once."""

    fps: float
    frames: Iterator[StreamedFrame]


@contextlib.contextmanager
def open_stream(
    path: str | Path,
    plan_of: Callable[[int, int], CropPlan | None],
    *,
    wanted: Callable[[int], bool] = lambda index: True,
) -> Iterator[FrameStream]:
    """Open a video to read all of its frames inside the block.

    Args:
        path: The video file.
        plan_of: Resize and crop for upright frames of (height, width); None: whole frames.
        wanted: Whether the frame of an index is converted to pixels.

    Raises:
        VideoDecodeError: It cannot be opened or has no frames, or, while reading, at the first
            frame that cannot be decoded.
    """
    with open_video(path) as (_, stream):
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        yield FrameStream(fps, _frames(path, stream, plan_of, wanted, fps))


def _frames(
    path: str | Path,
    stream: VideoStream,
    plan_of: Callable[[int, int], CropPlan | None],
    wanted: Callable[[int], bool],
    fps: float,
) -> Iterator[StreamedFrame]:
    writer, shape, first_pts, seconds = None, (0, 0, 3), None, -1 / fps
    for index, frame in sequential_frames(path, stream):
        if writer is None:
            height, width = orientation_of(frame).upright_size(frame)
            plan = plan_of(height, width) or CropPlan(height, width, 0, 0, height, width)
            writer, shape = frame_writer(frame, plan), (plan.height, plan.width, 3)
            first_pts = frame.pts
        shown = None
        if frame.pts is not None and first_pts is not None and stream.time_base is not None:
            shown = float((frame.pts - first_pts) * stream.time_base)
        # Frames without a timestamp, or with one out of order, follow at the nominal rate.
        seconds = shown if shown is not None and shown > seconds else seconds + 1 / fps
        pixels = None
        if wanted(index):
            pixels = np.empty(shape, np.uint8)
            try:
                writer.write(frame, pixels)
            except (FFmpegError, OSError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise VideoDecodeError(path, reason, frame=index) from error
        yield StreamedFrame(index, seconds, pixels)
    if writer is None:
        raise VideoDecodeError(path, "the video stream has no frames")
