"""Decoding with PyAV: the frames of a full sequential decode, with as little work as possible.

Where packets correspond to frames (see `frame_table`), only the packets from the keyframe before a
frame up to that frame are decoded; in H.264, frames that are neither requested nor referenced are
skipped. Any other file is decoded from its start, counting frames. Both give the frames of a full
sequential decode, with one exception: if the decoder drops the frame of a damaged packet without an
error, in a part of the file that is not decoded here, later frames are numbered as if it existed.
Only decoding the whole file can detect that.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

from i3d_gn.files import check_regular
from i3d_gn.video_io.crop_plan import CropPlan
from i3d_gn.video_io.errors import VideoDecodeError
from i3d_gn.video_io.frame_table import (
    FrameTable,
    FrameTableBuilder,
    has_side_data,
)
from i3d_gn.video_io.pixels import CropWriter, FrameWriter, orientation_of

# Files up to this size are read once and their packets kept; larger ones are read twice.
KEEP_PACKETS_BYTES = 32 * 2**20

CHUNK_PACKETS = 64

# Codecs of still pictures, which are not the video if there is another stream.
_PICTURE_CODECS = frozenset({"mjpeg", "png", "bmp", "gif", "tiff", "webp", "jpeg2000", "jpegls"})

# H.264 and HEVC have B-frames, for which AVI has no presentation timestamps.
_REORDERING_CODECS = frozenset({"h264", "hevc"})

# A frame is stored at most this many packets after one that is shown later: twice the size of the
# decoded picture buffers of H.264 (A.3.1) and HEVC (A.4.2).
MAX_REORDER = 32

# Yields packets `first` to `stop - 1` of the file, in decoding order.
_ReadPackets = Callable[[int, int], Iterator[av.Packet]]

# Ignore titles and comments that are not UTF-8; PyAV 19 always does.
_ANY_METADATA: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
)


class _TableError(Exception):
    """The decoder's frames contradict the table; decode sequentially instead."""


