import dataclasses
import json
import os
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
from i3d_gn.engine.command import NonFiniteLossError
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.loop import TrainingLoop
from i3d_gn.engine.run_log import RunLog, read_log
from i3d_gn.engine.trainer import Trainer
from i3d_gn.engine.typed_config import ConfigError, to_yaml
from i3d_gn.video.train import VideoTraining, train
from i3d_gn.video_io.decode import VideoDecodeError, decode_frames
from i3d_gn.video_io.index import VideoIndex, write_index
from i3d_gn.video_io.strips import read_strips
from tests.runs import (
    interrupted_before,
    log_without_timing,
    newest_checkpoint,
    on_ranks,
    records_of,
)

PROCESS = Process(0, 1, torch.device("cpu"))


def assert_same_outcome(folder_a, folder_b):
    """Bit-equal parameters, optimizer state and log, except for timing."""
    a, b = (newest_checkpoint(f) for f in (folder_a, folder_b))
    assert a["step"] == b["step"]
    assert a["model"].keys() == b["model"].keys()
    for key, value in a["model"].items():
        assert torch.equal(value, b["model"][key]), key
    momenta = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (a, b)]
    assert all(torch.equal(x, y) for x, y in zip(*momenta, strict=True))
    assert log_without_timing(folder_a) == log_without_timing(folder_b)


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
@pytest.mark.parametrize("stop_before", [1, 4, 5])
def test_resume_is_bit_identical(small_run, tmp_path, recipe, stop_before):
    options = [*recipe, "train.log_every=3"]  # so that checkpoints fall between log lines
    train(small_run(*options, output_dir=tmp_path / "whole"), PROCESS)
    with interrupted_before(stop_before):
        train(small_run(*options, output_dir=tmp_path / "stopped"), PROCESS)
    # Resume with another number of workers.
    options.append("data.num_workers=2")
    train(small_run(*options, output_dir=tmp_path / "stopped"), PROCESS)
    assert_same_outcome(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_resume_after_sigkill_is_bit_identical(small_run, tmp_path):
    config = small_run("train.steps=30", "train.validate_every=10", "data.num_workers=1")
    path = tmp_path / "killed.yaml"
    path.write_text(to_yaml(config))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "i3d_gn", "train", str(path)]
    whole = tmp_path / "whole"
    subprocess.run([*command, f"output_dir={whole}"], check=True, env=one_thread())
    process = subprocess.Popen(
        [*command, f"output_dir={run}"], env=one_thread(), start_new_session=True
    )
    while latest_checkpoint(run / "checkpoints") is None:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(
        [*command, f"output_dir={run}", "data.num_workers=0"], check=True, env=one_thread()
    )
    assert_same_outcome(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_two_ranks_train_like_one_process(small_run, tmp_path, norm):
    options = [f"model.norm={norm}", "train.log_every=3", "train.keep_checkpoints=9"]
    config = small_run(*options, output_dir=tmp_path / "one")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    train(config, PROCESS)
    two, resumed = tmp_path / "two", tmp_path / "resumed"
    on_ranks(2, "-m", "i3d_gn", "train", path, f"output_dir={two}").check_returncode()
    # Two ranks also resume bit for bit, from a checkpoint between two log lines.
    shutil.copytree(two, resumed)
    for later in list_checkpoints(resumed / "checkpoints")[1:]:
        later.unlink()
    on_ranks(2, "-m", "i3d_gn", "train", path, f"output_dir={resumed}").check_returncode()
    assert_same_outcome(two, resumed)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    assert [line["kind"] for line in logs[0]] == [line["kind"] for line in logs[1]]
    for one, two in zip(*logs, strict=True):
        assert one["samples"] == two["samples"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    states = [newest_checkpoint(tmp_path / name)["model"] for name in ("one", "two")]
    for key, value in states[0].items():
        if not key.endswith("num_batches_tracked"):  # each rank counts its own
            torch.testing.assert_close(value, states[1][key], rtol=1e-2, atol=1e-3)


def test_mixup_average_and_early_stopping_on_two_ranks_are_those_of_one(small_run, tmp_path):
    options = [
        "train.mixup=0.4", "train.ema_decay=0.6", "train.best_metric=val/top5",
        "train.patience=2", "train.validate_every=1", "train.checkpoint_every=1",
        "train.log_every=1", "train.keep_checkpoints=9",
    ]  # fmt: skip
    config = small_run(*options, output_dir=tmp_path / "one")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    train(config, PROCESS)
    alone = newest_checkpoint(tmp_path / "one")
    two = tmp_path / "two"
    program = tmp_path / "program.py"  # also saves the average of each rank
    program.write_text(
        "import os, sys, torch\n"
        "from i3d_gn.cli import main\n"
        "from i3d_gn.engine.loop import TrainingLoop\n"
        "run = TrainingLoop.run\n"
        "def run_and_save(loop):\n"
        "    run(loop)\n"
        f"    torch.save(loop.average.model.state_dict(), '{two}_' + os.environ['RANK'])\n"
        "TrainingLoop.run = run_and_save\n"
        f"sys.exit(main(['train', sys.argv[1], 'output_dir={two}']))\n"
    )
    done = on_ranks(2, program, path)
    assert done.returncode == 0, done.stderr
    saved = newest_checkpoint(two)
    assert saved["step"] == alone["step"] < 6  # stopped early
    averages = [torch.load(f"{two}_{rank}") for rank in (0, 1)]
    for key, value in saved["model"].items():
        assert all(torch.equal(value, average[key]) for average in averages)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    for one, other in zip(*logs, strict=True):
        assert (one["kind"], one["samples"]) == (other["kind"], other["samples"])
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    for states in ((alone, saved), (alone["average"], saved["average"])):
        for key, value in states[0]["model"].items():
            torch.testing.assert_close(value, states[1]["model"][key], rtol=1e-2, atol=1e-3)


def test_run_writes_config_log_and_checkpoints(small_run, tmp_path):
    config = small_run("train.validate_multi_clip=true", "train.keep_checkpoints=2")
    train(config, PROCESS)
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
    assert all(line["samples"] == 8 for line in log if line["kind"] == "train")
    assert all(line["samples"] == 6 for line in log if line["kind"] == "val")
    assert list((run / "tensorboard").iterdir())
    saved = load_checkpoint(run / "checkpoints" / "step_00000006.pt")
    assert saved["input"]["mean"] == [0.485, 0.456, 0.406]  # without weights: ImageNet's
    # A finished run has nothing to do.
    before = (run / "log.jsonl").read_text()
    train(config, PROCESS)
    assert (run / "log.jsonl").read_text() == before


def test_divergence_keeps_the_last_good_checkpoint(small_run, tmp_path, monkeypatch):
    step = Trainer.step

    def diverges(self, number, batches):
        if number == 3:
            with torch.no_grad():
                self.network.head.linear.bias.fill_(float("nan"))
        return step(self, number, batches)

    monkeypatch.setattr(Trainer, "step", diverges)
    with pytest.raises(
        NonFiniteLossError,
        match=r"not finite at step 4; .*last good checkpoint is .*step_00000002.*; "
        r"try a lower train.lr or train.warmup_steps or train.clip_grad_norm",
    ):
        train(small_run(), PROCESS)
    saved = newest_checkpoint(tmp_path / "run")
    assert all(v.isfinite().all() for v in saved["model"].values() if v.is_floating_point())


def test_run_with_another_config_does_not_resume(small_run, tmp_path):
    train(small_run("train.steps=2"), PROCESS)
    with pytest.raises(ConfigError, match=r"another config \(seed: 0 -> 1\); use another"):
        train(small_run("train.steps=2", "seed=1"), PROCESS)


def test_error_before_the_first_step_does_not_claim_the_folder(small_run, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        train(small_run("train.steps=2", "model.weights=nowhere.pth"), PROCESS)
    train(small_run("train.steps=2"), PROCESS)
    assert "weights: null" in (tmp_path / "run" / "config.yaml").read_text()


def test_log_is_on_disk_before_the_next_checkpoint(small_run, monkeypatch):
    events = []
    flush = RunLog.flush
    monkeypatch.setattr(RunLog, "flush", lambda log: (flush(log), events.append("flush")))

    def saves(folder, *, step, **rest):
        events.append(step)
        return save_checkpoint(folder, step=step, **rest)

    monkeypatch.setattr("i3d_gn.engine.loop.save_checkpoint", saves)
    train(small_run(), PROCESS)
    assert [event for event in events if event != "flush"] == [2, 4, 6]
    assert all(events[events.index(step) - 1] == "flush" for step in (2, 4, 6))


def test_scores_of_a_stopped_validation_are_not_reused(small_run, tmp_path, monkeypatch):
    options = ["train.steps=2", "train.validate_multi_clip=true"]
    train(small_run(*options, output_dir=tmp_path / "whole"), PROCESS)

    def stops(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "i3d_gn.video.multi_clip.merge_parts", stops
    )  # after every score is written
    with pytest.raises(KeyboardInterrupt):
        train(small_run(*options, "train.lr=0.5"), PROCESS)
    monkeypatch.undo()
    # Start over in the same directory, with other weights; the scores are still there.
    (tmp_path / "run" / "log.jsonl").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(small_run(*options), PROCESS)
    tables = [
        pq.read_table(tmp_path / name / "val_step_00000002" / "scores.parquet")
        for name in ("whole", "run")
    ]
    assert tables[0].equals(tables[1])


def test_more_steps_extend_a_finished_run(small_run, tmp_path):
    options = ["train.validate_every=2", "train.log_every=2"]
    train(small_run(*options, "train.steps=6", output_dir=tmp_path / "whole"), PROCESS)
    for steps in (4, 6):
        train(small_run(*options, f"train.steps={steps}", output_dir=tmp_path / "run"), PROCESS)
    assert_same_outcome(tmp_path / "whole", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"train.steps: 6 -> 4"):
        train(small_run(*options, "train.steps=4"), PROCESS)


def test_more_steps_of_a_cosine_schedule_are_another_experiment(small_run):
    options = ["train.schedule=cosine", "train.milestones=[]"]
    train(small_run(*options, "train.steps=2"), PROCESS)
    with pytest.raises(ConfigError, match=r"train.steps: 2 -> 4.*model.weights="):
        train(small_run(*options, "train.steps=4"), PROCESS)


@pytest.mark.parametrize("change", ["order", "half", "labels", "classes"])
def test_resume_with_another_index_is_refused(small_run, motion_set, tmp_path, change):
    index = VideoIndex.load(motion_set.train_index)
    records, names = list(records_of(index)), index.class_names
    if change == "order":
        records = records[::-1]
    elif change == "half":
        records = records[:6]
    elif change == "labels":
        records = [dataclasses.replace(r, label=5 - r.label) for r in records]
    else:
        names = names[::-1]
    other = tmp_path / "train.parquet"
    shutil.copy(motion_set.train_index, other)
    val = tmp_path / "val.parquet"
    write_index(
        val, records_of(VideoIndex.load(motion_set.val_index)), class_names=names,
        root=motion_set.folder / "videos" / "val",
    )  # fmt: skip
    root = [f"data.train_index={other}", "train.steps=2"]
    write_index(other, records_of(index), class_names=index.class_names, root=index.root)
    train(small_run(*root), PROCESS)
    write_index(other, records, class_names=names, root=index.root)
    if change == "classes":
        root.append(f"data.val_index={val}")
    with pytest.raises(ConfigError, match="training index: 12 videos, 6 classes|another config"):
        train(small_run(*root), PROCESS)


def test_videos_in_both_indexes_are_said(small_run, motion_set, caplog):
    train(small_run("train.steps=2", f"data.val_index={motion_set.train_index}"), PROCESS)
    assert "12 videos are for training and for validation" in caplog.text


@pytest.mark.slow
def test_ranks_with_different_output_dirs_do_not_start(small_run, tmp_path):
    config = small_run("train.steps=2", output_dir=tmp_path / "0")
    train(config, PROCESS)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from i3d_gn.cli import main\n"
        f"folder = '{tmp_path}/' + os.environ['RANK']\n"
        "sys.exit(main(['train', sys.argv[1], f'output_dir={folder}']))\n"
    )
    done = on_ranks(2, program, path)
    assert done.returncode != 0
    for rank in (0, 1):
        assert (
            f"the ranks do not find the same newest checkpoint under {tmp_path / str(rank)};"
            in done.stderr
        )


@pytest.mark.slow
def test_global_batch_that_does_not_split_evenly_ends_every_rank(small_run, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(small_run("train.steps=2")))
    done = on_ranks(3, "-m", "i3d_gn", "train", path, f"output_dir={tmp_path / 'three'}")
    assert done.returncode != 0
    assert "a global batch of 4 samples does not split evenly across 3 ranks" in done.stderr


def test_broken_clips_are_counted_and_limited(small_run, tmp_path, monkeypatch, caplog):
    def breaks(path, indices, **options):
        if "move_up" in path.name:
            raise VideoDecodeError(path, "damaged")
        return decode_frames(path, indices, **options)

    monkeypatch.setattr(videos, "decode_frames", breaks)
    train(small_run(), PROCESS)  # 24 clips of 12 videos, each twice; two of the videos are broken
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["kind"] == "train"]
    assert sum(line["broken"] for line in lines) == 4
    assert sum(line["samples"] for line in lines) == 20
    assert "damaged" in caplog.text
    assert "move_up_000.mp4" in caplog.text
    with pytest.raises(
        ValueError, match=r"[234] of \d+ clips failed to decode, more than the 1 or"
    ):
        train(small_run("data.max_broken_clips=1", output_dir=tmp_path / "budget"), PROCESS)


def test_activation_checkpointing_is_bit_identical(small_run, tmp_path):
    options = ["train.steps=2", "model.norm=bn"]
    train(small_run(*options, output_dir=tmp_path / "plain"), PROCESS)
    train(
        small_run(
            *options, "model.checkpoint_stages=[res2,res3]", output_dir=tmp_path / "recomputed"
        ),
        PROCESS,
    )
    logs = [log_without_timing(tmp_path / name) for name in ("plain", "recomputed")]
    assert logs[0] == logs[1]


def one_thread():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_log_lines_are_json(small_run, tmp_path):
    train(small_run("train.steps=2"), PROCESS)
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        assert {"kind", "step", "loss", "top1", "top5"} <= json.loads(line).keys()


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(small_run, tmp_path):
    config = small_run("train.steps=100000", "train.validate_every=100000", "data.num_workers=2")
    path = tmp_path / "long.yaml"
    path.write_text(to_yaml(config))
    process = subprocess.Popen(
        [sys.executable, "-m", "i3d_gn", "train", str(path)],
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
    assert errors.splitlines()[-1] == "interrupted; run the same command again"
    assert "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.gpu
def test_compiled_network_trains_the_same_on_a_gpu(small_run, tmp_path):
    gpu = Process(0, 1, torch.device("cuda"))
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        train(
            small_run("train.steps=2", f"train.compile={compiled}", output_dir=tmp_path / name),
            gpu,
        )
    eager, compiled = (read_log(tmp_path / name / "log.jsonl") for name in ("eager", "compiled"))
    for one, other in zip(eager, compiled, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2)
    checkpoint = newest_checkpoint(tmp_path / "compiled")
    assert "conv1.weight" in checkpoint["model"]  # the names of the network that is not compiled


def test_strips_are_the_clips_that_the_network_gets(small_run, tmp_path):
    config = small_run("train.steps=2", "data.num_workers=1")
    seen = []
    task = VideoTraining(config, PROCESS)
    loss = task.loss

    def record(network, batch):
        seen.extend(zip(batch.inputs.numpy(), batch.labels.tolist(), strict=True))
        return loss(network, batch)

    task.loss = record
    folder = tmp_path / "run"
    TrainingLoop(task, config.train, config=config, seed=0, output_dir=folder).run()
    strips = read_strips(folder / "training_clips")
    assert len(strips) == len(seen) == 8
    for strip, (clip, label) in zip(strips, seen, strict=True):
        assert strip.caption == task.train_index.class_names[label]
        for i, frame in enumerate(clip):
            assert (strip.pixels[:, i * 38 : i * 38 + 36] == frame).all()


def test_resumed_run_keeps_its_strips(small_run, tmp_path):
    train(small_run("train.steps=2"), PROCESS)
    before = read_strips(tmp_path / "run" / "training_clips")
    train(small_run("train.steps=3"), PROCESS)
    after = read_strips(tmp_path / "run" / "training_clips")
    assert [s.pixels.tobytes() for s in after] == [s.pixels.tobytes() for s in before]
