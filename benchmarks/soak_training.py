"""Train and test small networks under injected faults, and compare with undisturbed runs.

Each round injects one kind of fault into a fresh run: kills, signals, damaged checkpoints, a full
disk, videos that vanish or change, workers and ranks that die or stop. The same command is then run
until it succeeds. Parameters, optimizer, log and results must equal, bit for bit, those of a run
without the fault; with damaged videos, those of an undisturbed run with the same damage, and each
skipped clip must be counted.

    python benchmarks/soak_training.py RECORD.jsonl                # 200 rounds
    python benchmarks/soak_training.py RECORD.jsonl --rounds 3

Run the same command again to resume. Prints the table of `reliability.py`. Data preparation has a
soak of its own, `soak_data_tools.py`.
"""

from __future__ import annotations

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from reliability import FaultError, inject, read_record, table
from soak_runs import BATCH, NUM_TRAIN, STEPS, Command, Run, Soak, children, same_test

from i3d_gn.engine.checkpoint import list_checkpoints, load_checkpoint


def interrupt(soak: Soak, run: Run, number: signal.Signals, rng: random.Random) -> Command | None:
    """Start training and signal it after a random part of the usual time; None if too late."""
    command = run.train()
    limit = rng.uniform(0.05, 0.9) * soak.reference("gn").seconds
    if command.wait(limit) is not None:
        return None
    command.send(number)
    return command


def kill(soak: Soak, rng: random.Random) -> None:
    """SIGKILL, one to three times."""
    norm = rng.choice(["gn", "bn"])
    run = soak.run(f"round-{norm}")
    for _ in range(rng.randint(1, 3)):
        if command := interrupt(soak, run, signal.SIGKILL, rng):
            soak.wait(command)
    soak.finish(run.train())
    soak.check(run, soak.reference(norm))


def kill_validation(soak: Soak, rng: random.Random) -> None:
    """SIGKILL while a validation runs."""
    norm = rng.choice(["gn", "bn"])
    run = soak.run(f"round-{norm}")
    command = run.train()
    mark = run.checkpoints / "before_validation.pt"
    while command.wait(0.01) is None and not mark.exists():
        pass
    command.wait(rng.uniform(0, 0.3))
    command.send(signal.SIGKILL)
    soak.wait(command)
    soak.finish(run.train())
    soak.check(run, soak.reference(norm))


def stop(soak: Soak, rng: random.Random) -> None:
    """A signal that announces preemption: nothing may be lost, not even a step."""
    number = rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
    run = soak.run("round-gn")
    command = interrupt(soak, run, number, rng)
    if command is not None:
        status, output = soak.wait(command), command.output()
        if "after step" in output:
            done = int(output.rpartition("after step ")[2].split(",")[0])
            marks = [*list_checkpoints(run.checkpoints), run.checkpoints / "before_validation.pt"]
            steps = [load_checkpoint(path)["step"] for path in marks if path.exists()]
            if max(steps) != done:
                raise FaultError("lost", f"stopped after step {done}, but saved {steps}")
        expected = {130} if number == signal.SIGINT else {75}
        if status not in {*expected, 0, -number}:  # -number: before the run began
            raise FaultError("lost", f"status {status} after {number.name}: {output[-300:]}")
    soak.finish(run.train())
    soak.check(run, soak.reference("gn"))


