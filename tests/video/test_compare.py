import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from i3d_gn.engine.typed_config import to_dict, to_yaml
from i3d_gn.files import write_json, write_text
from i3d_gn.video import commands
from i3d_gn.video.compare import (
    Entry,
    accuracy,
    comparison,
    difference,
    discordant,
    mcnemar,
    read_entry,
    read_groups,
)
from i3d_gn.video.config import Config, DataConfig, TrainConfig


def entry(name, correct, once=True):
    return Entry(name, 1, {f"v{i}": float(value) for i, value in enumerate(correct)}, once)


def write_run(folder, scores, labels, first=0):
    """A run whose test of videos v<first>, v<first + 1>, ... gave `scores`."""
    config = Config(
        output_dir=str(folder), data=DataConfig("train", "val"), train=TrainConfig(steps=1)
    )
    write_text(folder / "config.yaml", to_yaml(config))
    test = folder / "test_step_1"
    write_json(test / "results.json", {"config": to_dict(config), "step": 1})
    paths = [f"v{first + i}" for i in range(len(labels))]
    columns = {"path": paths, "label": labels, "scores": [list(map(float, s)) for s in scores]}
    metadata = {"class_names": json.dumps(["a", "b"])}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), test / "scores.parquet")
    return folder


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 6, 0.03125),  # 2 / 2^6
        (121, 59, 4.434e-06),  # exact binomial test of 59 in 180, by scipy.stats.binomtest
        (1, 9, 0.021484375),  # 2 (1 + 10) / 2^10
    ],
)
def test_exact_mcnemar(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == pytest.approx(p, rel=1e-3)
    assert mcnemar(only_b, only_a) == mcnemar(only_a, only_b)


def test_interval_of_independent_videos_is_that_of_a_proportion():
    values = np.arange(400) % 4 != 0  # 75 % right
    interval = accuracy(entry("a", values), {})
    assert interval.value == 75.0
    half = 1.96 * 100 * np.sqrt(0.75 * 0.25 / 400)
    assert interval.low == pytest.approx(75 - half, abs=0.3)
    assert interval.high == pytest.approx(75 + half, abs=0.3)


def test_interval_is_wider_where_videos_come_in_groups():
    """40 groups of 10 videos that are all right or all wrong: as uncertain as 40 videos."""
    values = np.repeat(np.arange(40) % 4 != 0, 10)
    groups = {f"v{i}": f"g{i // 10}" for i in range(400)}
    interval = accuracy(entry("a", values), groups)
    half = 1.96 * 100 * np.sqrt(0.75 * 0.25 / 40)
    assert interval.low == pytest.approx(75 - half, abs=2.0)
    assert interval.high == pytest.approx(75 + half, abs=2.0)


def test_difference_is_paired():
    """Equal networks differ by exactly 0, however uncertain their accuracy is."""
    values = np.arange(50) % 2
    a, b = entry("a", values), entry("b", values)
    assert str(difference(a, b, {})) == "0.0 [0.0, 0.0]"
    better = entry("c", np.maximum(values, np.arange(50) < 10))
    assert difference(better, a, {}).value == pytest.approx(10.0)
    assert discordant(better, a) == (5, 0)
    assert discordant(a, better) == (0, 5)


def test_folds_are_pooled_and_seeds_averaged(tmp_path):
    right, wrong = [1, 0], [0, 1]
    folds = [
        write_run(tmp_path / "f0", [right, wrong], [0, 0]),
        write_run(tmp_path / "f1", [wrong, right], [1, -1], first=2),  # the last has no label
        tmp_path / "not_started",
    ]
    folds[2].mkdir()
    pooled = read_entry("gn", folds)
    assert pooled == Entry("gn", 2, {"v0": 1.0, "v1": 0.0, "v2": 1.0}, once=True)
    seeds = read_entry("gn", [folds[0], write_run(tmp_path / "s1", [right, right], [0, 0])])
    assert seeds == Entry("gn", 2, {"v0": 1.0, "v1": 0.5}, once=False)
    table = comparison([pooled, seeds], {})
    assert "25.0 [" in table.splitlines()[3]  # of v0 and v1: 75 % against 50 %
    assert table.splitlines()[3].count(" - ") == 2


def test_small_p_is_not_zero(tmp_path):
    write_run(tmp_path / "a", [[1, 0]] * 20, [0] * 20)
    write_run(tmp_path / "b", [[0, 1]] * 20, [0] * 20)
    first, other = read_entry("a", [tmp_path / "a"]), read_entry("b", [tmp_path / "b"])
    last = comparison([first, other], {}).splitlines()[-1].split("|")
    assert [cell.strip() for cell in last[-3:-1]] == ["0 / 20", "< 0.001"]


def test_command(tmp_path, capsys):
    write_run(tmp_path / "gn-0", [[1, 0]] * 8, [0] * 8)
    write_run(tmp_path / "bn-0", [[1, 0]] * 2 + [[0, 1]] * 6, [0] * 8)
    groups = tmp_path / "list.csv"
    groups.write_text("path,recording\n" + "".join(f"v{i},r{i // 2}\n" for i in range(8)))
    arguments = [f"bn={tmp_path}/bn-*", f"gn={tmp_path}/gn-*"]
    assert commands.compare([*arguments, "--groups", str(groups)]) == 0
    last = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    assert last[:4] == ["gn", "1", "8", "100.0 [100.0, 100.0]"]
    assert last[4].startswith("75.0 [")
    assert last[5:] == ["6 / 0", "0.031"]
    with pytest.raises(ValueError, match="expected NAME=RUNS"):
        commands.compare([str(tmp_path / "gn-0")])
    with pytest.raises(ValueError, match="expected NAME=RUNS"):
        commands.compare([f"gn={tmp_path}/none-*"])
    with pytest.raises(ValueError, match="columns path and camera"):
        commands.compare([*arguments, "--groups", str(groups), "--group-column", "camera"])


def test_nothing_tested_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="gn: none of 1 runs has been tested"):
        read_entry("gn", [tmp_path])


