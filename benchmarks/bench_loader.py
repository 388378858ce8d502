"""Time per clip of a whole loader, compared with other decoders, and scaling with workers.

    python benchmarks/bench_loader.py [--quick] [--json PATH] [--workers N]

Protocol: training clips of 32 frames at stride 2 (short side 256 to 320, crop 224) in batches of 4,
decoded in one process without workers, then by a `torch.utils.data.DataLoader` with N workers, each
on one thread. `i3d_gn` is the package's own dataset and loader; the others are a minimal dataset
around the decoders of `decode_peers.py`. All take turns in each repeat; times are medians over the
repeats. `scaling` is the rate of the loader divided by N times the rate of one process. `peak_mb`
is the largest peak resident memory of a worker.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_decode import GENERATED, generate_video, machine, make_jobs, memory_kilobytes
from decode_peers import PEERS, Job, library_path_for_torchcodec
from report import markdown_table
from torch.utils.data import DataLoader, Dataset

from i3d_gn.data.batches import Stream
from i3d_gn.data.loader import batch_loader
from i3d_gn.data.samplers import ShuffledMicroBatches
from i3d_gn.data.videos import RandomClips
from i3d_gn.video_io.decode import probe_video
from i3d_gn.video_io.index import VideoIndex, VideoRecord, write_index

BATCH = 4


class PeerClips(Dataset):
    """The clips of `jobs`, from one decoder."""

    def __init__(self, peer: str, jobs: list[Job]) -> None:
        self.peer = peer
        self.jobs = jobs
        self._run = None

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> torch.Tensor:
        if self._run is None:  # decoders are opened in the worker
            self._run = PEERS[self.peer]()
        (clip,) = self._run(self.jobs[number])
        return torch.from_numpy(np.ascontiguousarray(clip))


def make_index(folder: Path, videos: list[Path]) -> VideoIndex:
    records = []
    for path in videos:
        info = probe_video(path)
        records.append(
            VideoRecord(
                path=path.name, label=0, num_frames=info.num_frames, fps=info.fps,
                duration_seconds=info.duration_seconds, width=info.width, height=info.height,
            )
        )  # fmt: skip
    write_index(folder / "index.parquet", records, class_names=["any"], root=videos[0].parent)
    return VideoIndex.load(folder / "index.parquet")


def loader_of(peer: str, index: VideoIndex, jobs: list[Job], *, workers: int, repeat: int):
    """The same number of batches, from the loader of `peer`."""
    if peer != "i3d_gn":
        return DataLoader(PeerClips(peer, jobs), batch_size=BATCH, num_workers=workers)
    clips = RandomClips(
        index, num_frames=32, stride=2, short_side=(256, 320), crop_size=224,
        flip_probability=0.5, backend="pyav", seed=repeat, stream=Stream.TRAIN_CLIP,
    )  # fmt: skip
    order = ShuffledMicroBatches(
        len(index), seed=repeat, global_batch_size=BATCH, micro_batch_size=BATCH, rank=0,
        world_size=1, first_step=0, last_step=len(jobs) // BATCH,
    )  # fmt: skip
    return batch_loader(clips, order, num_workers=workers, device=torch.device("cpu"))


def measure(loader, *, skip: int) -> tuple[float, float | None]:
    """Milliseconds per clip after batch `skip`, and the peak memory of a worker in MB."""
    started, clips, peak = 0.0, 0, None
    batches = iter(loader)
    workers = [worker.pid for worker in getattr(batches, "_workers", [])]
    for number in range(len(loader)):
        batch = next(batches)
        clips += len(batch[0]) if isinstance(batch, tuple) else len(batch)
        if number == skip:
            started, clips = time.perf_counter(), 0
    milliseconds = 1e3 * (time.perf_counter() - started) / clips
    if workers:
        peak = max(memory_kilobytes("VmHWM", process=pid) for pid in workers) / 1024
    return milliseconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer peers, clips and repeats")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if "FFMPEG_OF_PYAV" not in os.environ:  # LD_LIBRARY_PATH is read at process start only
        path = library_path_for_torchcodec()
        environment = {**os.environ, "LD_LIBRARY_PATH": path, "FFMPEG_OF_PYAV": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    torch.set_num_threads(1)

    name = "340x256 gop250"
    peers = ["i3d_gn", "torchcodec", "decord"]
    peers += [] if arguments.quick else ["pytorchvideo_pyav"]
    repeats, count = (2, 40) if arguments.quick else (5, 64)
    times: dict[tuple[str, int], list[float]] = {}
    peaks: dict[tuple[str, int], float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        generate_video(path, *GENERATED[name])
        index = make_index(Path(folder), [path])
        jobs = make_jobs([path], "32x2 clip", count)
        for repeat in range(repeats):
            for peer in list(peers):
                for workers in (0, arguments.workers):
                    loader = loader_of(peer, index, jobs, workers=workers, repeat=repeat)
                    # Skip the batches that workers prefetch at start.
                    skip = 2 * workers if workers else 0
                    try:
                        milliseconds, peak = measure(loader, skip=skip)
                    except (ImportError, OSError, RuntimeError) as error:
                        print(f"{peer} is skipped: {str(error).splitlines()[0]}")
                        peers.remove(peer)
                        break
                    times.setdefault((peer, workers), []).append(milliseconds)
                    peaks[peer, workers] = peak
    medians = {key: statistics.median(values) for key, values in times.items()}
    rows, cells = [], []
    for peer in peers:
        alone, together = medians[peer, 0], medians[peer, arguments.workers]
        scaling = alone / together / arguments.workers
        cells.append((peer, f"{alone:.1f}", f"{together:.1f}", f"{100 * scaling:.0f} %"))
        for workers, value in ((0, alone), (arguments.workers, together)):
            rows.append(
                {
                    "case": f"{name}, 32x2 clip, {workers or 'no'} workers",
                    "peer": peer,
                    "ms": round(value, 2),
                    "frames_wrong": None,  # counted by bench_decode.py
                    "peak_mb": peaks[peer, workers],
                }
            )
    print(f"{machine()}, {os.cpu_count()} cores\n")
    workers = f"{arguments.workers} workers"
    header = ["loader", "one process, ms/clip", f"{workers}, ms/clip", "scaling"]
    print(markdown_table(header, cells))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
