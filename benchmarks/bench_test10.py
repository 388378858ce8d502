"""10-clip testing from file to scores: decoding overlaps with the network.

    python benchmarks/bench_test10.py [--quick] [--json PATH]

Protocol: videos of 300 frames are tested with 10 clips of 32 frames at stride 2, whole frames of
short side 256, by the package's own `VideoScorer` and a network small enough for a CPU (i3d_tiny).
Three times per video are measured for each decoder: `decode` alone in one process, `network` alone
on decoded frames, and `whole`: a `DataLoader` with one worker that decodes while the network runs,
with the package's own dataset for `i3d_gn`, and with a minimal dataset around its decoder for the
others (pytorchvideo decodes clip by clip; the others decode each frame once). One thread per
process. Decoders take turns in each repeat; times are medians. If decoding and network overlap,
`whole` is the larger of the two. `waiting` is the fraction of `whole` in which the network waits
for frames.
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
from bench_loader import make_index
from decode_peers import PEERS, Job, library_path_for_torchcodec
from report import markdown_table
from torch.utils.data import DataLoader, Dataset

from i3d_gn.data.loader import video_loader
from i3d_gn.data.to_device import ToDevice
from i3d_gn.data.videos import TestVideo, TestVideos
from i3d_gn.models import i3d_tiny
from i3d_gn.video.multi_clip import VideoScorer

ALIGNED = "i3d_gn, aligned starts"
CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PeerVideos(Dataset):
    """Test videos from another decoder, with the clips one after the other."""

    def __init__(self, peer: str, job: Job, count: int) -> None:
        self.peer = peer
        self.job = job
        self.count = count
        self._run = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> TestVideo:
        if self._run is None:  # decoders are opened in the worker
            self._run = PEERS[self.peer]()
        clips = [np.asarray(clip) for clip in self._run(self.job)]
        frames = torch.from_numpy(np.concatenate(clips).astype(np.uint8, copy=False))
        rows = torch.arange(len(frames)).reshape(len(clips), -1)
        crop = (0, 0, frames.shape[1], frames.shape[2])
        return TestVideo(number, 0, frames, rows, (crop,), None)


def dataset_of(peer: str, index, jobs: list[Job], count: int) -> Dataset:
    if peer not in ("i3d_gn", ALIGNED):
        return PeerVideos(peer, jobs[0], count)
    return TestVideos(
        index, num_clips=10, num_frames=32, stride=2, spacing="nonlocal",
        align_starts=peer == ALIGNED, short_side=256, spatial="full", crop_size=224,
        backend="pyav",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one size, fewer peers and repeats")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    if "FFMPEG_OF_PYAV" not in os.environ:  # LD_LIBRARY_PATH is read at process start only
        path = library_path_for_torchcodec()
        environment = {**os.environ, "LD_LIBRARY_PATH": path, "FFMPEG_OF_PYAV": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = i3d_tiny(num_classes=400).eval()
    to_device = ToDevice(device=CPU, mean=MEAN, std=STD, precision="fp32")
    score = VideoScorer(model, to_device, window=(7, 7), average="softmax", clips_per_forward=2)

    sizes = ["340x256 gop250"] + ([] if arguments.quick else ["1280x720 gop250"])
    repeats, count = (1, 3) if arguments.quick else (3, 5)
    rows = []
    print(f"{machine()}, {os.cpu_count()} cores")
    for size in sizes:
        peers = ["i3d_gn", ALIGNED, "torchcodec", "decord"]
        peers += [] if arguments.quick else ["pytorchvideo_pyav"]
        times: dict[tuple[str, str], list[float]] = {}
        peaks: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.mp4"
            generate_video(path, *GENERATED[size])
            copies = [Path(folder) / f"copy_{number}.mp4" for number in range(count)]
            for copy in copies:
                copy.write_bytes(path.read_bytes())
            index = make_index(Path(folder), copies)
            jobs = make_jobs([path], "10-clip test", 1)
            for _ in range(repeats):
                for peer in list(peers):
                    videos = dataset_of(peer, index, jobs, count)
                    try:
                        measured = measure(peer, videos, score, count)
                    except (ImportError, OSError, RuntimeError) as error:
                        print(f"{peer} is skipped: {str(error).splitlines()[0]}")
                        peers.remove(peer)
                        continue
                    peaks[peer] = measured.pop("peak_mb")
                    for part, seconds in measured.items():
                        times.setdefault((peer, part), []).append(1e3 * seconds)
        medians = {key: statistics.median(values) for key, values in times.items()}
        cells = []
        for peer in peers:
            decode, network, whole, waited = (
                medians[peer, part] for part in ("decode", "network", "whole", "waited")
            )
            relative = whole / medians["i3d_gn", "whole"]
            cells.append(
                (
                    peer, f"{decode:.0f}", f"{network:.0f}", f"{whole:.0f}",
                    f"{100 * waited / whole:.0f} %", f"{relative:.2f}",
                )
            )  # fmt: skip
            for part in ("decode", "network", "whole"):
                rows.append(
                    {
                        "case": f"{size}, 10-clip test, {part}",
                        "peer": peer,
                        "ms": round(medians[peer, part], 1),
                        "frames_wrong": None,  # counted by bench_decode.py
                        "peak_mb": round(peaks[peer], 1) if part == "whole" else None,
                    }
                )
        header = ["decoder", "decode", "network", "whole", "waiting", "relative"]
        print(f"\n### {size}\n\n{markdown_table(header, cells)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(peer: str, videos: Dataset, score, count: int) -> dict[str, float]:
    """Seconds per video of each part, and the peak memory of the worker in MB."""
    first = videos[0]
    started = time.perf_counter()
    for number in range(count):
        videos[number]
    decode = (time.perf_counter() - started) / count
    score(first)
    started = time.perf_counter()
    score(first)
    network = time.perf_counter() - started

    loader = (
        video_loader(videos, range(count), num_workers=1, device=CPU)  # type: ignore[arg-type]
        if isinstance(videos, TestVideos)
        else DataLoader(videos, batch_size=None, num_workers=1)
    )
    batches = iter(loader)
    score(next(batches))  # exclude the start of the worker
    waited = 0.0
    started = time.perf_counter()
    for _ in range(count - 1):
        asked = time.perf_counter()
        video = next(batches)
        waited += time.perf_counter() - asked
        score(video)
    whole = (time.perf_counter() - started) / (count - 1)
    (worker,) = (process.pid for process in getattr(batches, "_workers", []))
    return {
        "decode": decode,
        "network": network,
        "whole": whole,
        "waited": waited / (count - 1),
        "peak_mb": memory_kilobytes("VmHWM", process=worker) / 1024,
    }


if __name__ == "__main__":
    main()
