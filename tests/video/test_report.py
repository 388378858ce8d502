import json

import numpy as np
import pytest

from i3d_gn.video.evaluate import evaluate
from i3d_gn.video.report import read_run, table
from i3d_gn.video.train import train


@pytest.fixture
def run(small_run, one_process, tmp_path):
    config = small_run("train.steps=4")
    train(config, one_process)
    return config, tmp_path / "run"


def test_table_has_the_results_of_the_run(run, one_process):
    config, folder = run
    before = table([read_run(folder)])
    assert before.count("not run") == 2  # multi-clip top-1 and top-5
    results = evaluate(config, None, one_process)
    assert results is not None
    header, rule, row = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table([read_run(folder)]).splitlines()
    )
    assert len(header) == len(rule) == len(row)
    values = dict(zip(header, row, strict=True))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if line["kind"] == "train"]
    assert values["train loss"] == f"{losses[-1]:.3f}"
    assert values["multi-clip top-1"] == f"{results['top1']:.1f} (3 clips)"
    assert values["videos"] == "6"
    assert values["steps"] == "4"


def test_confusion_rows_are_percentages_of_the_true_class(run, one_process):
    config, folder = run
    results = evaluate(config, None, one_process)
    assert results is not None
    confusion = read_run(folder).confusion
    assert confusion is not None
    np.testing.assert_allclose(confusion.sum(1), 100)
    assert confusion.diagonal().mean() == pytest.approx(results["top1"])


def test_only_tests_with_the_settings_of_the_run_count(run, one_process, small_run, caplog):
    config, folder = run
    results = evaluate(config, None, one_process)
    evaluate(small_run("train.steps=4", "test.num_clips=2"), None, one_process)
    evaluate(small_run("train.steps=4", "clip.stride=1"), None, one_process)
    (damaged := folder / "test_damaged").mkdir()
    (damaged / "results.json").write_text("{")
    caplog.clear()
    assert read_run(folder).results == results
    assert "num_clips: 2 -> 3" in caplog.text
    assert "stride: 1 -> 2" in caplog.text
    assert "test_damaged (damaged)" in caplog.text


def test_newest_tested_checkpoint_counts_and_its_step_is_named(run, one_process):
    config, folder = run
    old = folder / "checkpoints" / "step_00000002.pt"
    new = evaluate(config, None, one_process)
    evaluate(config, old, one_process)  # later, but of an older checkpoint
    assert read_run(folder).results == new
    for path in folder.glob("test_step_00000004*/results.json"):
        path.unlink()
    assert "(3 clips, step 2)" in table([read_run(folder)])
