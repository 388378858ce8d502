"""Small videos encoded by the tests, and a plain sequential decode as the reference."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest


def moving_frames(num_frames: int, height: int, width: int) -> np.ndarray:
    """RGB frames with smooth motion, and the frame number in binary as black and white bars."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    frames = np.empty((num_frames, height, width, 3), dtype=np.uint8)
    for t in range(num_frames):
        for channel in range(3):
            phase = 0.3 * t + 2.0 * channel
            light = np.sin(columns / 3 + 0.3 * t) + np.cos(rows / 2.5 - 0.2 * t)
            color = np.sin(columns / (19 + channel) + phase) + np.cos(rows / 17 - phase / 2)
            frames[t, :, :, channel] = 127 + 30 * light + 25 * color
        bar = max(1, width // 10)
        for bit in range(10):
            frames[t, : height // 4, bit * bar : (bit + 1) * bar] = 235 if t >> bit & 1 else 20
    return frames


def _encode(
    path: Path,
    *,
    codec: str = "libx264",
    num_frames: int = 60,
    height: int = 64,
    width: int = 96,
    pixel_format: str = "yuv420p",
    frame_pts: Callable[[int], int] | None = None,
    rate: int = 25,
    rotation: int = 0,
    muxer_options: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    with av.open(str(path), "w", options=muxer_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = height, width, pixel_format
        stream.codec_context.thread_count = 1
        if frame_pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for t, pixels in enumerate(moving_frames(num_frames, height, width)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = t if frame_pts is None else frame_pts(t)
            frame.time_base = Fraction(1, rate if frame_pts is None else 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _remux(
    source: Path,
    path: Path,
    *,
    first_packet: int = 0,
    shift_frames: int = 0,
    rate: int = 25,
    **muxer_options: str,
) -> Path:
    """Copy packets from `first_packet` on, with shifted timestamps, like `ffmpeg -ss -c copy`."""
    with (
        av.open(str(source)) as reader,
        av.open(str(path), "w", options=muxer_options) as writer,
    ):
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        shift = round(shift_frames / (rate * stream.time_base))
        for number, packet in enumerate(reader.demux(stream)):
            if number < first_packet or not packet.size:
                continue
            packet.pts += shift
            packet.dts += shift
            packet.stream = copy
            writer.mux(packet)
    return path


def _join(
    sources: list[Path],
    path: Path,
    *,
    edit: Callable[[int, int, av.Packet], av.Packet] = lambda source, number, packet: packet,
    rate: int = 25,
) -> Path:
    """Copy the packets of all sources into one stream with the header of the first.

    `edit` gets the number of the source and of the packet in it, and returns the packet to write.
    """
    with av.open(str(sources[0])) as first, av.open(str(path), "w") as writer:
        template = first.streams.video[0]
        if template.codec_context.name == "vp9":
            copy = writer.add_stream("libvpx-vp9", rate=rate)
            copy.height, copy.width = template.height, template.width
        else:
            copy = writer.add_stream_from_template(template)
        start = Fraction(0)
        for number, source in enumerate(sources):
            with av.open(str(source)) as reader:
                packets = [p for p in reader.demux(video=0) if p.size]
                time_base = packets[0].time_base
                for position, original in enumerate(packets):
                    packet = edit(number, position, original)
                    packet.pts = original.pts + round(start / time_base)
                    packet.dts = (original.dts or 0) + round(start / time_base)
                    packet.time_base = time_base
                    packet.stream = copy
                    writer.mux(packet)
            start += Fraction(len(packets), rate)
    return path


def _sequential(path: Path) -> np.ndarray:
    """All frames as RGB, decoded sequentially."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.fixture(scope="session")
def encode_video() -> Callable[..., Path]:
    return _encode


@pytest.fixture(scope="session")
def remux_video() -> Callable[..., Path]:
    return _remux


@pytest.fixture(scope="session")
def join_videos() -> Callable[..., Path]:
    return _join


@pytest.fixture(scope="session")
def decode_sequentially() -> Callable[[Path], np.ndarray]:
    return _sequential


@pytest.fixture(scope="session")
def plain_video(tmp_path_factory) -> Path:
    """60 frames of H.264, 64x96, with a B-pyramid and a keyframe every 12 frames."""
    path = tmp_path_factory.mktemp("plain") / "plain.mp4"
    options = {"g": "12", "bf": "3", "x264-params": "b-pyramid=normal:b-adapt=0:scenecut=0"}
    return _encode(path, options=options)
