"""Decoding with decord, where its frames are known to be the right ones.

decord 0.6 returns other frames than asked for on files with variable frame rate, edit lists, open
GOPs and in MPEG-TS, and does not say so. Hence it is used only on files of none of these kinds,
and only after its own frame count and timestamps have been found equal to the demuxed table.
With a plan, decord scales whole frames, straight into RGB, which shifts colours by about one level.
"""

import logging
import os
from pathlib import Path

import numpy as np

from i3d_gn.video_io.crop_plan import CropPlan
from i3d_gn.video_io.decode_pyav import demux_video, open_video, out_of_range, sequential_frames
from i3d_gn.video_io.frame_table import FrameTable
from i3d_gn.video_io.pixels import Orientation, orientation_of

_log = logging.getLogger(__name__)

# decord's timestamps are float32 seconds.
_TIMESTAMP_TOLERANCE_SECONDS = 1e-3


def decode_frames_decord(
    path: str | Path, indices: np.ndarray, *, plan: CropPlan | None, out: np.ndarray | None
) -> np.ndarray | None:
    """See :func:`i3d_gn.video_io.decode.decode_frames`; ``None`` (logged) where decord errs.

    Raises:
        ValueError: decord is not installed.
        VideoDecodeError: as ``decode_frames``.
    """
    try:
        # Loaded only where it is wanted, for it brings an FFmpeg of its own.
        import decord  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"backend decord cannot be used ({error}); pip install decord, which has wheels for "
            "x86-64 alone, or use backend pyav"
        ) from error

    with open_video(path) as (container, stream):
        table, _ = demux_video(path, container, stream, keep=False)
        container_name = container.format.name
        time_base = float(stream.time_base or 0)
        has_b_frames = bool(stream.codec_context.has_b_frames)
    doubt = table.doubt or _unsuitable(table, has_b_frames=has_b_frames)
    if doubt is None:
        if indices.max() >= table.num_frames:
            raise out_of_range(path, int(indices.max()), table.num_frames)
        doubt = _unsuitable_frames(path, container_name)
    if doubt is not None:
        return _left_to_pyav(path, doubt)

    size = {} if plan is None else {"width": plan.resize_width, "height": plan.resize_height}
    unique, inverse = np.unique(indices, return_inverse=True)
    try:
        reader = decord.VideoReader(os.path.abspath(path), ctx=decord.cpu(0), num_threads=1, **size)
        if not _same_timestamps(reader, (table.frame_pts - table.frame_pts[0]) * time_base):
            return _left_to_pyav(path, "it numbers the frames otherwise")
        frames = reader.get_batch(unique.tolist()).asnumpy()
    except (decord.DECORDError, RuntimeError) as error:
        return _left_to_pyav(path, f"it fails: {str(error).strip().splitlines()[-1]}")
    if plan is not None:
        rows = slice(plan.top, plan.top + plan.height)
        columns = slice(plan.left, plan.left + plan.width)
        frames = frames[:, rows, columns]
        if plan.flip:
            frames = frames[:, :, ::-1]
    if out is None:
        return np.ascontiguousarray(frames[inverse])
    if out.shape != (len(indices), *frames.shape[1:]):
        raise ValueError(
            f"out has shape {out.shape}, the frames need {(len(indices), *frames.shape[1:])}"
        )
    out[:] = frames[inverse]
    return out


def _left_to_pyav(path: str | Path, why: str) -> None:
    _log.info("%s: decoded with pyav instead of decord: %s", path, why)


def _unsuitable_frames(path: str | Path, container: str) -> str | None:
    """Why decord would not return the frames as they are, as the first one tells, or ``None``."""
    with open_video(path) as (_, stream):
        _, frame = next(sequential_frames(path, stream))
        kind = (container, stream.codec_context.codec.canonical_name, frame.format.name)
        if kind != ("mov,mp4,m4a,3gp,3g2,mj2", "h264", "yuv420p"):
            return f"it is known to be right on 8-bit 4:2:0 H.264 in MP4 alone, not on {kind}"
        if orientation_of(frame) != Orientation():
            return "the frames are stored rotated"
        if frame.interlaced_frame:
            return "the frames are interlaced"
    return None


def _unsuitable(table: FrameTable, *, has_b_frames: bool) -> str | None:
    """Why decord would return wrong frames, or ``None``."""
    if has_b_frames and np.all(np.diff(table.packet_frame) > 0):
        return "its timestamps may not follow the order of its frames"
    if np.any(table.packet_frame < 0):
        return "an edit list discards frames"
    if table.false_keys:
        return "not all its keyframes are ones"
    keys = np.flatnonzero(table.safe_key)
    last_key = keys[np.searchsorted(keys, np.arange(len(table.packet_pts)), side="right") - 1]
    if np.any(table.packet_pts < table.packet_pts[last_key]):
        return "it has open GOPs"
    steps = np.diff(table.frame_pts)
    if len(steps) and steps.max() - steps.min() > 1:
        return "its frame rate varies"
    return None


def _same_timestamps(reader, seconds: np.ndarray) -> bool:
    """Whether decord has as many frames as the table, at the same times."""
    if len(reader) != len(seconds):
        return False
    starts = reader.get_frame_timestamp(np.arange(len(seconds)))[:, 0].astype(np.float64)
    return bool(np.all(np.abs(starts - starts[0] - seconds) <= _TIMESTAMP_TOLERANCE_SECONDS))
