"""Look at one video: what it is, or why it cannot be used. Runs in a child process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from i3d_gn.video_io.decode import VideoDecodeError, count_decodable_frames, probe_video
from i3d_gn.video_io.decode_pyav import open_video, sequential_frames


@dataclass(frozen=True, kw_only=True)
class Probed:
    """``verdict`` is usable, empty or undecodable; ``facts`` are the columns of the index."""

    verdict: str
    reason: str = ""
    facts: dict[str, Any] | None = None


def probe(root: Path, path: str, *, decode: bool) -> Probed:
    """Open ``root / path`` and decode its first frame, with ``decode`` all of them.

    Raises ``OSError`` where the file cannot be opened, which says nothing about its content.
    """
    file = root / path
    with open(file, "rb"):
        pass
    if file.stat().st_size == 0:
        return Probed(verdict="empty", reason="the file has no bytes")
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
    """The error without the file's name, which a report has in a place of its own."""
    return error.cause if error.frame is None else f"frame {error.frame}: {error.cause}"


def has_no_frames(file: Path) -> bool:
    """Whether it is a sound video file, only without a frame in it."""
    try:
        with open_video(file) as (_, stream):
            return next(sequential_frames(file, stream), None) is None
    except VideoDecodeError:
        return False
