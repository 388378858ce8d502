"""Write frames as an H.264 mp4 with x264, in this process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av


@dataclass(frozen=True, kw_only=True)
class X264Options:
    """What x264 is told, under its own names.

    ``crf`` is the quality (lower is better, 18 hardly visibly worse than the source), ``gop`` the
    most frames from one keyframe to the next, ``tune`` None for none.
    """

    crf: float
    gop: int
    preset: str
    tune: str | None


def write_h264(
    path: Path, frames: Iterable[av.VideoFrame], *, frame_rate: Fraction, options: X264Options
) -> int:
    """Encode all ``frames`` to ``path``, return how many.

    They are yuv420p of one even size, in presentation order, with strictly increasing timestamps
    from 0 in one time base, which the file keeps; colour tags are taken from the first.
    ``frame_rate`` is the nominal one. The same frames give the same bytes, on any machine.
    """
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        encoder_options = {
            "crf": f"{options.crf:g}",
            "g": str(options.gop),
            "preset": options.preset,
            # x264's fast macroblock-tree code (mbtree) depends on the processor, and on AVX-512
            # gives other bytes from run to run unless pictures are a multiple of 128 pixels wide.
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
            # x264 chooses frame types; those of the source would force its own keyframes.
            frame.pict_type = 0
            container.mux(stream.encode(frame))
            num_frames += 1
        container.mux(stream.encode(None))
    return num_frames
