"""Windows that slide over a video, cut while it is decoded once, in bounded memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from i3d_gn.data.clips import union_of_clips
from i3d_gn.data.loader import VideosInParts
from i3d_gn.data.transforms import SpatialMode, evaluation_crops
from i3d_gn.video_io.crop_plan import CropPlan
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


Crop = tuple[int, int, int, int]
ClipsOf = Callable[[int, int], np.ndarray]


class Span(NamedTuple):
    """Where a window lies in its video."""

    start_seconds: float
    end_seconds: float
    num_frames: int


class WindowPart(NamedTuple):
    """Some of the windows of a video, with the frames that their clips consist of.

    Attributes:
        video: Number of the video.
        frames: uint8 (U, H, W, 3), each frame that any clip needs once.
        seconds: When each of them is shown, from the first frame of the video on.
        clips: int64 (N, T), positions in `frames`; N is 0 in a part that only ends the video.
        crops: (top, left, height, width) in pixels, applied to every clip.
        windows: Where each of them lies.
        fps: Nominal frame rate of the video.
        length, every: Of the windows, in frames at the nominal rate.
        is_last: Whether the video has no more windows.
        broken: Why no more of the video can be decoded, or None.
    """

    video: int
    frames: torch.Tensor
    seconds: tuple[float, ...]
    clips: torch.Tensor
    crops: tuple[Crop, ...]
    windows: tuple[Span, ...]
    fps: float
    length: int
    every: int
    is_last: bool
    broken: VideoDecodeError | None


class Extent(NamedTuple):
    """A number of frames, or of seconds."""

    value: float
    in_seconds: bool

    def frames(self, fps: float) -> int:
        """In frames at a rate, at least 1."""
        return max(1, round(self.value * fps if self.in_seconds else self.value))


@dataclass(frozen=True)
class TestView:
    """Frames as they are tested, see `evaluation_crops`."""

    __test__ = False

    short_side: int
    spatial: SpatialMode
    crop_size: int

    def __call__(self, height: int, width: int) -> tuple[CropPlan, list[Crop]]:
        """What to decode of frames of (height, width), and the crops."""
        crop_size = None if self.spatial == "full" else self.crop_size
        return evaluation_crops(
            height, width, short_side=self.short_side, mode=self.spatial, crop_size=crop_size
        )


@dataclass(frozen=True)
class OneClip:
    """One clip per window: its frames 0, `stride`, 2 `stride`, ...; it loops in a shorter one."""

    stride: int

    def __call__(self, num_frames: int, length: int) -> np.ndarray:
        """See `SlidingWindows.clips_of`."""
        clip_length = -(-length // max(1, self.stride))
        return self.stride * np.arange(clip_length)[None] % num_frames


def all_frames(num_frames: int, _length: int) -> np.ndarray:
    """All frames of a window as one clip, see `SlidingWindows.clips_of`."""
    return np.arange(num_frames)[None]


class SlidingWindows(VideosInParts[WindowPart]):
    """The windows of some videos, in parts; every video is decoded once, in order.

    Args:
        videos: Indexed or not.
        wanted: Numbers of the videos to read.
        length: Of a window.
        every: From one window to the next.
        by_time: Whether frames belong to windows by their timestamps; else by their index, and
            seconds are converted at the nominal rate.
        partial: See `sliding_windows`.
        clips_of: From the number of frames of a window, and the nominal one by `length`, to the
            positions (N, T) of its clips' frames in the window.
        view: From the height and width of a video to what is decoded of a frame, and the crops.
        windows_per_part: At most.
    """

    def __init__(
        self,
        videos: VideoIndex | VideoFiles,
        wanted: Sequence[int],
        *,
        length: Extent,
        every: Extent,
        by_time: bool = False,
        partial: bool,
        clips_of: ClipsOf,
        view: Callable[[int, int], tuple[CropPlan, list[Crop]]],
        windows_per_part: int = 1,
    ) -> None:
        super().__init__(wanted)
        self.videos = videos
        self.length = length
        self.every = every
        self.by_time = by_time
        self.partial = partial
        self.clips_of = clips_of
        self.view = view
        self.windows_per_part = windows_per_part

    def parts(self, video: int) -> Iterator[WindowPart]:
        """The windows of a video, `windows_per_part` at a time."""
        try:
            yield from self._decoded(video)
        except VideoDecodeError as error:
            yield _broken(video, error)

    def skipped(self, video: int, reason: str) -> WindowPart:
        """What stands for the windows that cannot be loaded."""
        return _broken(video, VideoDecodeError(self.describe(video), reason))

    def describe(self, video: int) -> str:
        """Path of the video."""
        return self.videos.paths[video]

    def num_bytes(self, video: int) -> int:
        """Roughly the size of a part, of a minute of video with 30 frames per second in 1080p."""
        plan, _ = self.view(1080, 1920)
        length = min(self.length.frames(30.0), 60 * 30)
        num_frames = self.windows_per_part * np.unique(self.clips_of(length, length)).size
        return int(num_frames) * plan.height * plan.width * 3

    def _decoded(self, video: int) -> Iterator[WindowPart]:
        crops: list[Crop] = []
        length = every = 1
        residues: set[int] = set()

        def plan_of(height: int, width: int) -> CropPlan:
            plan, crops[:] = self.view(height, width)
            return plan

        def wanted(index: int) -> bool:
            # All of the first window, which loops if the video is shorter.
            return self.by_time or self.partial or index < length or index % every in residues

        with (
            self.videos.file_of(video) as path,
            open_stream(path, plan_of, wanted=wanted) as stream,
        ):
            length, every = self.length.frames(stream.fps), self.every.frames(stream.fps)
            if not self.by_time:
                residues |= {i % every for i in self.clips_of(length, length).flatten().tolist()}

            def part(windows: Sequence[Window], *, is_last: bool) -> WindowPart:
                frames, clips = _union(windows, self.clips_of, length)
                return WindowPart(
                    video=video,
                    frames=_stacked(frames),
                    seconds=tuple(frame.seconds for frame in frames),
                    clips=torch.from_numpy(clips),
                    crops=tuple(crops),
                    windows=tuple(
                        Span(w.start_seconds, w.end_seconds, len(w.frames)) for w in windows
                    ),
                    fps=stream.fps,
                    length=length,
                    every=every,
                    is_last=is_last,
                    broken=None,
                )

            batch: list[Window] = []
            for window in sliding_windows(
                stream.frames,
                length=self.length.value if self.by_time else length,
                every=self.every.value if self.by_time else every,
                fps=stream.fps,
                in_seconds=self.by_time,
                partial=self.partial,
            ):
                batch.append(window)
                if len(batch) == self.windows_per_part:
                    yield part(batch, is_last=False)
                    batch = []
            yield part(batch, is_last=True)


def _union(
    windows: Sequence[Window], clips_of: ClipsOf, length: int
) -> tuple[list[StreamedFrame], np.ndarray]:
    """The frames that the clips of `windows` need, and the positions of each clip's frames."""
    if not windows:
        return [], np.empty((0, 0), np.int64)
    by_number = {frame.number: frame for window in windows for frame in window.frames}
    rows = []
    for window in windows:
        numbers = np.array([frame.number for frame in window.frames])
        rows.append(numbers[clips_of(len(numbers), length)])
    unique, clips = union_of_clips(np.concatenate(rows))
    return [by_number[number] for number in unique.tolist()], clips


def _stacked(frames: Sequence[StreamedFrame]) -> torch.Tensor:
    """Their pixels: uint8 (U, H, W, 3)."""
    pixels = []
    for frame in frames:
        assert frame.pixels is not None, f"frame {frame.number} is needed, but was not wanted"
        pixels.append(frame.pixels)
    return torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, dtype=torch.uint8)


def _broken(video: int, error: VideoDecodeError) -> WindowPart:
    return WindowPart(
        video,
        frames=_stacked([]),
        seconds=(),
        clips=torch.empty(0, 0, dtype=torch.int64),
        crops=(),
        windows=(),
        fps=0.0,
        length=0,
        every=0,
        is_last=True,
        broken=error,
    )
