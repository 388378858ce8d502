"""Prepare small data sets under injected faults, and compare with undisturbed runs.

Each round injects one kind of fault into resize, index and pack: kills, signals, a full disk,
damaged ledgers, and source videos that are deleted, truncated or replaced between two runs. The
same commands are then run until they succeed. Every copy, index and shard must equal, byte for
byte, that of an undisturbed run over the same sources.

    python benchmarks/soak_data_faults.py RECORD.jsonl                # 60 rounds
    python benchmarks/soak_data_faults.py RECORD.jsonl --rounds 3

Run the same command again to resume. Prints the table of `reliability.py`.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from reliability import FaultError, inject, read_record, table
from soak_data_tools import file_hashes

STEPS = ("resize", "index", "pack")


class Work:
    """A folder with videos, in which the steps run."""

    def __init__(self, folder: Path, time_limit: float) -> None:
        self.folder = folder
        self.time_limit = time_limit
        self.seconds = dict.fromkeys(STEPS, 5.0)

    def start(self, step: str, **options: Any) -> subprocess.Popen[str]:
        """Start a step."""
        arguments = {
            "resize": ["videos", "out/small", "--short-side", "48"],
            "index": ["out/small", "out/train.parquet"],
            "pack": ["out/train.parquet", "out/shards", "--shard-mib", "0.02"],
        }[step]
        command = [sys.executable, "-m", "i3d_gn", step, *arguments, "--workers", "1"]
        return subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            **options,
        )  # fmt: skip

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Wait; the status and the output."""
        try:
            output, _ = process.communicate(timeout=self.time_limit)
        except subprocess.TimeoutExpired:
            process.kill()
            raise FaultError("hung", process.communicate()[0][-300:]) from None
        if "Traceback" in output:
            raise FaultError("lost", output[-300:])
        return process.returncode, output

    def finish(self, *steps: str) -> None:
        """Run steps, which must succeed."""
        for step in steps or STEPS:
            started = time.monotonic()
            status, output = self.end(self.start(step))
            self.seconds[step] = time.monotonic() - started
            if status:
                raise FaultError("lost", f"{step}: status {status}: {output[-300:]}")

    def outputs(self) -> dict[str, str]:
        """Hashes of all outputs."""
        return file_hashes(self.folder / "out")


def check(work: Work, undisturbed: Work) -> None:
    ours, expected = work.outputs(), undisturbed.outputs()
    names = [n for n in sorted(ours.keys() | expected.keys()) if ours.get(n) != expected.get(n)]
    if names:
        raise FaultError("silently wrong", f"differ: {', '.join(names)[:300]}")


def interrupt(work: Work, undisturbed: Work, rng: random.Random, number: signal.Signals) -> None:
    """Signal one of the steps at a random time, one to three times."""
    step = rng.choice(STEPS)
    work.finish(*STEPS[: STEPS.index(step)])
    for _ in range(rng.randint(1, 3)):
        process = work.start(step)
        time.sleep(rng.uniform(0.1, 1.0) * undisturbed.seconds[step])
        process.send_signal(number)
        work.end(process)
    work.finish()
    check(work, undisturbed)


def kill(work: Work, undisturbed: Work, rng: random.Random) -> None:
    """SIGKILL."""
    interrupt(work, undisturbed, rng, signal.SIGKILL)


def stop(work: Work, undisturbed: Work, rng: random.Random) -> None:
    """A signal that announces preemption, or Ctrl-C."""
    interrupt(work, undisturbed, rng, rng.choice([signal.SIGTERM, signal.SIGINT]))


