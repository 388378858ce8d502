"""CPU seconds for resizing and verifying a 10-second video, compared with the ffmpeg program.

    python benchmarks/bench_transcode.py VIDEO... [--repeat 5] [--markdown PATH]

Protocol: contenders alternate per video, --repeat times after one warm-up, one process at a time
with one thread; reported are medians of user + system time per video. Ours runs in an existing
process, as within a step; ffmpeg starts a process per video, as in a script, so `ffmpeg start`
(`-version`) is measured separately.

resize: short side 256, x264 crf 23, preset medium, GOP 32, tune fastdecode, no sound.
  Ours also reads all packets first to get the expected number of frames, hashes the source, and
  checks that all frames were decoded.
verify: decode all frames. Ours also hashes every frame; ffmpeg does so with -f framemd5.

The last rows compare training options with the defaults of x264: file size, and milliseconds to
decode a random clip of 32 frames at stride 2 (training crop 224) with our decoder.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from report import cpu_name, markdown_table

from data_tools.full_decode_check import check_video
from data_tools.transcode import transcode
from i3d_gn.data.clips import clip_indices, random_start
from i3d_gn.data.transforms import random_crop_plan
from i3d_gn.files import file_sha256
from i3d_gn.video_io.decode import decode_frames, probe_video
from i3d_gn.video_io.h264 import X264Options

TRAINING_OPTIONS = X264Options(crf=23, gop=32, preset="medium", tune="fastdecode")
X264_DEFAULTS = X264Options(crf=23, gop=250, preset="medium", tune=None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments.videos, Path(folder), repeat=arguments.repeat)
    text = "\n".join(
        [
            f"{cpu_name()}, Python {platform.python_version()}, PyAV {av.__version__} "
            f"(FFmpeg {av.ffmpeg_version_info}), {ffmpeg_version()}; "
            f"{len(arguments.videos)} videos x {arguments.repeat}",
            "",
            markdown_table(["", "median", ""], rows),
        ]
    )
    print(text)
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")
    return 0


def measure(videos: list[Path], folder: Path, *, repeat: int) -> list[tuple[str, str, str]]:
    output = folder / "copy.mp4"
    contenders: dict[str, Callable[[Path], object]] = {
        "resize, ours": lambda video: (
            file_sha256(video),
            transcode(video, output, short_side=256, fps=None, options=TRAINING_OPTIONS),
        ),
        "verify, ours": check_video,
    }
    if shutil.which("ffmpeg"):
        contenders |= {
            "resize, ffmpeg": lambda video: ffmpeg_resize(video, output),
            "verify, ffmpeg framemd5": ffmpeg_verify,
            "ffmpeg start": lambda video: run(["ffmpeg", "-version"]),
        }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeat + 1):
        for video in videos:
            for name, work in contenders.items():
                before = cpu_seconds()
                work(video)
                if turn:  # The first one is the warm-up.
                    seconds[name].append(cpu_seconds() - before)
    rows = [
        (name, f"{statistics.median(values):.3f}", "s") for name, values in sorted(seconds.items())
    ]
    return rows + copy_rows(videos, folder, repeat=repeat)


def copy_rows(videos: list[Path], folder: Path, *, repeat: int) -> list[tuple[str, str, str]]:
    """Size and decoding time of copies with training options and with the defaults of x264."""
    copies = {}
    for name, options in (("training options", TRAINING_OPTIONS), ("x264 defaults", X264_DEFAULTS)):
        copies[name] = [folder / f"{name} {i}.mp4" for i in range(len(videos))]
        for video, copy in zip(videos, copies[name], strict=True):
            transcode(video, copy, short_side=256, fps=None, options=options)
    milliseconds: dict[str, list[float]] = {name: [] for name in copies}
    for turn in range(4 * repeat):
        for i in range(len(videos)):
            for name in copies:
                milliseconds[name].append(random_clip_ms(copies[name][i], seed=turn))
    rows = []
    for name, paths in copies.items():
        mean_kib = statistics.mean(path.stat().st_size for path in paths) / 1024
        rows.append((f"{name}: size per video", f"{mean_kib:.0f}", "KiB"))
        rows.append((f"{name}: 32x2 clip", f"{statistics.median(milliseconds[name]):.1f}", "ms"))
    return rows


def random_clip_ms(path: Path, *, seed: int) -> float:
    rng = np.random.default_rng(seed)
    info = probe_video(path)
    start = random_start(info.num_frames, num_frames=32, stride=2, rng=rng)
    indices = clip_indices(start, num_frames=32, stride=2, video_length=info.num_frames)
    plan = random_crop_plan(
        info.height,
        info.width,
        short_side=(256, 320),
        crop_size=224,
        flip_probability=0.5,
        rng=rng,
    )
    started = time.perf_counter()
    decode_frames(path, indices, plan=plan)
    return 1000 * (time.perf_counter() - started)


def ffmpeg_resize(video: Path, output: Path) -> None:
    scale = "scale='if(gt(iw,ih),-2,256)':'if(gt(iw,ih),256,-2)':flags=bicubic+accurate_rnd"
    encoder = ["-c:v", "libx264", "-crf", "23", "-preset", "medium", "-g", "32"]
    encoder += ["-tune", "fastdecode", "-threads", "1", "-pix_fmt", "yuv420p"]
    timing = ["-fps_mode", "passthrough", "-movflags", "+faststart"]
    source = ["-threads", "1", "-i", str(video), "-an", "-filter_threads", "1"]
    run([*FFMPEG, *source, "-vf", scale, *encoder, *timing, str(output)])


def ffmpeg_verify(video: Path) -> None:
    run([*FFMPEG, "-threads", "1", "-i", str(video), "-an", "-f", "framemd5", os.devnull])


FFMPEG = ["ffmpeg", "-nostdin", "-loglevel", "error", "-y"]


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def cpu_seconds() -> float:
    """User and system time of this process and its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ffmpeg_version() -> str:
    if not shutil.which("ffmpeg"):
        return "no ffmpeg program"
    done = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True)
    return " ".join(done.stdout.split()[:3])


if __name__ == "__main__":
    sys.exit(main())
