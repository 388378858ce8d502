from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from i3d_gn.engine.run_log import RunLog, read_log


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, last_step=0)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": float(step)}, {"seconds": 0.1})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a crash in mid-line
    log = RunLog(tmp_path, last_step=2)
    log.write("train", 3, {"loss": 30.0})
    log.close()
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["loss"] for line in lines] == [1.0, 2.0, 30.0]
    assert lines[0]["timing"] == {"seconds": 0.1}


def steps_in_tensorboard(folder):
    return [e.step for e in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("a/x")]


def test_tensorboard_forgets_likewise_also_what_came_before_any_checkpoint(tmp_path):
    for last_step, steps in ((0, (1, 2)), (0, (1, 2, 3)), (2, (3, 4))):
        log = RunLog(tmp_path, last_step=last_step)
        for step in steps:
            log.write("a", step, {"x": 0.5})
        log.close()
        assert steps_in_tensorboard(tmp_path) == [*range(1, last_step + 1), *steps]


def test_what_was_flushed_is_there_though_the_process_dies(tmp_path):
    log = RunLog(tmp_path, last_step=0)
    log.write("a", 1, {"x": 0.5})
    log.flush()
    assert len(read_log(tmp_path / "log.jsonl")) == 1
    assert steps_in_tensorboard(tmp_path) == [1]
    log.close()


def test_tensorboard_has_the_same_values(tmp_path):
    log = RunLog(tmp_path, last_step=0)
    log.write("val", 7, {"top1": 12.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (scalar,) = events.Scalars("val/top1")
    assert (scalar.step, scalar.value) == (7, 12.5)
