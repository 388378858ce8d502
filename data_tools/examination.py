"""Decode one video from beginning to end and name what is wrong with it. Runs in a child process.

no_frames        no bytes, or a video stream without a frame
no_video_stream  a sound file of something else
unreadable       no video file, or damaged so that nothing can be decoded
truncated        frames are missing at the end, or from some damage on
timestamps       frames without a time, or not later than the one before
damaged          all frames are there, but parts of some are the decoder's guess
memory           needs more than the limit
"""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from data_tools.probing import decode_error_reason, has_no_frames
from i3d_gn.video_io.decode import VideoDecodeError, probe_video
from i3d_gn.video_io.decode_pyav import open_video, sequential_frames


@dataclass(frozen=True, kw_only=True)
class Examined:
    """``defect`` "" is a sound video; ``facts`` are its columns in an index.

    ``content`` is a hash of all decoded frames, the same for the same pictures in whatever file.
    """

    defect: str
    reason: str = ""
    facts: dict[str, Any] | None = None
    content: str = ""


def examine(file: Path) -> Examined:
    """Decode all of ``file``.

    Raises ``MemoryError`` where there is too little, and ``OSError`` where the file cannot be
    opened: neither says anything about its content.
    """
    with open(file, "rb"):
        pass
    if file.stat().st_size == 0:
        return Examined(defect="no_frames", reason="the file has no bytes")
    try:
        info = probe_video(file)
    except VideoDecodeError as error:
        return _defect_of(file, error)
    digest = hashlib.blake2b(digest_size=16)
    num_frames, previous, timestamp_reason = 0, None, ""
    broken = ""
    damaged: list[int] = []
    try:
        with open_video(file) as (_, stream):
            for index, frame in sequential_frames(file, stream):
                digest.update(f"{frame.width}x{frame.height} {frame.format.name}".encode())
                digest.update(_pixels(frame).data)
                # Set by decoders that fill what they cannot decode from around it or before it.
                if frame.is_corrupt:
                    damaged.append(index)
                if frame.pts is None:
                    timestamp_reason = timestamp_reason or f"frame {index} has no time"
                elif previous is not None and frame.pts <= previous:
                    timestamp_reason = (
                        timestamp_reason or f"frame {index} is not later than the one before"
                    )
                previous = previous if frame.pts is None else frame.pts
                num_frames += 1
    except VideoDecodeError as error:
        _raise_if_memory(error)
        broken = f" ({decode_error_reason(error)})"
    if broken or num_frames < info.num_frames:
        reason = f"{num_frames} of {max(info.num_frames, num_frames)} frames can be decoded{broken}"
        return Examined(defect="truncated", reason=reason)
    facts = {
        "num_frames": num_frames,
        "fps": info.fps,
        "duration_seconds": info.duration_seconds,
        "width": info.width,
        "height": info.height,
    }
    defect, reason = "", ""
    if timestamp_reason:
        defect, reason = "timestamps", timestamp_reason
    elif damaged:
        defect = "damaged"
        reason = f"{len(damaged)} of {num_frames} frames in part, the first is {damaged[0]}"
    return Examined(
        defect=defect,
        reason=reason,
        facts=facts,
        content=digest.hexdigest(),
    )


def _defect_of(file: Path, error: VideoDecodeError) -> Examined:
    _raise_if_memory(error)
    if error.cause == "no video stream":
        return Examined(defect="no_video_stream", reason=error.cause)
    if has_no_frames(file):
        with open_video(file) as (_, stream):
            promised = stream.frames
        if promised:
            return Examined(defect="truncated", reason=f"none of {promised} frames is there")
        return Examined(defect="no_frames", reason="the video stream has no frames")
    return Examined(defect="unreadable", reason=decode_error_reason(error))


def _raise_if_memory(error: VideoDecodeError) -> None:
    if error.cause == os.strerror(errno.ENOMEM):
        raise MemoryError from error


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    try:
        return np.ascontiguousarray(frame.to_ndarray())
    except (ValueError, AssertionError):  # PyAV has no array for the format, or for odd sizes.
        return np.ascontiguousarray(frame.to_ndarray(format="rgb24"))
