"""Time to decode the frames of a clip, compared with other decoders, and their correctness.

    python benchmarks/bench_decode.py [--quick] [--json PATH] [--markdown PATH]

Protocol: each decoder has its own process; all are pinned to the same core, and only one works at
a time. Each job (video, start, scale, crop, flip) is run by all decoders before the next job, so
that other load on the machine affects all alike. Times are medians over the jobs, after one warm-up
job. `wrong` counts returned frames that are less similar to the requested frame than to one of its
neighbors in a sequential decode. `peak` is the memory that the process of a decoder needed beyond
what it held before the case. `tuned` repeats the case with glibc keeping freed memory
(MALLOC_MMAP_MAX_=0, large trim threshold and top pad), for all decoders.

Decoders that are not installed are skipped, with a message. OpenCV, which is not a dependency, can
be provided on PYTHONPATH.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from decode_peers import PEERS, Job, cut, library_path_for_torchcodec
from report import cpu_name, markdown_table

TUNED_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}

# Name: frames, height, width, x264 options.
GENERATED: dict[str, tuple[int, int, int, dict[str, str]]] = {
    "340x256 gop12": (300, 256, 340, {"g": "12"}),
    "340x256 gop250": (300, 256, 340, {"g": "250"}),
    "340x256 training encode": (300, 256, 340, {"g": "32", "tune": "fastdecode"}),
    "1280x720 gop12": (300, 720, 1280, {"g": "12"}),
    "1280x720 gop250": (300, 720, 1280, {"g": "250"}),
}
# File and workload of a quick run, and the number of jobs.
QUICK_FRAMES = 160
QUICK = {
    ("340x256 gop250", "32x2 clip"): 5,
    ("340x256 training encode", "32x2 clip"): 5,
    ("340x256 gop250", "10-clip test"): 1,
}

# Name: clips (0: one at a random start, with the training augmentation), frames, stride.
WORK = {"32x2 clip": (0, 32, 2), "64x1 clip": (0, 64, 1), "10-clip test": (10, 32, 2)}


def generate_video(path: Path, num_frames: int, height: int, width: int, options: dict) -> None:
    """Write an H.264 video of a panning textured scene with a moving object."""
    import av

    rng = np.random.default_rng(0)
    scene = np.zeros((height * 2, width * 2, 3))
    for cell in (4, 16, 64):
        coarse = rng.normal(size=(scene.shape[0] // cell + 2, scene.shape[1] // cell + 2, 3))
        fine = coarse.repeat(cell, 0).repeat(cell, 1)[: scene.shape[0], : scene.shape[1]]
        scene += fine * cell**0.5 * (0.4 * fine.mean(2, keepdims=True) + 1)
    scene = np.clip(128 + 9 * scene, 0, 255).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "23", **options})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for t in range(num_frames):
            top = round(height / 2 * (1 + np.sin(t / 40)))
            left = round(width / 2 * (1 + np.cos(t / 55)))
            pixels = scene[top : top + height, left : left + width].copy()
            size = height // 4
            row, column = (7 * t) % (height - size), (5 * t) % (width - size)
            pixels[row : row + size, column : column + size] = 255 - scene[:size, :size]
            pixels += rng.integers(0, 6, (height, width, 1), dtype=np.uint8) * (pixels < 250)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))


def make_jobs(paths: list[Path], work: str, count: int) -> list[Job]:
    """Jobs that depend only on `paths`, `work` and `count`, the same for every decoder."""
    from i3d_gn.data.clips import clip_indices, random_start, spaced_starts
    from i3d_gn.data.transforms import evaluation_crops, random_crop_plan
    from i3d_gn.video_io.decode import probe_video

    num_clips, num_frames, stride = WORK[work]
    rng = np.random.default_rng(0)
    jobs = []
    for number in range(count):
        path = paths[number % len(paths)]
        info = probe_video(path)
        length = info.num_frames
        if num_clips:
            starts = spaced_starts(
                length,
                num_clips=num_clips,
                num_frames=num_frames,
                stride=stride,
                spacing="nonlocal",
            ).tolist()
            plan, _ = evaluation_crops(info.height, info.width, short_side=256, mode="full")
        else:
            starts = [random_start(length, num_frames=num_frames, stride=stride, rng=rng)]
            plan = random_crop_plan(
                info.height,
                info.width,
                short_side=(256, 320),
                crop_size=224,
                flip_probability=0.5,
                rng=rng,
            )
        clips = [
            clip_indices(start, num_frames=num_frames, stride=stride, video_length=length)
            for start in starts
        ]
        jobs.append(
            Job(
                path=str(path),
                fps=info.fps,
                clips=np.stack(clips),
                resize=(plan.resize_height, plan.resize_width),
                crop=(plan.top, plan.left, plan.height, plan.width),
                flip=plan.flip,
            )
        )
    return jobs


def thumbnails(frames: np.ndarray) -> np.ndarray:
    """Means over 16x16 pixels: enough to tell frames apart for any resize filter."""
    frames = np.asarray(frames)
    height, width = (n // 16 * 16 for n in frames.shape[1:3])
    blocks = frames[:, :height, :width].reshape(len(frames), height // 16, 16, width // 16, 16, 3)
    return blocks.mean((2, 4), dtype=np.float32)


def sequential_thumbnails(job: Job) -> np.ndarray:
    """Thumbnails of all frames from a sequential decode."""
    import av

    height, width = job.resize
    with av.open(job.path) as container:
        container.streams.video[0].thread_type = "NONE"
        return np.concatenate(
            [
                thumbnails(cut(f.to_ndarray(format="rgb24", width=width, height=height)[None], job))
                for f in container.decode(video=0)
            ]
        )


def count_wrong(job: Job, got: list[np.ndarray], truth: np.ndarray) -> int:
    """Number of frames that are closer to another frame of the video than to the requested one."""
    wrong = 0
    for indices, clip in zip(job.clips, got, strict=True):
        if len(clip) != len(indices):
            wrong += len(indices)
            continue
        # Conversions to RGB differ by a constant of one or two levels, which in a fade is a frame.
        unbiased = clip - np.median(clip - truth[indices], axis=(0, 1, 2))
        for index, thumbnail in zip(indices, unbiased, strict=True):
            near = truth[max(0, index - 12) : index + 13]
            distances = np.abs(near - thumbnail).mean((1, 2, 3))
            # Thumbnails of a still scene are too similar to tell apart.
            wrong += distances.min() + 0.05 < distances[min(index, 12)]
    return wrong


def serve(name: str, connection) -> None:
    """The process of one decoder: run jobs until `None` is received."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core enforces a single thread
    try:
        run = PEERS[name]()
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
    except (ImportError, OSError, RuntimeError) as error:
        connection.send(str(error).strip().splitlines()[0])
        return
    connection.send(None)
    baseline = 0
    while (request := connection.recv()) is not None:
        job, wants_thumbnails, is_new_case = request
        if is_new_case:
            baseline = memory_kilobytes("VmRSS")
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        started = time.perf_counter()
        clips = run(job)
        milliseconds = 1e3 * (time.perf_counter() - started)
        peak = (memory_kilobytes("VmHWM") - baseline) / 1024
        shown = [thumbnails(np.asarray(c)) for c in clips] if wants_thumbnails else None
        del clips
        connection.send((milliseconds, peak, shown))