def fill_disk(work: Work, undisturbed: Work, rng: random.Random) -> None:
    """No file may grow over a limit."""
    step = rng.choice(STEPS)
    work.finish(*STEPS[: STEPS.index(step)])
    limit = rng.choice([0, 200, 1000, 3000])
    process = work.start(
        step, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    work.end(process)
    work.finish()
    check(work, undisturbed)


def damage_ledger(work: Work, undisturbed: Work, rng: random.Random) -> None:
    """Damage a ledger between two runs; half of the time outputs are gone as well."""
    work.finish()
    ledgers = [p for p in sorted((work.folder / "out").rglob("*ledger*")) if p.is_file()]
    ledger = rng.choice(ledgers)
    content = bytearray(ledger.read_bytes())
    how = rng.choice(["flip", "truncate", "empty", "other lines"])
    if how == "flip":
        for _ in range(5):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "other lines":
        content += b'[1, 2]\n{"key": 5}\nnull\n\xff\xfe\n'
    else:
        content = content[: rng.randrange(len(content)) if how == "truncate" else 0]
    ledger.write_bytes(content)
    if rng.random() < 0.5:
        shutil.rmtree(work.folder / "out" / "shards")
        rng.choice(sorted((work.folder / "out" / "small").rglob("*.mp4"))).unlink()
    work.finish()
    check(work, undisturbed)


def change_source(work: Work, undisturbed: Work, rng: random.Random) -> None:
    """A source video is deleted, truncated or replaced after a run over all.

    The copy of a deleted one must be named, for sources may be deleted to save space.
    """
    work.finish()
    videos = sorted((work.folder / "videos").rglob("*.mp4"))
    video, other = rng.sample(videos, 2)
    how = rng.choice(["deleted", "truncated", "replaced"])
    content = video.read_bytes()
    video.unlink()
    if how == "truncated":
        video.write_bytes(content[: rng.randrange(len(content))])
    elif how == "replaced":
        shutil.copyfile(other, video)
    fresh = Work(work.folder.parent / "fresh", work.time_limit)
    shutil.rmtree(fresh.folder, ignore_errors=True)
    shutil.copytree(work.folder / "videos", fresh.folder / "videos")
    try:
        if how == "deleted":
            _, output = work.end(work.start("resize"))
            copy = video.relative_to(work.folder / "videos")
            if "sources are gone" not in output or copy.as_posix() not in output:
                raise FaultError("silently wrong", f"its copy is kept: {output[-300:]}")
            (work.folder / "out" / "small" / copy).unlink()
        for each in (work, fresh):
            for step in STEPS:
                each.end(each.start(step))  # which fail alike, if a video is broken
        check(work, fresh)
    except FaultError as error:
        raise FaultError(error.outcome, f"{how} {video.name}: {error}") from None


KINDS: dict[str, Callable[[Work, Work, random.Random], None]] = {
    "step killed": kill,
    "step stopped by a signal": stop,
    "disk full (file size limit)": fill_disk,
    "ledger damaged": damage_ledger,
    "source video changed": change_source,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds per command")
    arguments = parser.parse_args()
    done = {fault["round"] for fault in read_record(arguments.record)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clips = [
            "make-motion-clips", folder / "clips", "--train-clips=2", "--val-clips=1",
            "--num-frames=12", "--workers=1",
        ]  # fmt: skip
        command = [sys.executable, "-m", "i3d_gn", *map(str, clips)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        undisturbed, work = (Work(folder / n, arguments.time_limit) for n in ("whole", "round"))
        for each in (undisturbed, work):
            shutil.copytree(folder / "clips" / "train", each.folder / "videos")
        undisturbed.finish()
        for number in range(arguments.rounds):
            if number in done:
                continue
            shutil.rmtree(work.folder)
            shutil.copytree(undisturbed.folder / "videos", work.folder / "videos")
            kind = list(KINDS)[number % len(KINDS)]
            rng = random.Random(f"{arguments.seed}-{number}")
            inject(arguments.record, number, kind, partial(KINDS[kind], work, undisturbed, rng))
    faults = read_record(arguments.record)
    print(table(faults))
    return int(any(fault["outcome"] != "survived" for fault in faults))


if __name__ == "__main__":
    sys.exit(main())
