import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import torch

from i3d_gn.data import videos
from i3d_gn.engine.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from i3d_gn.engine.distributed import World
from i3d_gn.engine.run_log import RunLog, read_log
from i3d_gn.engine.trainer import NonFiniteLossError, Trainer
from i3d_gn.engine.typed_config import ConfigError, to_yaml
from i3d_gn.video.train import train
from i3d_gn.video_io.decode import VideoDecodeError, decode_frames

WORLD = World(0, 1, torch.device("cpu"))


def assert_same_outcome(folder_a, folder_b):
    """Bit-equal parameters, optimiser state and log (but for what the clock decides)."""
    a, b = (load_checkpoint(latest_checkpoint(f / "checkpoints")) for f in (folder_a, folder_b))
    assert a["step"] == b["step"]
    assert a["model"].keys() == b["model"].keys()
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    momenta = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (a, b)]
    assert all(torch.equal(x, y) for x, y in zip(*momenta, strict=True))
    assert timeless_log(folder_a) == timeless_log(folder_b)


def timeless_log(folder):
    return [
        {key: value for key, value in line.items() if key != "timing"}
        for line in read_log(folder / "log.jsonl")
    ]


@pytest.mark.parametrize(
    "recipe",
    [
        ["model.norm=gn"],
        ["model.norm=bn", "train.validate_multi_clip=true"],
        ["train.precision=fp16", "train.clip_grad_norm=0.5", "train.warmup_steps=3",
         "train.schedule=cosine", "train.milestones=[]", "train.validate_every=6"],
    ],
    ids=["gn", "bn", "fp16"],
)  # fmt: skip
def test_a_run_stopped_anywhere_resumes_bit_for_bit(small_run, tmp_path, monkeypatch, recipe):
    options = [*recipe, "train.log_every=3"]  # checkpoints fall between log lines
    train(small_run(*options, output_dir=tmp_path / "whole"), WORLD)
    step = Trainer.step
    stop_before = random.choice([1, 2, 3, 4, 5])
    print("stops before step", stop_before)

    def stops(self, number, batches):
        if number == stop_before:
            raise KeyboardInterrupt
        return step(self, number, batches)

    monkeypatch.setattr(Trainer, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        train(small_run(*options, output_dir=tmp_path / "stopped"), WORLD)
    monkeypatch.undo()
    # The same run goes on with another number of workers.
    options.append("data.num_workers=2")
    train(small_run(*options, output_dir=tmp_path / "stopped"), WORLD)
    assert_same_outcome(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit(small_run, tmp_path):
    config = small_run("train.steps=30", "train.validate_every=10", "data.num_workers=1")
    path = tmp_path / "killed.yaml"
    path.write_text(to_yaml(config))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "i3d_gn.video.train", str(path)]
    whole = tmp_path / "whole"
    subprocess.run([*command, f"output_dir={whole}"], check=True, env=one_thread())
    process = subprocess.Popen(
        [*command, f"output_dir={run}"], env=one_thread(), start_new_session=True
    )
    while latest_checkpoint(run / "checkpoints") is None:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(
        [*command, f"output_dir={run}", "data.num_workers=0"], check=True, env=one_thread()
    )
    assert_same_outcome(whole, run)


def in_processes(world_size, path, *overrides, program=("-m", "i3d_gn.video.train")):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={world_size}", *program, str(path), *overrides,
    ]  # fmt: skip
    return subprocess.run(command, check=False, env=one_thread(), capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_two_processes_run_the_same_experiment_as_one(small_run, tmp_path, norm):
    options = [f"model.norm={norm}", "train.log_every=3", "train.keep_checkpoints=9"]
    config = small_run(*options, output_dir=tmp_path / "one")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    train(config, WORLD)
    two, resumed = tmp_path / "two", tmp_path / "resumed"
    in_processes(2, path, f"output_dir={two}").check_returncode()
    # Two processes resume bit for bit, too, from between two lines of the log.
    shutil.copytree(two, resumed)
    for later in list_checkpoints(resumed / "checkpoints")[1:]:
        later.unlink()
    in_processes(2, path, f"output_dir={resumed}").check_returncode()
    assert_same_outcome(two, resumed)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    assert [line["kind"] for line in logs[0]] == [line["kind"] for line in logs[1]]
    for one, two in zip(*logs, strict=True):
        assert one["clips"] == two["clips"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    states = [
        load_checkpoint(latest_checkpoint(tmp_path / name / "checkpoints"))["model"]
        for name in ("one", "two")
    ]
    for key, value in states[0].items():
        if not key.endswith("num_batches_tracked"):  # which one process sees are all processes'
            torch.testing.assert_close(value, states[1][key], rtol=1e-2, atol=1e-3)


def test_a_run_writes_config_log_and_checkpoints(small_run, tmp_path):
    config = small_run("train.validate_multi_clip=true", "train.keep_checkpoints=2")
    train(config, WORLD)
    run = tmp_path / "run"
    assert (run / "config.yaml").read_text() == to_yaml(config)
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == [
        "step_00000004.pt",
        "step_00000006.pt",
    ]
    log = read_log(run / "log.jsonl")
    kinds = [(line["kind"], line["step"]) for line in log]
    assert kinds == [
        ("train", 2), ("val", 3), ("test", 3), ("train", 4), ("train", 6), ("val", 6), ("test", 6)
    ]  # fmt: skip
    assert [line["lr"] for line in log if line["kind"] == "train"] == pytest.approx(
        [0.05, 0.05, 0.005]
    )
    assert all(line["clips"] == 8 for line in log if line["kind"] == "train")
    assert all(line["clips"] == 6 for line in log if line["kind"] == "val")
    assert list((run / "tensorboard").iterdir())
    saved = load_checkpoint(run / "checkpoints" / "step_00000006.pt")
    assert saved["input"]["mean"] == [0.485, 0.456, 0.406]  # of no weights: ImageNet's
    # Started again, a finished run has nothing to do.
    before = (run / "log.jsonl").read_text()
    train(config, WORLD)
    assert (run / "log.jsonl").read_text() == before


def test_divergence_stops_and_keeps_the_last_good_checkpoint(small_run, tmp_path, monkeypatch):
    step = Trainer.step

    def diverges(self, number, batches):
        if number == 3:
            with torch.no_grad():
                self.model.head.linear.bias.fill_(float("nan"))
        return step(self, number, batches)

    monkeypatch.setattr(Trainer, "step", diverges)
    with pytest.raises(
        NonFiniteLossError, match=r"not finite at step 4; .*last good checkpoint is .*step_00000002"
    ):
        train(small_run(), WORLD)
    saved = load_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    assert all(v.isfinite().all() for v in saved["model"].values() if v.is_floating_point())


def test_another_config_does_not_continue_a_run(small_run, tmp_path):
    train(small_run("train.steps=2"), WORLD)
    with pytest.raises(ConfigError, match=r"another config \(seed: 0 -> 1\); choose another"):
        train(small_run("train.steps=2", "seed=1"), WORLD)


def test_a_mistake_before_the_first_step_does_not_claim_the_folder(small_run, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        train(small_run("train.steps=2", "model.weights=nowhere.pth"), WORLD)
    train(small_run("train.steps=2"), WORLD)
    assert "weights: null" in (tmp_path / "run" / "config.yaml").read_text()


def test_the_log_is_on_the_disk_before_the_checkpoint_that_follows_it(small_run, monkeypatch):
    events = []
    flush = RunLog.flush
    monkeypatch.setattr(RunLog, "flush", lambda log: (flush(log), events.append("flush")))

    def saves(folder, *, step, **rest):
        events.append(step)
        return save_checkpoint(folder, step=step, **rest)

    monkeypatch.setattr("i3d_gn.engine.loop.save_checkpoint", saves)
    train(small_run(), WORLD)
    assert events == ["flush", 2, "flush", 4, "flush", 6]


def test_scores_of_a_stopped_validation_are_not_taken_over(small_run, tmp_path, monkeypatch):
    options = ["train.steps=2", "train.validate_multi_clip=true"]
    train(small_run(*options, output_dir=tmp_path / "whole"), WORLD)

    def stops(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("i3d_gn.video.multi_clip._merge", stops)  # every score is written by then
    with pytest.raises(KeyboardInterrupt):
        train(small_run(*options, "train.lr=0.5"), WORLD)
    monkeypatch.undo()
    (tmp_path / "run" / "log.jsonl").unlink()
    train(small_run(*options), WORLD)
    tables = [
        pq.read_table(tmp_path / name / "val_step_00000002" / "scores.parquet")
        for name in ("whole", "run")
    ]
    assert tables[0].equals(tables[1])


@pytest.mark.slow
def test_processes_that_see_different_folders_do_not_start(small_run, tmp_path):
    config = small_run("train.steps=2", output_dir=tmp_path / "0")
    train(config, WORLD)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from i3d_gn.engine.command import run_command\n"
        "from i3d_gn.video.train import main\n"
        f"folder = '{tmp_path}/' + os.environ['RANK']\n"
        "sys.exit(run_command(lambda: main([sys.argv[1], f'output_dir={folder}'])))\n"
    )
    done = in_processes(2, path, program=[str(program)])
    assert done.returncode != 0
    for rank in (0, 1):
        assert (
            f"do not find the same newest checkpoint under {tmp_path / str(rank)};" in done.stderr
        )


@pytest.mark.slow
def test_a_batch_that_cannot_be_dealt_out_ends_the_run_in_every_process(small_run, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(small_run("train.steps=2")))
    done = in_processes(3, path, f"output_dir={tmp_path / 'three'}")
    assert done.returncode != 0
    assert "a global batch of 4 clips cannot be dealt out evenly to 3 processes" in done.stderr


def test_broken_videos_are_counted_and_stop_training_at_the_budget(
    small_run, tmp_path, monkeypatch, caplog
):
    def breaks(path, indices, **options):
        if "move_up" in path.name:
            raise VideoDecodeError(path, "damaged")
        return decode_frames(path, indices, **options)

    monkeypatch.setattr(videos, "decode_frames", breaks)
    train(small_run(), WORLD)  # 24 clips of 12 videos, each twice; two of the videos are broken
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["kind"] == "train"]
    assert sum(line["broken"] for line in lines) == 4
    assert sum(line["clips"] for line in lines) == 20
    assert "damaged" in caplog.text
    assert "move_up_000.mp4" in caplog.text
    with pytest.raises(ValueError, match=r"[234] clips could not be decoded, more than .* 1;"):
        train(small_run("data.max_broken_clips=1", output_dir=tmp_path / "budget"), WORLD)


def test_activation_checkpointing_trains_the_same(small_run, tmp_path):
    options = ["train.steps=2", "model.norm=bn"]
    train(small_run(*options, output_dir=tmp_path / "plain"), WORLD)
    train(
        small_run(
            *options, "model.checkpoint_stages=[res2,res3]", output_dir=tmp_path / "recomputed"
        ),
        WORLD,
    )
    logs = [timeless_log(tmp_path / name) for name in ("plain", "recomputed")]
    assert logs[0] == logs[1]


def one_thread():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_log_lines_are_json(small_run, tmp_path):
    train(small_run("train.steps=2"), WORLD)
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        assert {"kind", "step", "loss", "top1", "top5"} <= json.loads(line).keys()


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_behind(small_run, tmp_path):
    config = small_run("train.steps=100000", "train.validate_every=100000", "data.num_workers=2")
    path = tmp_path / "long.yaml"
    path.write_text(to_yaml(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "i3d_gn.video.train", str(path)],
        env=one_thread(),
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    while latest_checkpoint(tmp_path / "run" / "checkpoints") is None:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; the same command goes on from here"
    assert "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.gpu
def test_a_compiled_network_trains_the_same_on_a_gpu(small_run, tmp_path):
    gpu = World(0, 1, torch.device("cuda"))
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        train(
            small_run("train.steps=2", f"train.compile={compiled}", output_dir=tmp_path / name),
            gpu,
        )
    eager, compiled = (read_log(tmp_path / name / "log.jsonl") for name in ("eager", "compiled"))
    for one, other in zip(eager, compiled, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2)
    checkpoint = load_checkpoint(latest_checkpoint(tmp_path / "compiled" / "checkpoints"))
    assert "conv1.weight" in checkpoint["model"]  # names are the plain network's
