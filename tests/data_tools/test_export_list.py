"""Exported lists are read back as the same index."""

import json
from pathlib import Path

import pytest

from data_tools.annotations import read_annotations
from i3d_gn import cli
from i3d_gn.video_io.index import VideoIndex


@pytest.fixture
def index(motion_set, tmp_path) -> Path:
    """An index with file names that contain spaces and begin with a hyphen."""
    videos = tmp_path / "videos"
    for source in sorted((motion_set.folder / "videos" / "train").rglob("*.mp4"))[:5]:
        (videos / source.parent.name).mkdir(parents=True, exist_ok=True)
        (videos / source.parent.name / f"- {source.name}").symlink_to(source)
    assert cli.main(["index", str(videos), str(tmp_path / "a.parquet"), "--workers", "1"]) == 0
    return tmp_path / "a.parquet"


@pytest.mark.parametrize("absolute", [[], ["--absolute"]])
@pytest.mark.parametrize("format", ["list", "csv", "json"])
def test_round_trip(index, tmp_path, format, absolute):
    labels, exported = tmp_path / "labels.txt", tmp_path / f"exported.{format}"
    assert cli.main(["export", str(index), str(labels), "--format", "labels"]) == 0
    assert cli.main(["export", str(index), str(exported), "--format", format, *absolute]) == 0
    again = tmp_path / "b.parquet"
    options = ["--videos", str(tmp_path / "videos"), "--label-map", str(labels), "--workers", "1"]
    assert cli.main(["index", str(exported), str(again), *options]) == 0
    first, second = VideoIndex.load(index), VideoIndex.load(again)
    assert second.paths == first.paths
    assert second.labels.tolist() == first.labels.tolist()
    assert second.class_names == first.class_names


def test_formats(index, tmp_path):
    videos = VideoIndex.load(index)
    cli.main(["export", str(index), str(tmp_path / "x.txt")])
    assert (tmp_path / "x.txt").read_text().splitlines()[0] == ("move_down/- move_down_000.mp4 0")
    cli.main(["export", str(index), str(tmp_path / "x.json"), "--format", "json", "--split", "val"])
    # 3D-ResNets-PyTorch compares subsets with exactly these words.
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["database"]["- move_down_000"] == {
        "subset": "validation",
        "annotations": {"label": "move_down"},
    }
    assert document["labels"] == list(videos.class_names)
    assert read_annotations(tmp_path / "x.json").kind == "3D-ResNets JSON"


def test_index_is_not_replaced_by_its_list(index, capsys):
    before = index.read_bytes()
    assert cli.main(["export", str(index), str(index)]) == 2
    assert f"error: {index} cannot be written: it is also an input" in capsys.readouterr().err
    assert index.read_bytes() == before