@contextlib.contextmanager
def open_video(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the default or best video stream of a file for decoding on one thread.

    Attached pictures (cover art), which are video streams to FFmpeg, are ignored.

    Raises:
        VideoDecodeError: The file is not a readable video, has no video stream, or there is no
            decoder for it.
    """
    try:
        check_regular(path)
        # An absolute path: FFmpeg would take "a" in "a:b.mp4" for a protocol.
        container = av.open(os.path.abspath(path), **_ANY_METADATA)
    except (FFmpegError, OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise VideoDecodeError(path, _reason(error)) from error
    with container:
        streams = video_streams(container)
        if not streams:
            raise VideoDecodeError(path, "no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise VideoDecodeError(path, "no decoder for its video stream")
        stream.codec_context.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        yield container, stream


def video_streams(container: InputContainer) -> list[VideoStream]:
    """The video streams of a file without attached pictures, starting with the one to decode.

    This is a stream of video rather than a still picture, and of these the one that FFmpeg prefers:
    a default stream, or else the one with the highest bit rate.
    """
    best = container.streams.best("video")

    def rank(stream: VideoStream) -> tuple[bool, bool, bool]:
        context = stream.codec_context
        is_picture = context is not None and context.codec.canonical_name in _PICTURE_CODECS
        return is_picture, stream is not best, not stream.disposition & Disposition.default

    streams = container.streams.video
    return sorted((s for s in streams if not s.disposition & Disposition.attached_pic), key=rank)


def demux_video(
    path: str | Path,
    container: InputContainer,
    stream: VideoStream,
    *,
    keep: bool,
    last_index: int | None = None,
) -> tuple[FrameTable, list[av.Packet] | None]:
    """Read packets without decoding: the frame table and, if `keep`, the packets.

    With `last_index`, reading stops once the table is final up to that frame.
    """
    context = stream.codec_context
    builder = FrameTableBuilder(
        container=container.format.name,
        codec=context.codec.canonical_name,
        extradata=bytes(context.extradata or b""),
    )
    packets: list[av.Packet] = []
    source = _packets(path, container, stream)
    try:
        while chunk := list(itertools.islice(source, CHUNK_PACKETS)):
            builder.extend(chunk)
            if keep:
                packets += chunk
            if last_index is not None and builder.num_shown > last_index + MAX_REORDER:
                break
    except (FFmpegError, OSError) as error:
        raise VideoDecodeError(path, _reason(error)) from error
    return builder.build(), packets if keep else None


def sequential_frames(path: str | Path, stream: VideoStream) -> Iterator[tuple[int, av.VideoFrame]]:
    """All frames of a newly opened stream in presentation order, with their index.

    Raises:
        VideoDecodeError: At the first frame that fails; all frames before it are good.
    """
    container = cast("InputContainer", stream.container)
    codec = stream.codec_context.codec.canonical_name
    # Packets of AVI have only decoding times, which are also those at which frames are shown: the
    # n-th frame at the time of the n-th packet.
    is_avi = container.format.name == "avi" and codec in _REORDERING_CODECS
    times: list[int | None] = []
    index = 0
    try:
        for packet in _packets(path, container, stream, flush=True):
            if packet.size:
                times.append(packet.dts)
            for frame in packet.decode():
                if is_avi:
                    frame.pts = times[index] if index < len(times) else None
                yield index, cast("av.VideoFrame", frame)
                index += 1
    except (FFmpegError, OSError) as error:
        raise VideoDecodeError(path, _reason(error), frame=index) from error


def _packets(
    path: str | Path, container: InputContainer, stream: VideoStream, *, flush: bool = False
) -> Iterator[av.Packet]:
    """Packets that hold data, and to `flush` the empty one at the end.

    Raises:
        VideoDecodeError: They are encrypted.
    """
    while True:
        try:
            for packet in container.demux(stream):
                if has_side_data(packet, "encryption_info"):
                    raise VideoDecodeError(path, "the video is encrypted")
                if packet.size or flush:
                    yield packet
            return
        except IndexError:
            # PyAV has read the first packet of a stream that begins in the middle of the file, and
            # does not know it: its list of streams is from the beginning. The next packet follows.
            continue


def decode_frames_pyav(
    path: str | Path,
    indices: np.ndarray,
    *,
    plan: CropPlan | None,
    size: tuple[int, int] | None,
    out: np.ndarray | None,
) -> np.ndarray:
    """See `decode_frames`, which validates `indices`."""
    with open_video(path) as (container, stream):
        keep = 0 < container.size <= KEEP_PACKETS_BYTES
        table, packets = demux_video(
            path, container, stream, keep=keep, last_index=int(indices.max())
        )
        if table.fallback_reason is None:
            if indices.max() >= table.num_frames:
                raise out_of_range(path, int(indices.max()), table.num_frames)
            collector = FrameCollector(path, indices, plan=plan, size=size, out=out)
            try:
                read = _kept_packets(packets) if packets else _seeking(container, stream, table)
                _decode_ranges(stream, table, read, collector)
                return collector.result()
            except _TableError:
                pass  # decode sequentially, which also finds where a broken file fails

    with open_video(path) as (_, stream):
        collector = FrameCollector(path, indices, plan=plan, size=size, out=out)
        count = 0
        for index, frame in sequential_frames(path, stream):
            if index == 0:
                collector.prepare(frame)
            collector.take(index, frame)
            count = index + 1
            if collector.is_complete:
                return collector.result()
        raise out_of_range(path, int(indices.max()), count)


def out_of_range(path: str | Path, index: int, num_frames: int) -> VideoDecodeError:
    """The error for an index past the end of the video."""
    return VideoDecodeError(path, f"the video has only {num_frames} frames", frame=index)


class FrameCollector:
    """Writes requested frames to their rows of the output, in whatever order they are decoded."""

    def __init__(
        self,
        path: str | Path,
        indices: np.ndarray,
        *,
        plan: CropPlan | None,
        size: tuple[int, int] | None,
        out: np.ndarray | None,
    ) -> None:
        self._path = path
        self._rows: dict[int, list[int]] = {}
        for row, index in enumerate(indices.tolist()):
            self._rows.setdefault(index, []).append(row)
        self._num_rows = len(indices)
        self._plan = plan
        self._size = size
        self._out = out
        self._writer: CropWriter | FrameWriter | None = None

    def wanted(self) -> np.ndarray:
        """The requested indices that were not written yet, sorted."""
        return np.array(sorted(self._rows), dtype=np.int64)

    def is_wanted(self, index: int) -> bool:
        """Whether the frame was requested and not written yet."""
        return index in self._rows

    @property
    def is_complete(self) -> bool:
        """Whether all requested frames were written."""
        return not self._rows

    def take(self, index: int, frame: av.VideoFrame) -> None:
        """Write the frame if it was requested and not written before."""
        rows = self._rows.pop(index, None)
        if rows is None:
            return
        try:
            if self._writer is None:
                self.prepare(frame)
            assert self._writer is not None and self._out is not None
            self._writer.write(frame, self._out[rows[0]])
        except (FFmpegError, OSError) as error:
            raise VideoDecodeError(self._path, _reason(error), frame=index) from error
        for row in rows[1:]:
            np.copyto(self._out[row], self._out[rows[0]])

    def result(self) -> np.ndarray:
        """The output, once complete."""
        assert self.is_complete and self._out is not None
        return self._out

    def prepare(self, frame: av.VideoFrame) -> None:
        """Set up output and conversion for the size and orientation of `frame`.

        Frames of another size are scaled to this one.
        """
        height, width = orientation_of(frame).upright_size(frame)
        check_size(self._path, (height, width), expected=self._size)
        plan = self._plan or CropPlan(height, width, 0, 0, height, width)
        self._writer = frame_writer(frame, plan)
        shape = (self._num_rows, plan.height, plan.width, 3)
        if self._out is None:
            self._out = np.empty(shape, dtype=np.uint8)
        elif self._out.shape != shape:
            raise ValueError(f"out has shape {self._out.shape}, the frames need {shape}")


def frame_writer(frame: av.VideoFrame, plan: CropPlan) -> CropWriter | FrameWriter:
    """What writes frames of a video, whose first one this is, as `plan` says."""
    orientation = orientation_of(frame)
    if (plan.resize_height, plan.resize_width) == orientation.upright_size(frame):
        return FrameWriter(plan, orientation=orientation, size=(frame.height, frame.width))
    return CropWriter(plan, orientation=orientation)


def check_size(
    path: str | Path, upright: tuple[int, int], *, expected: tuple[int, int] | None
) -> None:
    """Raise `VideoDecodeError` if upright frames do not have the expected (height, width)."""
    if expected is not None and upright != tuple(expected):
        raise VideoDecodeError(
            path,
            f"frames are {upright[1]}x{upright[0]} pixels (width x height), expected "
            f"{expected[1]}x{expected[0]}: was the file replaced?",
        )


def _decode_ranges(
    stream: VideoStream, table: FrameTable, read: _ReadPackets, collector: FrameCollector
) -> None:
    """Decode the packets of the requested frames and those that they depend on.

    Frames are identified by their timestamps, and must come out in order. Each packet that is shown
    must yield its frame, except for leading pictures of an open GOP whose previous GOP is not
    decoded.
    """
    frame_of = dict(zip(table.frame_pts.tolist(), range(table.num_frames), strict=True))
    context = stream.codec_context
    size = (context.width, context.height)
    for first, stop in table.packet_ranges(collector.wanted()):
        key_frame = table.packet_frame[first]
        expected: set[int] = set()
        last = -1

        def take(
            frames: list[av.VideoFrame],
            expected: set[int] = expected,
            key_frame: int = key_frame,
        ) -> None:
            nonlocal last
            for frame in frames:
                index = -1 if frame.pts is None else frame_of.get(frame.pts, -1)
                # Fields of an interlaced frame may lie in two packets. Error concealment in a
                # damaged frame depends on all frames before it.
                damaged = frame.is_corrupt and index >= key_frame
                # All frames are scaled to the size of the first, which may be another.
                resized = (frame.width, frame.height) != size
                if frame.interlaced_frame or damaged or resized or index <= last:
                    raise _TableError
                last = index
                expected.discard(index)
                collector.take(index, frame)

        try:
            for position, packet in zip(range(first, stop), read(first, stop), strict=True):
                index = int(table.packet_frame[position])
                can_skip = table.is_unreferenced[position] and position < stop - 1
                if can_skip and not collector.is_wanted(index):
                    continue
                if index >= key_frame:
                    expected.add(index)
                take(context.decode(packet))
            take(context.decode(None))
        except FFmpegError as error:
            raise _TableError from error
        if expected:
            raise _TableError
        context.flush_buffers()


def _kept_packets(packets: list[av.Packet]) -> _ReadPackets:
    return lambda first, stop: iter(packets[first:stop])


def _seeking(container: InputContainer, stream: VideoStream, table: FrameTable) -> _ReadPackets:
    """Read packets from the file again, starting at a keyframe."""

    def read(first: int, stop: int) -> Iterator[av.Packet]:
        container.seek(int(table.packet_seek[first]), stream=stream)
        position = None
        for packet in container.demux(stream):
            if not packet.size:
                break
            if position is None and packet.is_keyframe and packet.pts == table.packet_pts[first]:
                position = first
            if position is None:
                continue
            if packet.pts != table.packet_pts[position]:
                break
            yield packet
            position += 1
            if position == stop:
                return
        raise _TableError  # seeking did not reach the keyframe

    return read


def _reason(error: Exception) -> str:
    """The message of a system or FFmpeg error, without number and file name."""
    return getattr(error, "strerror", None) or str(error)
