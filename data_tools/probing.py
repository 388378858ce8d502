"""Probe one video: its properties, or why it is unusable. Runs in a child process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from i3d_gn.files import open_regular
from i3d_gn.video_io.decode import VideoDecodeError, count_decodable_frames, probe_video
from i3d_gn.video_io.decode_pyav import open_video, sequential_frames


@dataclass(frozen=True, kw_only=True)
class Probed:
    """Result of a probe: `verdict` is usable, empty or undecodable, `facts` are index columns."""

    verdict: str
    reason: str = ""
    facts: dict[str, Any] | None = None


def probe(root: Path, path: str, *, decode: bool) -> Probed:
    """Open `root / path` and decode its first frame, or all frames if `decode`.

    Raises:
        OSError: If it is not a regular file, or opening it fails, which says nothing about content.
    """
    file = root / path
    with open_regular(file):
        pass
    if file.stat().st_size == 0:
        return Probed(verdict="empty", reason="the file is empty")
    try:
        info = probe_video(file)
        if decode:
            num_decoded = count_decodable_frames(file)
            if num_decoded != info.num_frames:
                reason = f"{num_decoded} of {info.num_frames} frames can be decoded"
                return Probed(verdict="undecodable", reason=reason)
    except VideoDecodeError as error:
        if has_no_frames(file):
            return Probed(verdict="empty", reason="the video stream has no frames")
        return Probed(verdict="undecodable", reason=decode_error_reason(error))
    return Probed(
        verdict="usable",
        facts={
            "num_frames": info.num_frames,
            "fps": float(info.fps),
            "duration_seconds": float(info.duration_seconds),
            "width": info.width,
            "height": info.height,
        },
    )


def decode_error_reason(error: VideoDecodeError) -> str:
    """The error message without the file name, which reports have in a separate field."""
    return error.cause if error.frame is None else f"frame {error.frame}: {error.cause}"


def has_no_frames(file: Path) -> bool:
    """Whether the file is a valid video without any frame."""
    try:
        with open_video(file) as (_, stream):
            return next(sequential_frames(file, stream), None) is None
    except VideoDecodeError:
        return False
