"""Run all steps of data preparation over many clips, with random kills.

A local web server serves generated clips in the layout of the CVDF release: some are broken, one is
replaced, one is missing. download, extract, resize, verify, index and pack run as separate
processes, which are killed with SIGKILL after random times and run again until they succeed. At the
end every copy, index and shard must equal, byte for byte, that of an undisturbed run.

    python benchmarks/soak_data_tools.py            # 2,000 clips
    python benchmarks/soak_data_tools.py --clips 40

Exit status 0 if all files are equal.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import http.server
import io
import random
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq

from data_tools.make_motion_clips import MOTIONS, make_motion_clips
from data_tools.processes import available_cpus
from i3d_gn.files import file_sha256

CLIPS_PER_ARCHIVE = 50


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=available_cpus())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak(
            Path(folder), num_clips=arguments.clips, seed=arguments.seed, workers=arguments.workers
        )
    return 0


def soak(folder: Path, *, num_clips: int, seed: int, workers: int) -> None:
    rng = random.Random(seed)
    clips = folder / "clips"
    per_class = -(-num_clips // len(MOTIONS))
    make_motion_clips(
        clips,
        train_clips=per_class,
        val_clips=0,
        num_frames=12,
        seed=seed,
        workers=workers,
        timeout_seconds=600,
    )
    served = folder / "served"
    broken = publish(sorted(clips.rglob("*.mp4"))[:num_clips], served, rng)
    server = serve(served)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    kills = 0
    for run, kill in (("undisturbed", None), ("killed", rng)):
        started = time.monotonic()
        for step in steps(folder / run, url, workers=workers):
            kills += run_step(step, kill)
        print(f"{run}: {time.monotonic() - started:.0f} s", flush=True)
    server.shutdown()
    server.server_close()
    check(folder, num_clips=num_clips, broken=broken)
    print(f"{num_clips} clips, {kills} kills: equal to an undisturbed run")


def publish(clips: list[Path], served: Path, rng: random.Random) -> dict[str, str]:
    """Write the release; return the ids of broken and missing videos."""
    rows, members = [], []
    broken: dict[str, str] = {}
    replacement = b""
    for i, clip in enumerate(clips):
        video_id, label = f"{'-_a'[i % 3]}{i:010d}", clip.parent.name.replace("_", " ")
        content = clip.read_bytes()
        name = f"{video_id}_{i % 300:06d}_{i % 300 + 10:06d}.mp4"
        if i == 1:
            replacement, content = content, content[:700]
            replaced_id = video_id
        elif i == 2:
            broken[video_id] = "missing"
        elif i % 20 == 7:
            broken[video_id] = "broken"
            cut = rng.choice([0, 100, len(content) // 2])
            content = content[:cut]
        rows.append([label, video_id, i % 300, i % 300 + 10, "train", 0])
        if broken.get(video_id) != "missing":
            members.append((name, content))
    (served / "annotations").mkdir(parents=True)
    with open(served / "annotations" / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "youtube_id", "time_start", "time_end", "split", "is_cc"])
        writer.writerows(rows)
    (served / "train").mkdir()
    parts = range(-(-len(members) // CLIPS_PER_ARCHIVE))
    for part in parts:
        of_part = members[part :: len(parts)]
        (served / "train" / f"part_{part}.tar.gz").write_bytes(tar_of(of_part))
    (served / "train" / "k400_train_path.txt").write_text(
        "".join(f"part_{part}.tar.gz\n" for part in parts)
    )
    (served / "replacement_for_corrupted_k400.tgz").write_bytes(
        tar_of([(f"replacement_for_corrupted_k400/{replaced_id}_000000_000010.mp4", replacement)])
    )
    return broken


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_500_000_000
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without range requests, so that interrupted downloads start over."""

    def log_message(self, format, *arguments):
        """Do not log."""


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    handler = functools.partial(QuietHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def steps(folder: Path, url: str, *, workers: int) -> list[list[str]]:
    archives, videos, small = folder / "archives", folder / "videos", folder / "small"
    source, index = archives / "annotations" / "train.csv", folder / "train.parquet"
    on_small = ["--videos", small / "train"]
    commands = [
        ["download", archives, "--base-url", url, "--splits", "train"],
        ["extract", archives, videos],
        ["resize", videos / "train", small / "train", "--short-side", "64"],
        ["verify", source, folder / "verify.json", *on_small, "--max-defects", "1"],
        ["index", source, index, *on_small],
        ["pack", index, folder / "shards", "--shard-mib", "0.5"],
    ]
    return [[*map(str, command), "--workers", str(workers)] for command in commands]


def run_step(command: list[str], kill: random.Random | None) -> int:
    """Run until it succeeds, with increasing time before the kill; return the number of kills."""
    kills = 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-m", "i3d_gn", *command], stdout=subprocess.DEVNULL
        )
        try:
            timeout = None if kill is None else kill.uniform(0.5, 4.0) * 1.3**kills
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            continue
        assert status == 0, command
        return kills


def check(folder: Path, *, num_clips: int, broken: dict[str, str]) -> None:
    """Check that both runs have equal files, and that the index is right."""
    hashes = [file_hashes(folder / run) for run in ("undisturbed", "killed")]
    assert hashes[0].keys() == hashes[1].keys(), hashes[0].keys() ^ hashes[1].keys()
    different = [name for name in hashes[0] if hashes[0][name] != hashes[1][name]]
    assert not different, different
    rows = pq.read_table(folder / "killed" / "train.parquet").to_pylist()
    assert len(rows) == num_clips - len(broken)
    ids = [row["video_id"][:11] for row in rows]
    assert len(set(ids)) == len(ids)
    assert not set(ids) & set(broken)
    assert {row["num_frames"] for row in rows} == {12}
    with open(folder / "served" / "annotations" / "train.csv", newline="") as file:
        labels = {row["youtube_id"]: row["label"] for row in csv.DictReader(file)}
    assert all(row["class_name"] == labels[row["video_id"][:11]] for row in rows)


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of all outputs except ledgers and reports, which differ between runs.

    So do the modification times of copies in an index, which are not compared.
    """
    hashes = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or "ledger" in name or name.endswith(".json"):
            continue
        if name == "train.parquet":
            rows = pq.read_table(path).drop_columns("mtime_ns").to_pylist()
            hashes[name] = hashlib.sha256(repr(rows).encode()).hexdigest()
        else:
            hashes[name] = file_sha256(path)
    return hashes


if __name__ == "__main__":
    sys.exit(main())