def test_groups_by_path(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("path,label,camera\na.mp4,x,c1\nb.mp4,y,c2\n")
    assert read_groups(path, "camera") == {"a.mp4": "c1", "b.mp4": "c2"}
    path.write_text("path,camera\na.mp4,c1\n", encoding="utf-8-sig")
    assert read_groups(path, "camera") == {"a.mp4": "c1"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,recording\nv0,\n", "the recording of v0 is ''; each video needs one"),
        (b"path,recording\nv0\n", "the recording of v0 is ''; each video needs one"),
        (b"path,recording\nv0,a\nv0,b\n", "the recording of v0 is 'a' and 'b'"),
        (b"path,recording\nv0,caf\xe9\n", "groups.csv cannot be read as a CSV file in UTF-8: "),
        (b'path,recording\nv0,"a\nv1,b\n', "groups.csv cannot be read as a CSV file in UTF-8: "),
        (None, "groups.csv cannot be read as a CSV file in UTF-8: .*No such file"),
        (b"path,recording\nval/v0,a\n", "2 of 2 videos have no group, the first is v0"),
        (b"path,recording\nv0,a\n", "1 of 2 videos have no group, the first is v1"),
    ],
)
def test_groups_that_would_not_group_are_one_line_errors(tmp_path, content, message):
    path = tmp_path / "groups.csv"
    if content is not None:
        path.write_bytes(content)
    write_run(tmp_path / "gn", [[1, 0]] * 2, [0] * 2)
    with pytest.raises(ValueError, match=message):
        commands.compare([f"gn={tmp_path}/gn", "--groups", str(path)])


def test_damaged_scores_are_one_line_errors(tmp_path):
    scores = write_run(tmp_path / "gn", [[1, 0]], [0]) / "test_step_1" / "scores.parquet"
    for damage in (lambda: scores.write_bytes(b""), scores.unlink):
        damage()
        with pytest.raises(ValueError, match=r"scores.parquet is damaged .* delete"):
            read_entry("gn", [tmp_path / "gn"])
