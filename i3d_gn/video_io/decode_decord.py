"""Decoding with decord, for files where its frames are known to be correct.

On files with a variable frame rate, edit lists or open GOPs, and on MPEG-TS, decord 0.6 returns
frames other than those asked for, without an error. It is therefore used only on files of none of
these kinds, and only if its frame count and timestamps equal those of the frame table. In a damaged
file it may still return wrong frames, which only a full decode detects (`i3d-gn verify`). With a
plan, decord scales whole frames straight into RGB, which shifts colors by about one level.
"""

import logging
import os
from pathlib import Path

import numpy as np

from i3d_gn.video_io.crop_plan import CropPlan
from i3d_gn.video_io.decode_pyav import (
    check_size,
    demux_video,
    open_video,
    out_of_range,
    sequential_frames,
)
from i3d_gn.video_io.frame_table import FrameTable
from i3d_gn.video_io.pixels import Orientation, orientation_of

_log = logging.getLogger(__name__)

# decord's timestamps are float32 seconds.
_TIMESTAMP_TOLERANCE_SECONDS = 1e-3


def decode_frames_decord(
    path: str | Path,
    indices: np.ndarray,
    *,
    plan: CropPlan | None,
    size: tuple[int, int] | None,
    out: np.ndarray | None,
) -> np.ndarray | None:
    """See `decode_frames`; `None` if PyAV must decode this file, with the reason logged.

    Raises:
        ValueError: decord is not installed.
        VideoDecodeError: As `decode_frames`.
    """
    try:
        # Imported only if used, as it loads an FFmpeg of its own.
        import decord  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"backend decord is not available ({error}); pip install decord (wheels exist for "
            "x86-64 only), or use backend pyav"
        ) from error

    with open_video(path) as (container, stream):
        table, _ = demux_video(path, container, stream, keep=False)
        container_name = container.format.name
        time_base = float(stream.time_base or 0)
        has_b_frames = bool(stream.codec_context.has_b_frames)
        num_streams = len(container.streams.video)
    reason = "several video streams" if num_streams > 1 else None
    reason = (
        reason or table.fallback_reason or _unsupported_timing(table, has_b_frames=has_b_frames)
    )
    if reason is None:
        if indices.max() >= table.num_frames:
            raise out_of_range(path, int(indices.max()), table.num_frames)
        reason = _unsupported_format(path, container_name, size=size)
    if reason is not None:
        return _fall_back_to_pyav(path, reason)

    resize = {} if plan is None else {"width": plan.resize_width, "height": plan.resize_height}
    unique, rows_of = np.unique(indices, return_inverse=True)
    try:
        reader = decord.VideoReader(
            os.path.abspath(path), ctx=decord.cpu(0), num_threads=1, **resize
        )
        if not _same_timestamps(reader, (table.frame_pts - table.frame_pts[0]) * time_base):
            return _fall_back_to_pyav(path, "decord numbers the frames differently")
        # It seeks to these, in a closed GOP the same number for frame and packet.
        if not table.is_idr[reader.get_key_indices()].all():
            return _fall_back_to_pyav(path, "some packets marked as keyframes are not IDR pictures")
        frames = reader.get_batch(unique.tolist()).asnumpy()
    except (decord.DECORDError, RuntimeError) as error:
        return _fall_back_to_pyav(path, f"decord failed: {str(error).strip().splitlines()[-1]}")
    if plan is not None:
        rows = slice(plan.top, plan.top + plan.height)
        columns = slice(plan.left, plan.left + plan.width)
        frames = frames[:, rows, columns]
        if plan.flip:
            frames = frames[:, :, ::-1]
    if out is None:
        return np.ascontiguousarray(frames[rows_of])
    if out.shape != (len(indices), *frames.shape[1:]):
        raise ValueError(
            f"out has shape {out.shape}, the frames need {(len(indices), *frames.shape[1:])}"
        )
    out[:] = frames[rows_of]
    return out


def _fall_back_to_pyav(path: str | Path, reason: str) -> None:
    _log.info("%s: decoding with pyav instead of decord: %s", path, reason)


def _unsupported_format(
    path: str | Path, container: str, *, size: tuple[int, int] | None
) -> str | None:
    """Why decord would not return correct pixels, judging by the first frame, or `None`."""
    with open_video(path) as (_, stream):
        _, frame = next(sequential_frames(path, stream))
        kind = (container, stream.codec_context.codec.canonical_name, frame.format.name)
        if kind != ("mov,mp4,m4a,3gp,3g2,mj2", "h264", "yuv420p"):
            return f"only 8-bit 4:2:0 H.264 in MP4 is known to decode correctly, not {kind}"
        if orientation_of(frame) != Orientation():
            return "frames are rotated or mirrored"
        if frame.interlaced_frame:
            return "frames are interlaced"
        check_size(path, (frame.height, frame.width), expected=size)
    return None


def _unsupported_timing(table: FrameTable, *, has_b_frames: bool) -> str | None:
    """Why decord would return wrong frames, or `None`."""
    if has_b_frames and np.all(np.diff(table.packet_frame) > 0):
        return "timestamps may not match the order of frames"
    if np.any(table.packet_frame < 0):
        return "an edit list discards frames"
    keys = np.flatnonzero(table.safe_key)
    last_key = keys[np.searchsorted(keys, np.arange(len(table.packet_pts)), side="right") - 1]
    if np.any(table.packet_pts < table.packet_pts[last_key]):
        return "open GOPs"
    steps = np.diff(table.frame_pts)
    if len(steps) and steps.max() - steps.min() > 1:
        return "variable frame rate"
    return None


def _same_timestamps(reader, seconds: np.ndarray) -> bool:
    """Whether decord has the same number of frames as the table, at the same times."""
    if len(reader) != len(seconds):
        return False
    starts = reader.get_frame_timestamp(np.arange(len(seconds)))[:, 0].astype(np.float64)
    return bool(np.all(np.abs(starts - starts[0] - seconds) <= _TIMESTAMP_TOLERANCE_SECONDS))
