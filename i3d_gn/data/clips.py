"""Which frames make up a clip: index arithmetic only, no video needed.

A clip of `num_frames` frames at `stride` covers a *span* of the video::

    num_frames = 4, stride = 2              span = (4 - 1) * 2 + 1 = 7

    video   0  1  2  3  4  5  6  7  8  9    video_length = 10
    clip          x     .     x     .    <- does not fit: 3 is the last start that does
    clip       1     3     5     7          start = 1

A video shorter than the span loops, and so does a clip that starts too late to fit::

    video   0  1  2  3  4                   video_length = 5
    clip    0     2     4     |1            start = 0: 0 2 4 (6 mod 5) = 1

Sources: [NL] facebookresearch/video-nonlocal-net, `customized_video_io.cc`
(`DecodeClipFromVideoFileFlex`).
"""

from typing import Literal, get_args

import numpy as np

Spacing = Literal["nonlocal", "uniform", "slowfast"]


def clip_span(num_frames: int, stride: int) -> int:
    """Number of video frames from the first to the last frame of a clip, inclusive.

    A stride of 0 repeats one frame (span 1): a control without motion.

    Raises:
        ValueError: `num_frames` is below 1 or `stride` below 0.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}, must be at least 1")
    if stride < 0:
        raise ValueError(f"stride is {stride}, must be at least 0 (0 repeats one frame)")
    return (num_frames - 1) * stride + 1


def clip_indices(start: int, *, num_frames: int, stride: int, video_length: int) -> np.ndarray:
    """Frame indices of one clip; past the end of the video they loop.

    ::

        video_length = 5, num_frames = 4, stride = 2, start = 3

        unlimited    3     5     7     9
        looped       3     0     2     4

    Returns:
        int64 (num_frames,), each in `0 ... video_length - 1`.

    Raises:
        ValueError: `start` is outside the video, the video is empty, or as `clip_span`.
    """
    clip_span(num_frames, stride)
    _check_video_length(video_length)
    if not 0 <= start < video_length:
        raise ValueError(f"start is {start}, must be in 0 ... {video_length - 1} (frames of video)")
    return (start + stride * np.arange(num_frames, dtype=np.int64)) % video_length


def random_start(
    video_length: int, *, num_frames: int, stride: int, rng: np.random.Generator
) -> int:
    """Start of a training clip, uniform over all starts that fit.

    ::

        video_length = 10, span = 7:   0 1 2 3 | 4 5 6 7 8 9
                                       ^-----^ equally likely (0 ... video_length - span)

    In a video shorter than the span the clip starts at 0 and loops, as in [NL]. [NL] draws up to
    `video_length - num_frames * stride` and therefore never shows the last `stride - 1` frames;
    here they are shown.
    """
    _check_video_length(video_length)
    last_start = max(0, video_length - clip_span(num_frames, stride))
    return int(rng.integers(0, last_start, endpoint=True))


def spaced_starts(
    video_length: int, *, num_clips: int, num_frames: int, stride: int, spacing: Spacing
) -> np.ndarray:
    """Starts of the test clips of a video: int64 (num_clips,).

    Three spacings are in use, here for N = `video_length` and n = `num_clips`::

        nonlocal   floor(N i / n)                   over the whole video; the last clips loop
        uniform    round((N - span) i / (n - 1))    first clip at the start, last clip at the end
        slowfast   floor((N - span) i / n)          like uniform, without the end of the video

        N = 20, span = 7, n = 4
        nonlocal   0         5         10        15 (15 ... 19, then 0, 1)
        uniform    0       4         9       13 (13 ... 19)
        slowfast   0     3     6       9

    `nonlocal` is used by [NL], `uniform` by mmaction2 and pytorchvideo's main branch (a single
    clip starts at 0, as there), `slowfast` by PySlowFast and pytorchvideo's last release, 0.1.5.
    In a video shorter than the span, `uniform` and `slowfast` start every clip at 0, and the clips
    loop.

    Raises:
        ValueError: `spacing` is unknown, `num_clips` below 1, or as `clip_span`.
    """
    _check_video_length(video_length)
    if num_clips < 1:
        raise ValueError(f"num_clips is {num_clips}, must be at least 1")
    room = max(0, video_length - clip_span(num_frames, stride))
    i = np.arange(num_clips, dtype=np.int64)
    if spacing == "nonlocal":
        return i * video_length // num_clips
    if spacing == "uniform":
        gaps = max(1, num_clips - 1)
        return (2 * i * room + gaps) // (2 * gaps)  # rounds halves up, in integers
    if spacing == "slowfast":
        return i * room // num_clips
    raise ValueError(f"spacing is {spacing!r}, must be one of {', '.join(get_args(Spacing))}")


def union_of_clips(clip_index_matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The frames that several clips need, each once, and where each clip finds them.

    ::

        clips       [[0 2 4]        frames  [0 1 2 3 4 5]
                     [1 3 5]        inverse [[0 2 4] [1 3 5] [2 4 0]]
                     [2 4 0]]       frames[inverse] == clips

    Args:
        clip_index_matrix: Integers (num_clips, num_frames).

    Returns:
        `frames`, sorted and unique, and `inverse`, which has the shape of the input.
    """
    matrix = np.asarray(clip_index_matrix)
    if matrix.ndim != 2 or not np.issubdtype(matrix.dtype, np.integer):
        raise ValueError(
            "clip_index_matrix must hold integers in shape (num_clips, num_frames), "
            f"got {matrix.dtype} in shape {matrix.shape}"
        )
    frames, inverse = np.unique(matrix, return_inverse=True)
    return frames, inverse.reshape(matrix.shape)


def _check_video_length(video_length: int) -> None:
    if video_length < 1:
        raise ValueError(f"video_length is {video_length}, must be at least 1 frame")
