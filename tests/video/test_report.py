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


def test_the_table_holds_what_the_run_wrote(run, one_process):
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