def memory_kilobytes(field: str, process: int | str = "self") -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return 0


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for processes started in the block."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Server:
    """A decoder in a process of its own."""

    def __init__(self, name: str, variables: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, far_end = context.Pipe()
        with environment({"OMP_NUM_THREADS": "1", **variables}):
            self._process = context.Process(target=serve, args=(name, far_end), daemon=True)
            self._process.start()
        far_end.close()

    def unavailable_reason(self) -> str | None:
        """Why the decoder cannot be used, or `None`; call this once."""
        try:
            return self.connection.recv()
        except EOFError:
            return "its process died"

    def run(self, job: Job, *, wants_thumbnails: bool, is_new_case: bool):
        """Milliseconds, peak memory in MB, and thumbnails of the clips if requested."""
        self.connection.send((job, wants_thumbnails, is_new_case))
        return self.connection.recv()

    def stop(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self._process.join()


def run_case(servers: dict[str, Server], jobs: list[Job]) -> dict[str, dict]:
    """Run each job on each decoder in turn, after a warm-up with the first job."""
    times: dict[str, list[float]] = {name: [] for name in servers}
    wrong = dict.fromkeys(servers, 0)
    peaks = dict.fromkeys(servers, 0.0)
    truths: dict[tuple, np.ndarray] = {}
    for number, job in enumerate([jobs[0], *jobs]):
        for name, server in servers.items():
            milliseconds, peak, shown = server.run(
                job, wants_thumbnails=number > 0, is_new_case=number == 0
            )
            if number == 0:
                continue
            key = (job.path, job.resize, job.crop, job.flip)
            if key not in truths:
                truths[key] = sequential_thumbnails(job)
            times[name].append(milliseconds)
            peaks[name] = max(peaks[name], peak)
            wrong[name] += int(count_wrong(job, shown, truths[key]))
    return {
        name: {
            "ms": round(statistics.median(times[name]), 2),
            "frames_wrong": wrong[name],
            "frames": sum(job.clips.size for job in jobs),
            "peak_mb": round(peaks[name], 1),
        }
        for name in servers
    }


def markdown(rows: list[dict]) -> str:
    """One table per case; the last column is the time relative to `i3d_gn`."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        ours = next(row["ms"] for row in mine if row["peer"] == "i3d_gn")
        table = markdown_table(
            ["decoder", "ms", "wrong", "peak MB", "relative"],
            (
                (
                    row["peer"], f"{row['ms']:.1f}", f"{row['frames_wrong']} of {row['frames']}",
                    f"{row['peak_mb']:.0f}", f"{row['ms'] / ours:.2f}",
                )
                for row in sorted(mine, key=lambda row: row["ms"])
            ),
        )  # fmt: skip
        lines += [f"\n### {case}\n", table]
    return "\n".join(lines)


def machine() -> str:
    import av

    return f"{cpu_name()}, Python {platform.python_version()}, PyAV {av.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="two files, 5 jobs, no tuned allocator"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    parser.add_argument("--repeats", type=int, default=5, help="jobs per case")
    arguments = parser.parse_args()

    allocators = {"": {}} if arguments.quick else {"": {}, ", tuned": TUNED_ALLOCATOR}
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        videos: dict[str, list[Path]] = {}
        for name in dict.fromkeys(n for n, _ in QUICK) if arguments.quick else GENERATED:
            videos[name] = [Path(folder) / f"{name.replace(' ', '-')}.mp4"]
            num_frames, height, width, options = GENERATED[name]
            num_frames = QUICK_FRAMES if arguments.quick else num_frames
            generate_video(videos[name][0], num_frames, height, width, options)
        real = Path(__file__).resolve().parents[2] / "shared/data/kinetics_tiny/train"
        if real.is_dir() and not arguments.quick:
            videos["kinetics_tiny"] = sorted(real.glob("*.mp4"))[::3]

        for allocator, variables in allocators.items():
            servers = {}
            for peer in PEERS:
                if arguments.quick and peer == "pytorchvideo_decord":
                    continue
                more = dict(variables)
                if peer == "torchcodec":
                    more["LD_LIBRARY_PATH"] = library_path_for_torchcodec()
                servers[peer] = Server(peer, more)
            for peer in list(servers):
                if reason := servers[peer].unavailable_reason():
                    print(f"{peer} is skipped: {reason}")
                    del servers[peer]
            for name, paths in videos.items():
                for work in WORK:
                    if arguments.quick and (name, work) not in QUICK:
                        continue
                    count = QUICK[name, work] if arguments.quick else arguments.repeats
                    count = max(count, len(paths))
                    case = f"{name}, {work}{allocator}"
                    measured = run_case(servers, make_jobs(paths, work, count))
                    rows += [{"case": case, "peer": p, **row} for p, row in measured.items()]
                    print(markdown([row for row in rows if row["case"] == case]), flush=True)
            for server in servers.values():
                server.stop()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(f"{machine()}\n{markdown(rows)}\n")


if __name__ == "__main__":
    main()
