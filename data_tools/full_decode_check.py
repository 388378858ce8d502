"""Decode one video completely and classify its defect, if any. Runs in a child process.

The defects are listed in the help text of `i3d-gn verify`.
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
from i3d_gn.files import open_regular
from i3d_gn.video_io.decode import VideoDecodeError, probe_video
from i3d_gn.video_io.decode_pyav import open_video, sequential_frames


@dataclass(frozen=True, kw_only=True)
class CheckedVideo:
    """Result of decoding a video completely.

    Attributes:
        defect: The kind of defect, "" for a valid video.
        reason: Details of the defect.
        facts: The columns of an index, None if not all frames can be decoded.
        content: Hash of all decoded frames, equal for equal frames in any file.
    """

    defect: str
    reason: str = ""
    facts: dict[str, Any] | None = None
    content: str = ""


def check_video(file: Path) -> CheckedVideo:
    """Decode all frames of `file`.

    Raises:
        MemoryError: If there is too little memory.
        OSError: If it is not a regular file, or opening it fails, which says nothing about content.
    """
    with open_regular(file):
        pass
    if file.stat().st_size == 0:
        return CheckedVideo(defect="no_frames", reason="the file is empty")
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
                # Set by decoders that conceal errors with neighboring pixels or earlier frames.
                if frame.is_corrupt:
                    damaged.append(index)
                if frame.pts is None:
                    timestamp_reason = timestamp_reason or f"frame {index} has no timestamp"
                elif previous is not None and frame.pts <= previous:
                    timestamp_reason = (
                        timestamp_reason or f"the timestamp of frame {index} does not increase"
                    )
                previous = previous if frame.pts is None else frame.pts
                num_frames += 1
    except VideoDecodeError as error:
        _raise_if_memory(error)
        broken = f" ({decode_error_reason(error)})"
    if broken or num_frames < info.num_frames:
        reason = f"{num_frames} of {max(info.num_frames, num_frames)} frames can be decoded{broken}"
        return CheckedVideo(defect="truncated", reason=reason)
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
        reason = (
            f"{len(damaged)} of {num_frames} frames are damaged, the first is frame {damaged[0]}"
        )
    return CheckedVideo(
        defect=defect,
        reason=reason,
        facts=facts,
        content=digest.hexdigest(),
    )


def _defect_of(file: Path, error: VideoDecodeError) -> CheckedVideo:
    _raise_if_memory(error)
    if error.cause == "no video stream":
        return CheckedVideo(defect="no_video_stream", reason=error.cause)
    if has_no_frames(file):
        with open_video(file) as (_, stream):
            promised = stream.frames
        if promised:
            return CheckedVideo(
                defect="truncated", reason=f"none of {promised} frames can be decoded"
            )
        return CheckedVideo(defect="no_frames", reason="the video stream has no frames")
    return CheckedVideo(defect="unreadable", reason=decode_error_reason(error))


def _raise_if_memory(error: VideoDecodeError) -> None:
    if error.cause == os.strerror(errno.ENOMEM):
        raise MemoryError from error


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    try:
        return np.ascontiguousarray(frame.to_ndarray())
    except (ValueError, AssertionError):  # PyAV cannot convert this format, or an odd size.
        return np.ascontiguousarray(frame.to_ndarray(format="rgb24"))
