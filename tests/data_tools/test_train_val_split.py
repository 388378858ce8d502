"""`i3d-gn index --split 0.8`: stratified, by group, and stable when videos are added."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.train_val_split import group_of, split_groups
from i3d_gn import cli
from i3d_gn.video_io.index import VideoIndex


def names(label, count):
    return [f"class_{label}/video_{i:04d}.mp4" for i in range(count)]


def split(counts, *, train_fraction=0.8, seed=0, group_by=None):
    """{path: is in training} of a data set with so many videos per class."""
    paths = [path for label, count in enumerate(counts) for path in names(label, count)]
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    groups = [group_of(path, group_by) for path in paths]
    sides = split_groups(groups, labels, train_fraction=train_fraction, seed=seed)
    return dict(zip(paths, sides, strict=True))


@pytest.mark.parametrize("train_fraction", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("count", [2, 3, 5, 10, 40, 500])
def test_every_class_is_split_about_as_asked(train_fraction, count):
    for seed in range(5):
        sides = split([count] * 6, train_fraction=train_fraction, seed=seed)
        for label in range(6):
            validated = sum(not sides[path] for path in names(label, count))
            expected = (1 - train_fraction) * count
            assert max(1, np.floor(expected * 2 / 3)) <= validated <= np.ceil(expected * 3 / 2)
            assert validated < count


def test_share_of_a_large_class_is_that_of_a_fair_draw():
    sides = split([20_000])
    assert abs(np.mean(list(sides.values())) - 0.8) < 4 * np.sqrt(0.8 * 0.2 / 20_000)


def test_videos_keep_their_side_when_others_are_added():
    before, after = split([300, 200, 100]), split([330, 200, 250, 500])
    assert all(after[path] == side for path, side in before.items())
    # In classes so small that the limits apply, at most a few at the limit move.
    before, after = split([10] * 20), split([11] * 20)
    assert sum(after[path] != side for path, side in before.items()) <= 20


def test_seed_makes_another_split():
    splits = [split([200], seed=seed) for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert 20 < sum(splits[0][path] != splits[2][path] for path in splits[0]) < 120


def test_only_video_of_a_class_is_for_training():
    for seed in range(10):
        assert split([1, 50], seed=seed)["class_0/video_0000.mp4"]


@pytest.mark.parametrize(
    ("path", "group_by", "group"),
    [
        ("fight/rec7_02.mp4", None, "fight/rec7_02.mp4"),
        ("fight/rec7_02.mp4", "prefix", "rec7"),
        ("calm/rec7_03.avi", "prefix", "rec7"),
        ("x/v_Archery_g01_c05.avi", "prefix", "v_Archery_g01"),
        ("x/GOPR0012-3.mp4", "prefix", "GOPR0012"),
        ("x/tour 2.1 b.mp4", "prefix", "tour 2.1"),
        ("x/_a.mp4", "prefix", "_a"),
        ("x/clip.mp4", "prefix", "clip"),
        ("fight/rec7/02.mp4", "folder", "rec7"),
        ("calm/rec7/03.mp4", "folder", "rec7"),
    ],
)
def test_group_of_a_path(path, group_by, group):
    assert group_of(path, group_by) == group


def test_group_does_not_depend_on_the_form_of_unicode():
    assert group_of("x/cafe\u0301_1.mp4", "prefix") == group_of("x/caf\u00e9_1.mp4", "prefix")


def test_groups_stay_together_across_classes_and_count_by_their_videos():
    rng = np.random.default_rng(0)
    paths = [
        f"{label}/rec{recording}_{cut}.mp4"
        for recording in range(60)
        for label in "ab"
        for cut in range(rng.integers(1, 20))
    ]
    groups = [group_of(path, "prefix") for path in paths]
    labels = ["ab".index(path[0]) for path in paths]
    sides = np.array(split_groups(groups, labels, train_fraction=0.8, seed=0))
    by_group = {group: {s for g, s in zip(groups, sides, strict=True) if g == group}
                for group in groups}  # fmt: skip
    assert all(len(found) == 1 for found in by_group.values())
    for label in (0, 1):
        assert 0.7 <= sides[np.array(labels) == label].mean() <= 0.87


def run(*arguments):
    return cli.main(["index", *map(str, arguments), "--workers", "1"])


@pytest.fixture
def videos(tmp_path, place_clip):
    for name in ("walk/rec1_1", "walk/rec1_2", "walk/rec2_1", "run/rec3_1"):
        place_clip(tmp_path / "videos" / f"{name}.mp4")
    return tmp_path / "videos"


def test_both_indexes_have_one_class_list_and_every_video_once(videos, tmp_path, capsys):
    output = tmp_path / "own.parquet"
    assert run(videos, output, "--split", "0.5", "--group-by", "prefix") == 0
    assert not output.exists()
    parts = [VideoIndex.load(tmp_path / f"own_{name}.parquet") for name in ("train", "val")]
    assert {part.class_names for part in parts} == {("run", "walk")}
    assert sorted(parts[0].paths + parts[1].paths) == sorted(
        path.relative_to(videos).as_posix() for path in videos.glob("*/*")
    )
    recordings = [{Path(path).stem.partition("_")[0] for path in part.paths} for part in parts]
    assert not recordings[0] & recordings[1]
    for part in parts:
        assert [part.class_names[label] for label in part.labels] == [
            path.partition("/")[0] for path in part.paths
        ]
    report = json.loads(Path(f"{output}.report.json").read_text())
    assert [part["num_indexed"] for part in report["parts"]] == [len(part) for part in parts]
    text = capsys.readouterr().out
    assert f"val:    {len(parts[1])} videos, {parts[1].index_path}" in text
    # Copies of one file in both parts are found.
    assert "videos are also in the index for training" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "0.5", "--group-by", "folder"], "the 4 usable videos do not split: none is"),
        (["--group-by", "prefix"], "--group-by and --seed belong to --split FRACTION"),
        (["--seed", "1", "--split", "train"], "--group-by and --seed belong to --split FRACTION"),
    ],
)
def test_split_that_is_impossible_is_a_one_line_error(videos, tmp_path, capsys, options, message):
    assert run(videos, tmp_path / "own.parquet", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.glob("*_train.parquet"))


def test_groups_may_be_named_in_a_column_of_the_list(videos, tmp_path, capsys):
    table = tmp_path / "videos" / "list.csv"
    rows = ["walk/rec1_1.mp4,walk,a", "walk/rec1_2.mp4,walk,b", "walk/rec2_1.mp4,walk,a"]
    table.write_text("\n".join(["path,label,scene", *rows, "run/rec3_1.mp4,run,b"]) + "\n")
    options = [table, tmp_path / "own.parquet", "--split", "0.5", "--group-by"]
    assert run(*options, "scene") == 0
    sides = [VideoIndex.load(tmp_path / f"own_{name}.parquet").paths for name in ("train", "val")]
    assert sorted(map(sorted, sides)) == [
        ["run/rec3_1.mp4", "walk/rec1_2.mp4"],
        ["walk/rec1_1.mp4", "walk/rec2_1.mp4"],
    ]

    def error_of(*arguments):
        assert run(*arguments) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert error_of(*options, "place") == (
        f"error: --group-by place is neither prefix, folder nor a column of {table}, which has "
        "path, label, scene"
    )
    table.write_text(table.read_text().replace("rec2_1.mp4,walk,a", "rec2_1.mp4,walk,"))
    assert error_of(*options, "scene").startswith("error: list.csv:4: field scene is empty")
    assert error_of(videos, *options[1:], "scene").endswith("videos, which has no named columns")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        *((value, f"{value} is not between 0 and 1") for value in ("1.5", "0", "1", "-0.5", "nan")),
        *(
            (value, f"'{value}' is neither the name of a split nor a fraction such as 0.8")
            for value in ("80%", "4/5", "0.8x", "-a")
        ),
    ],
)
def test_split_that_is_neither_name_nor_fraction_is_an_error(videos, tmp_path, capsys, value, line):
    with pytest.raises(SystemExit):
        run(videos, tmp_path / "own.parquet", f"--split={value}")
    assert f"argument --split: {line}" in capsys.readouterr().err


def test_class_folders_have_no_named_splits(videos, tmp_path, capsys):
    assert run(videos, tmp_path / "own.parquet", "--split", "val") == 2
    error = capsys.readouterr().err
    assert "which has no named splits: pass the folder of val as SOURCE, or a fraction" in error
    assert not list(tmp_path.glob("own*"))


def test_small_classes_keep_their_sides_when_videos_are_added(tmp_path, place_clip):
    """Without the earlier indexes walk/2.mp4 would move to validation."""
    folder, output = tmp_path / "videos", tmp_path / "own.parquet"

    def sides():
        assert run(folder, output, "--split", "0.8") == 0
        return {
            path: name
            for name in ("train", "val")
            for path in VideoIndex.load(tmp_path / f"own_{name}.parquet").paths
        }

    def place(first, last):
        for label in ("run", "walk"):
            for number in range(first, last):
                place_clip(folder / label / f"{number}.mp4")

    place(0, 3)
    before = sides()
    place(3, 8)
    after = sides()
    assert {path for path, side in before.items() if side == "train"} <= {
        path for path, side in after.items() if side == "train"
    }
    counts = [sum(side == "val" for path, side in after.items() if path.startswith(label))
              for label in ("run", "walk")]  # fmt: skip
    assert counts == [2, 2]
    assert before["walk/2.mp4"] == "train"


def test_groups_of_an_earlier_split_never_leave_training():
    groups, labels = [f"g{i}" for i in range(10)], [0] * 10
    fresh = split_groups(groups, labels, train_fraction=0.5, seed=0)
    before = dict.fromkeys(groups[:9], True)
    kept = split_groups(groups, labels, train_fraction=0.5, seed=0, before=before)
    assert kept[:9] == [True] * 9
    assert not kept[9]  # the only one that may be for validation
    before = dict(zip(groups, (not side for side in fresh), strict=True))
    swapped = split_groups(groups, labels, train_fraction=0.5, seed=0, before=before)
    assert swapped == [not side for side in fresh]


def test_another_seed_splits_anew(videos, tmp_path):
    def train(seed):
        assert run(videos, tmp_path / "own.parquet", "--split", "0.5", "--seed", str(seed)) == 0
        return tuple(sorted(VideoIndex.load(tmp_path / "own_train.parquet").paths))

    assert len({train(seed) for seed in range(5)}) > 1
