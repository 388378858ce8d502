"""Windows that slide over a video, cut while it is decoded once, in bounded memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from i3d_gn.data.loader import VideosInParts
from i3d_gn.data.transforms import SpatialMode, evaluation_crops
from i3d_gn.video_io.errors import VideoDecodeError
from i3d_gn.video_io.index import VideoIndex
from i3d_gn.video_io.stream import StreamedFrame, open_stream
from i3d_gn.video_io.video_files import VideoFiles

_ROUNDING = 1e-6  # seconds


@dataclass(frozen=True)
class Window:
    """A stretch of a video.

    Attributes:
        start_seconds: Of the window.
        end_seconds: Of the window, or of the video if that is earlier.
        frames: All frames inside, in order.
    """

    start_seconds: float
    end_seconds: float
    frames: list[StreamedFrame]


def sliding_windows(
    frames: Iterable[StreamedFrame],
    *,
    length: float,
    every: float,
    fps: float,
    in_seconds: bool,
    partial: bool,
) -> Iterator[Window]:
    """Windows of `length` that start at 0, `every`, 2 `every`, ..., each when it is complete.

    ::

        length = 4, every = 2            frames  0 1 2 3 4 5 6
                                                [0 1 2 3]
                                                    [2 3 4 5]
                                                        [4 5 6]   with `partial` only

    No more frames are kept than a window has. Windows without a frame are omitted.

    Args:
        frames: All frames of a video, in order.
        length: Of a window, in seconds or in frames.
        every: From the start of one window to the next, in the same unit.
        fps: Nominal frame rate, for the duration of the last frame.
        in_seconds: Whether frames belong to windows by their time or by their index.
        partial: Whether there is a last window that is cut short by the end of the video. A video
            that is shorter than a window always is one.
    """
    kept: deque[StreamedFrame] = deque()
    number, last = 0, None

    def position(frame: StreamedFrame) -> float:
        # A frame on the edge between two windows, up to rounding, is in the later one.
        return frame.seconds + _ROUNDING if in_seconds else frame.number

    def window(end: float = math.inf) -> Window:
        inside = [frame for frame in kept if position(frame) < number * every + length]
        if in_seconds:
            start, stop = number * every, min(number * every + length, end)
        else:
            start, stop = inside[0].seconds, inside[-1].seconds + 1 / fps
        return Window(start, stop, inside)

    for frame in frames:
        last = frame
        while position(frame) >= number * every + length:
            if kept:
                yield window()
            number += 1
            while kept and position(kept[0]) < number * every:
                kept.popleft()
        if position(frame) >= number * every:
            kept.append(frame)
    if last is None:
        return
    end = last.seconds + 1 / fps if in_seconds else last.number + 1
    complete = number * every + length <= end
    if kept and (complete or partial or number == 0):
        yield window(end)


class WindowClips(NamedTuple):
    """Some of the windows of a video, each as one clip.

    Attributes:
        video: Number of the video.
        clips: uint8 (N, T, H, W, 3).
        crops: (top, left, height, width) in pixels, applied to every clip.
        fps: Frame rate of the video.
        length, every: Of the windows, in frames.
        is_last: Whether the video has no more windows.
        broken: Why the video cannot be decoded, or None.
    """

    video: int
    clips: torch.Tensor
    crops: tuple[tuple[int, int, int, int], ...]
    fps: float
    length: int
    every: int
    is_last: bool
    broken: str | None


class Extent(NamedTuple):
    """A number of frames, or of seconds."""

    value: float
    in_seconds: bool

    def frames(self, fps: float) -> int:
        """In frames at a rate, at least 1."""
        return max(1, round(self.value * fps if self.in_seconds else self.value))


class SlidingClips(VideosInParts[WindowClips]):
    """The windows of some videos, in parts.

    A window of `length` frames gives one clip: frames 0, `stride`, 2 `stride`, ... of the window.
    A video shorter than a window gives one clip that loops.

    Args:
        videos: Indexed or not.
        wanted: Numbers of the videos to read.
        length: Of a window.
        every: From one window to the next.
        stride: Frames of the video from one frame of the clip to the next.
        short_side, spatial, crop_size: See `evaluation_crops`.
        clips_per_item: At most.
    """

    def __init__(
        self,
        videos: VideoIndex | VideoFiles,
        wanted: list[int],
        *,
        length: Extent,
        every: Extent,
        stride: int,
        short_side: int,
        spatial: SpatialMode,
        crop_size: int,
        clips_per_item: int,
    ) -> None:
        super().__init__(wanted)
        self.videos = videos
        self.length = length
        self.every = every
        self.stride = max(1, stride)
        self.short_side = short_side
        self.spatial: SpatialMode = spatial
        self.crop_size = crop_size
        self.clips_per_item = clips_per_item

    def parts(self, video: int) -> Iterator[WindowClips]:
        """The windows of a video, `clips_per_item` at a time."""
        try:
            yield from self._windows(video)
        except VideoDecodeError as error:
            yield _broken(video, str(error))

    def skipped(self, video: int, reason: str) -> WindowClips:
        """What stands for the windows that cannot be loaded."""
        return _broken(video, f"{self.describe(video)}: {reason}")

    def describe(self, video: int) -> str:
        """Path of the video."""
        return self.videos.paths[video]

    def num_bytes(self, video: int) -> int:
        """Roughly the size of a part, of a video of 30 frames per second and 16:9."""
        frames = -(-self.length.frames(30.0) // self.stride)
        return self.clips_per_item * frames * 3 * self.short_side**2 * 16 // 9

    def _windows(self, video: int) -> Iterator[WindowClips]:
        crops: list[tuple[int, int, int, int]] = []
        length = every = 1

        def plan_of(height: int, width: int) -> Any:
            plan, found = evaluation_crops(
                height,
                width,
                short_side=self.short_side,
                mode=self.spatial,
                crop_size=None if self.spatial == "full" else self.crop_size,
            )
            crops[:] = found
            return plan

        def wanted(index: int) -> bool:
            # All of the first window, which loops if the video is shorter.
            return index < length or index % math.gcd(every, self.stride) == 0

        with (
            self.videos.file_of(video) as path,
            open_stream(path, plan_of, wanted=wanted) as stream,
        ):
            length, every = self.length.frames(stream.fps), self.every.frames(stream.fps)
            windows = sliding_windows(
                stream.frames,
                length=length,
                every=every,
                fps=stream.fps,
                in_seconds=False,
                partial=False,
            )
            batch: list[np.ndarray] = []

            def item(*, is_last: bool) -> WindowClips:
                clips = torch.from_numpy(np.stack(batch))
                return WindowClips(
                    video, clips, tuple(crops), stream.fps, length, every, is_last, None
                )

            for window in windows:
                if len(batch) == self.clips_per_item:
                    yield item(is_last=False)
                    batch = []
                indices = np.arange(0, length, self.stride) % len(window.frames)
                pixels = [window.frames[i].pixels for i in indices]
                batch.append(np.stack([p for p in pixels if p is not None]))
            yield item(is_last=True)


def _broken(video: int, reason: str) -> WindowClips:
    return WindowClips(video, torch.empty(0), (), 0.0, 0, 0, True, reason)
