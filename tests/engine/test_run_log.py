import threading
import time
from dataclasses import dataclass

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter

from i3d_gn.engine.recipe import Recipe
from i3d_gn.engine.run_log import RunLog, read_log
from i3d_gn.video_io.strips import Strip, read_strips


@dataclass(frozen=True)
class ToyConfig:
    train: Recipe


def test_resume_drops_lines_after_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, last_step=0)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": float(step)}, {"seconds": 0.1})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a crash in the middle of a line
    log = RunLog(tmp_path, last_step=2)
    log.write("train", 3, {"loss": 30.0})
    log.close()
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["loss"] for line in lines] == [1.0, 2.0, 30.0]
    assert lines[0]["timing"] == {"seconds": 0.1}


def steps_in_tensorboard(folder):
    return [e.step for e in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("a/x")]


def test_resume_drops_tensorboard_events_after_the_checkpoint(tmp_path):
    for last_step, steps in ((0, (1, 2)), (0, (1, 2, 3)), (2, (3, 4))):
        log = RunLog(tmp_path, last_step=last_step)
        for step in steps:
            log.write("a", step, {"x": 0.5})
        log.close()
        assert steps_in_tensorboard(tmp_path) == [*range(1, last_step + 1), *steps]


def test_flushed_lines_survive_a_crash(tmp_path):
    log = RunLog(tmp_path, last_step=0)
    log.write("a", 1, {"x": 0.5})
    log.flush()
    assert len(read_log(tmp_path / "log.jsonl")) == 1
    assert steps_in_tensorboard(tmp_path) == [1]
    log.close()


def test_tensorboard_has_the_values_of_the_log(tmp_path):
    log = RunLog(tmp_path, last_step=0)
    log.write("val", 7, {"top1": 12.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (scalar,) = events.Scalars("val/top1")
    assert (scalar.step, scalar.value) == (7, 12.5)


def test_damaged_lines_are_skipped_and_reported(tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    lines = [
        '{"kind": "train", "step": 1, "loss": 1.0}', "\x00\x00", "[1, 2]", '{"kind": "train"}',
        '{"kind": "train", "step": "2"}', "[" * 5000, '{"kind": "val", "step": 2, "loss": 2.0}',
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    assert [line["step"] for line in read_log(path)] == [1, 2]
    assert "skipped damaged lines: 2, 3, 4, 5, 6" in caplog.text
    RunLog(tmp_path, last_step=2).close()
    assert [line["step"] for line in read_log(path)] == [1, 2]


def test_validation_that_is_still_to_be_done_is_dropped(tmp_path):
    with RunLog(tmp_path, last_step=0) as log:
        for kind in ("train", "val", "test"):
            log.write(kind, 5, {"x": 1.0})
    RunLog(tmp_path, last_step=5, validate_last=True).close()
    assert [line["kind"] for line in read_log(tmp_path / "log.jsonl")] == ["train"]


def test_clock_that_was_set_back_loses_no_events(tmp_path, monkeypatch):
    with RunLog(tmp_path, last_step=0) as log:
        for step in (1, 2, 3):
            log.write("a", step, {"x": 0.5})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    with RunLog(tmp_path, last_step=2) as log:
        log.write("a", 3, {"x": 0.5})
    assert steps_in_tensorboard(tmp_path) == [1, 2, 3]


def test_tensorboard_that_cannot_write_does_not_stop_the_log(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with RunLog(tmp_path, last_step=0) as log:
        for step in (1, 2):
            log.write("a", step, {"x": 0.5})
        log.flush()
    assert len(read_log(tmp_path / "log.jsonl")) == 2
    assert caplog.text.count("TensorBoard events cannot be written") == 1


def test_disk_full_while_tensorboard_writes_is_one_warning(tmp_path, caplog, capfd, monkeypatch):
    """TensorBoard writes in a thread, whose traceback would be printed."""

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    hook = threading.excepthook
    with RunLog(tmp_path, last_step=0) as log:
        monkeypatch.setattr(RecordWriter, "write", disk_full)
        log.write("a", 1, {"x": 0.5})
    assert caplog.text.count("TensorBoard events cannot be written") == 1
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook == hook


def test_disabled_log_writes_nothing(tmp_path):
    with RunLog(tmp_path, last_step=0, enabled=False) as log:
        log.write("a", 1, {"x": 0.5})
        log.flush()
    assert list(tmp_path.iterdir()) == []


def strip(caption, value):
    return Strip(caption, np.full((4, 6, 3), value, dtype=np.uint8))


def test_strips_are_in_the_folder_and_in_tensorboard_after_resuming(tmp_path):
    captions = ["pouring beer/café", "ski jumping"]
    with RunLog(tmp_path, last_step=0) as log:
        log.write_strip(strip("of a run that was started over", 9))
    with RunLog(tmp_path, last_step=0) as log:
        for value, caption in enumerate(captions):
            log.write_strip(strip(caption, value))
    (tmp_path / "training_clips" / "02.png").write_bytes(b"damaged")
    RunLog(tmp_path, last_step=3).close()
    found = read_strips(tmp_path / "training_clips")
    assert [s.caption for s in found] == captions
    assert [int(s.pixels.max()) for s in found] == [0, 1]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = [f"training_clips/{i:02d} {caption}" for i, caption in enumerate(captions)]
    assert events.Tags()["images"] == tags
    (image,) = events.Images(tags[1])
    assert (image.step, image.width, image.height) == (0, 6, 4)


def test_tensorboard_has_hyperparameters_and_which_scalars_are_results(tmp_path):
    config = ToyConfig(Recipe(steps=7, milestones=(3, 5)))
    with RunLog(tmp_path, last_step=0, config=config) as log:
        log.write("train", 1, {"loss": 1.0})
        log.write("val", 7, {"top1": 12.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = {
        tag: HParamsPluginData.FromString(data)
        for tag, data in events.PluginTagToContent("hparams").items()
    }
    start = content["_hparams_/session_start_info"].session_start_info.hparams
    assert start["train.steps"].number_value == 7
    assert start["train.milestones"].string_value == "[3, 5]"
    assert start["train.nesterov"].number_value == 1
    metrics = content["_hparams_/experiment"].experiment.metric_infos
    assert [metric.name.tag for metric in metrics] == ["val/top1"]
    assert events.Scalars("val/top1")[-1].value == 12.5


def test_percentiles_of_activations_are_scalars(tmp_path):
    with RunLog(tmp_path, last_step=0) as log:
        log.write("train", 2, {"activations": {"conv1": [1.0, 2.0, 3.0, 4.0]}})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("activations/conv1/80")[0].value == 3.0
