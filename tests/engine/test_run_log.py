import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from i3d_gn.engine.run_log import RunLog, read_log


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


def test_disabled_log_writes_nothing(tmp_path):
    with RunLog(tmp_path, last_step=0, enabled=False) as log:
        log.write("a", 1, {"x": 0.5})
        log.flush()
    assert list(tmp_path.iterdir()) == []