def damage_checkpoint(soak: Soak, rng: random.Random) -> None:
    """Damage the newest checkpoint of a killed run."""
    run = soak.run("round-gn")
    command = run.train()
    wanted = rng.randint(1, 2)
    while command.wait(0.01) is None and len(list_checkpoints(run.checkpoints)) < wanted:
        pass
    command.send(signal.SIGKILL)
    soak.wait(command)
    (run.checkpoints / "before_validation.pt").unlink(missing_ok=True)
    newest = list_checkpoints(run.checkpoints)[-1]
    content = bytearray(newest.read_bytes())
    how = rng.choice(["flip", "truncate", "empty", "zero"])
    if how == "flip":
        start = rng.randrange(200, len(content) * 9 // 10)  # not the directory's unused fields
        content[start] ^= 1 << rng.randrange(8)
    elif how == "zero":
        start = rng.randrange(len(content) // 2)
        content[start : start + 4096] = bytes(4096)
    else:
        content = content[: rng.randrange(len(content)) if how == "truncate" else 0]
    newest.write_bytes(content)
    command = run.train()
    if soak.wait(command):
        output = command.output()
        if "none of the 1 checkpoints" not in output:
            raise FaultError("lost", f"{how}: {output[-300:]}")
        shutil.rmtree(run.checkpoints)  # the advice of the message
        soak.finish(run.train())
    soak.check(run, soak.reference("gn"))


def fill_disk(soak: Soak, rng: random.Random) -> None:
    """No file may grow over a limit, which is below the size of a checkpoint."""
    run = soak.run("round-gn")
    reference = soak.reference("gn")
    size = list_checkpoints(reference.checkpoints)[-1].stat().st_size
    limit = rng.randrange(2000, size)
    # Without loader workers, whose shared memory the limit would apply to as well.
    command = run.train(
        "data.num_workers=0",
        before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    status, output = soak.wait(command), command.output()
    if status != 2 or "Traceback" in output:
        raise FaultError("lost", f"status {status} with {limit} bytes: {output[-400:]}")
    if left := [str(path) for path in run.output.rglob("*.part")]:
        raise FaultError("lost", f"left behind: {left}")
    soak.finish(run.train())
    soak.check(run, reference)


@contextlib.contextmanager
def damaged_video(soak: Soak, rng: random.Random) -> Iterator[tuple[Path, str]]:
    """A copy of the data set with one training video damaged after indexing."""
    data = soak.folder / "damaged"
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(soak.data, data)
    video = rng.choice(sorted((data / "videos" / "train").rglob("*.mp4")))
    content = video.read_bytes()
    how = rng.choice(["deleted", "truncated", "replaced", "pipe", "device"])
    video.unlink()
    if how == "truncated":
        video.write_bytes(content[: rng.randrange(len(content))])
    elif how == "replaced":
        others = [p for p in sorted((data / "videos").rglob("*.mp4")) if p != video]
        shutil.copyfile(rng.choice(others), video)
        with video.open("ab") as file:  # never of the same size
            file.write(bytes(1 + max(0, len(content) - video.stat().st_size)))
    elif how == "pipe":
        os.mkfifo(video)
    elif how == "device":
        video.symlink_to("/dev/urandom")
    yield data, how


def damage_video(soak: Soak, rng: random.Random) -> None:
    """A video vanishes, changes, or would block: its clips are counted, the others unchanged."""
    with damaged_video(soak, rng) as (data, how):
        undisturbed = soak.run("damaged-run", data=data)
        soak.finish(undisturbed.train())
        broken = load_checkpoint(list_checkpoints(undisturbed.checkpoints)[-1])["num_broken"]
        if broken != STEPS * BATCH // NUM_TRAIN:
            raise FaultError("silently wrong", f"{how}: {broken} broken clips were counted")
        run = soak.run("round-gn", data=data)
        if command := interrupt(soak, run, signal.SIGKILL, rng):
            soak.wait(command)
        soak.finish(run.train())
        soak.check(run, undisturbed)


def damage_test_video(soak: Soak, rng: random.Random) -> None:
    """Testing lists a video that cannot be decoded; the scores of the others are unchanged."""
    reference = soak.reference("gn")
    data = soak.folder / "damaged"
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(soak.data, data)
    video = rng.choice(sorted((data / "videos" / "val").rglob("*.mp4")))
    video.write_bytes(video.read_bytes()[: rng.choice([0, 100, 2000])])
    run = soak.run("round-gn", data=data)
    run.checkpoints.mkdir(parents=True)
    shutil.copy(list_checkpoints(reference.checkpoints)[-1], run.checkpoints)
    soak.finish(run.evaluate())
    skipped = run.results()["skipped"]
    if list(skipped) != [video.relative_to(data / "videos" / "val").as_posix()]:
        raise FaultError("silently wrong", f"skipped: {skipped}")
    scores, expected = run.scores(), reference.scores()
    if scores != {path: value for path, value in expected.items() if path not in skipped}:
        raise FaultError("silently wrong", "scores of other videos changed")


def disturb_worker(soak: Soak, rng: random.Random) -> None:
    """A loader worker is killed or stopped: its samples are loaded again."""
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
    run = soak.run("round-gn", timeout=8.0 if number == signal.SIGSTOP else 120.0)
    command = run.train()
    command.wait(rng.uniform(0.1, 0.8) * soak.reference("gn").seconds)
    for pid in children(command.pids[0]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    soak.finish(command)
    soak.check(run, soak.reference("gn"))


def disturb_rank(soak: Soak, rng: random.Random) -> None:
    """One of two ranks is killed or stopped: the other ends in time, and both resume."""
    if "ranks" not in soak.references:
        whole = soak.run("reference-ranks")
        soak.finish(whole.train(ranks=2))
        soak.references["ranks"] = whole
    run = soak.run("round-ranks")
    command = run.train(ranks=2)
    wanted = rng.randint(1, 2)
    while command.wait(0.01) is None and len(list_checkpoints(run.checkpoints)) < wanted:
        pass
    victim = rng.randrange(2)
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
    os.kill(command.pids[victim], number)
    status = command.wait_for(1 - victim, soak.time_limit)
    output = command.output()
    command.kill()
    if status is None:
        raise FaultError("hung", f"rank {victim} after {number.name}: {output[-300:]}")
    if status and f"lost contact with rank {victim}" not in output:
        raise FaultError("lost", f"status {status}, rank {victim} not named: {output[-400:]}")
    soak.finish(run.train(ranks=2))
    soak.check(run, soak.references["ranks"])


def kill_test(soak: Soak, rng: random.Random) -> None:
    """SIGKILL of a test, which resumes where it was."""
    reference = soak.reference("gn")
    run = soak.run("round-gn")
    run.checkpoints.mkdir(parents=True)
    shutil.copy(list_checkpoints(reference.checkpoints)[-1], run.checkpoints)
    for _ in range(rng.randint(1, 3)):
        command = run.evaluate()
        command.wait(rng.uniform(0.1, 0.6) * reference.seconds)
        command.send(signal.SIGKILL)
        soak.wait(command)
    soak.finish(run.evaluate())
    if difference := same_test(run, reference):
        raise FaultError("silently wrong", difference)


KINDS: dict[str, Callable[[Soak, random.Random], None]] = {
    "training killed": kill,
    "validation killed": kill_validation,
    "training stopped by a signal": stop,
    "newest checkpoint damaged": damage_checkpoint,
    "disk full (file size limit)": fill_disk,
    "training video damaged": damage_video,
    "test video damaged": damage_test_video,
    "loader worker killed or stopped": disturb_worker,
    "rank killed or stopped": disturb_rank,
    "test killed": kill_test,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds per command")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # children are forked: no other thread may exist
    done = {fault["round"] for fault in read_record(arguments.record)}
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), arguments.time_limit)
        for number in range(arguments.rounds):
            if number in done:
                continue
            kind = arguments.kinds[number % len(arguments.kinds)]
            rng = random.Random(f"{arguments.seed}-{number}")
            inject(arguments.record, number, kind, partial(KINDS[kind], soak, rng))
    faults = read_record(arguments.record)
    print(table(faults))
    return int(any(fault["outcome"] != "survived" for fault in faults))


if __name__ == "__main__":
    sys.exit(main())
