"""Encode frames as an H.264 mp4 with x264."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av


@dataclass(frozen=True, kw_only=True)
class X264Options:
    """Options of x264, under its own names.

    Attributes:
        crf: Quality; lower is better, 18 is visually almost lossless.
        gop: Maximum number of frames from one keyframe to the next.
        preset: Trade-off of speed and size, "ultrafast" to "veryslow".
        tune: Kind of video or decoder to tune for, None for none.
    """

    crf: float
    gop: int
    preset: str
    tune: str | None


def write_h264(
    path: Path, frames: Iterable[av.VideoFrame], *, frame_rate: Fraction, options: X264Options
) -> int:
    """Encode all `frames` to `path` and return their number.

    The same frames give the same bytes on any machine.

    Args:
        path: The mp4 file.
        frames: yuv420p frames of one even size in presentation order, with strictly increasing
            timestamps from 0 in one time base, which the file keeps. Color tags are those of the
            first frame.
        frame_rate: The nominal frame rate.
        options: Options of x264.
    """
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        encoder_options = {
            "crf": f"{options.crf:g}",
            "g": str(options.gop),
            "preset": options.preset,
            # The fast macroblock-tree code of x264 depends on the processor. With AVX-512 its
            # output even differs between runs unless the width is a multiple of 128 pixels.
            "x264-params": "cpu-independent=1",
        }
        if options.tune is not None:
            encoder_options["tune"] = options.tune
        stream = container.add_stream("libx264", rate=frame_rate, options=encoder_options)
        context = stream.codec_context
        context.thread_count = 1
        num_frames = 0
        for frame in frames:
            if num_frames == 0:
                assert frame.format.name == "yuv420p"
                assert frame.pts == 0
                context.width, context.height = frame.width, frame.height
                context.pix_fmt = "yuv420p"
                context.time_base = stream.time_base = frame.time_base
                context.color_range = frame.color_range
                context.colorspace = frame.colorspace
                context.color_primaries = frame.color_primaries
                context.color_trc = frame.color_trc
            # Let x264 choose frame types: those of the source would force its keyframes.
            frame.pict_type = 0
            container.mux(stream.encode(frame))
            num_frames += 1
        container.mux(stream.encode(None))
    return num_frames
