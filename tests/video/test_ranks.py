"""What happens to a run on several ranks: signals, lost ranks, ranks that differ."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from i3d_gn.engine.checkpoint import latest_checkpoint, load_checkpoint
from i3d_gn.engine.typed_config import to_yaml

pytestmark = pytest.mark.slow

LONG = ("train.steps=100000", "train.validate_every=100000", "train.log_every=1000000",
        "train.checkpoint_every=4", "train.milestones=[]")  # fmt: skip


def start(path, *overrides, program=("-m", "i3d_gn", "train")):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        *program, str(path), *overrides,
    ]  # fmt: skip
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def children(pid):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def rank_of(pid):
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK="))


@pytest.fixture
def long_run(small_run, tmp_path):
    """A run on two ranks that has saved its first checkpoint."""
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(small_run(*LONG)))
    process = start(path, "train.rank_timeout_minutes=0.3")
    try:
        while latest_checkpoint(tmp_path / "run" / "checkpoints") is None:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        yield process, path
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def newest(tmp_path):
    return load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints"))


def test_sigterm_to_torchrun_saves_and_resumes_bit_for_bit(long_run, small_run, tmp_path):
    process, path = long_run
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    step = newest(tmp_path)["step"]
    assert f"stopped by SIGTERM after step {step}, with a checkpoint" in errors
    saved = newest(tmp_path)
    saved["config"]["train"]["steps"] = step  # as if that had been all, so that 3 more may follow
    torch.save(saved, latest_checkpoint(tmp_path / "run" / "checkpoints"))
    rest = (f"train.steps={step + 3}", "train.rank_timeout_minutes=10")
    whole = f"output_dir={tmp_path / 'whole'}"
    for overrides in ((whole,), ()):
        resumed = start(path, *rest, *overrides)
        _, errors = resumed.communicate(timeout=240)
        assert resumed.returncode == 0, errors
    saved = [
        load_checkpoint(latest_checkpoint(tmp_path / name / "checkpoints"))
        for name in ("whole", "run")
    ]
    assert saved[0]["step"] == saved[1]["step"] == step + 3
    for key, value in saved[0]["model"].items():
        assert torch.equal(value, saved[1]["model"][key]), key


def test_killed_launcher_leaves_no_rank_behind(long_run):
    process, _ = long_run
    ranks = children(process.pid)
    assert len(ranks) == 2
    process.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_stopped_rank_is_named(long_run):
    process, _ = long_run
    (second,) = [pid for pid in children(process.pid) if rank_of(pid) == 1]
    os.kill(second, signal.SIGSTOP)
    _, errors = process.communicate(timeout=200)
    assert "error: lost contact with rank 1" in errors
    assert process.returncode != 0


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.lr=0.5", "the ranks have a different config"),
     ("data.train_index=VAL", "the ranks have a different config and training index")],
)  # fmt: skip
def test_ranks_that_differ_do_not_start(small_run, motion_set, tmp_path, override, message):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(small_run("train.steps=2")))
    program = tmp_path / "program.py"
    override = override.replace("VAL", str(motion_set.val_index))
    program.write_text(
        "import os, sys\n"
        "from i3d_gn.cli import main\n"
        f"own = ['{override}'] if os.environ['RANK'] == '1' else []\n"
        "sys.exit(main(['train', sys.argv[1], *own]))\n"
    )
    process = start(path, program=[str(program)])
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count(message) == 2
