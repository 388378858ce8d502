"""Splits share their classes, whatever their lists call them, and no videos."""

import pyarrow.parquet as pq
import pytest

from i3d_gn.video_io.index import VideoIndex
from tests.data_tools.index_runs import report_of, run


def test_train_and_val_share_class_list(tmp_path, place_clip, output, capsys):
    for name in ["a.mp4", "b.mp4", "c.mp4"]:
        place_clip(tmp_path / name)
    (tmp_path / "train.csv").write_text("path,label\na.mp4,air_drumming\nb.mp4,yoga\n")
    (tmp_path / "val.csv").write_text("path,label\nc.mp4,yoga\n")
    (tmp_path / "other.csv").write_text("path,label\nc.mp4,yogaa\n")
    train = tmp_path / "train.parquet"
    assert run(tmp_path / "train.csv", train) == 0
    assert run(tmp_path / "val.csv", output, "--label-map", train) == 0
    assert VideoIndex.load(output).class_names == VideoIndex.load(train).class_names
    assert VideoIndex.load(output).labels.tolist() == [1]

    capsys.readouterr()
    assert run(tmp_path / "other.csv", output, "--label-map", train) == 2
    message = capsys.readouterr().err
    assert "class 'yogaa' (other.csv:2) is not one of the 2" in message
    assert "pass the same complete --label-map for both" in message
    assert message.count("\n") == 1


def test_unlabeled_list_has_no_thinned_classes(tmp_path, place_clip, output, capsys):
    place_clip(tmp_path / "videos" / "aaaaaaaaaaa.mp4")
    (tmp_path / "test.csv").write_text(
        "youtube_id,time_start,time_end,split\naaaaaaaaaaa,1,11,test\nbbbbbbbbbbb,1,11,test\n"
    )
    (tmp_path / "names.txt").write_text("yoga\nzumba\n")
    options = ["--videos", tmp_path / "videos", "--label-map", tmp_path / "names.txt"]
    assert run(tmp_path / "test.csv", output, *options) == 0
    assert report_of(output)["thinned_classes"] == []
    assert "warning" not in capsys.readouterr().out
    assert VideoIndex.load(output).labels.tolist() == [-1]


def classes_of(output):
    """Class names of the videos of an index, by path."""
    rows = pq.read_table(output).to_pylist()
    return {row["path"]: row["class_name"] for row in rows}


def test_numbered_class_folders(tmp_path, place_clip, output):
    """Folders 0 to 10, and a list with numbers, which are the names of the folders."""
    for i in range(11):
        place_clip(tmp_path / "train" / str(i) / "a.mp4")
        place_clip(tmp_path / "val" / str(i) / "b.mp4")
    (tmp_path / "val.txt").write_text("".join(f"val/{i}/b.mp4 {i}\n" for i in range(11)))
    train = tmp_path / "train.parquet"
    assert run(tmp_path / "train", train, workers=2) == 0
    assert VideoIndex.load(train).class_names == tuple(str(i) for i in range(11))
    assert run(tmp_path / "val.txt", output, "--label-map", train, workers=2) == 0
    assert classes_of(output) == {f"val/{i}/b.mp4": str(i) for i in range(11)}


@pytest.fixture
def ucf101(tmp_path, place_clip):
    """Videos and lists of three classes in the format of UCF101."""
    for name in ("Archery", "Biking", "Tai Chi"):
        for group in ("01", "08"):
            place_clip(tmp_path / "ucf" / name / f"v_{name}_g{group}_c01.avi")
    (tmp_path / "classInd.txt").write_text("1 Archery\r\n2 Biking\r\n3 Tai Chi\r\n")
    (tmp_path / "trainlist01.txt").write_text(
        "Archery/v_Archery_g08_c01.avi 1\r\nBiking/v_Biking_g08_c01.avi 2\r\n"
    )
    (tmp_path / "testlist01.txt").write_text(
        "Biking/v_Biking_g01_c01.avi\r\nTai Chi/v_Tai Chi_g01_c01.avi\r\n"
    )
    return tmp_path


def test_ucf101_lists(ucf101, output, capsys):
    """Labels count from 1, and test lists have none but the class folders."""
    train, videos = ucf101 / "train.parquet", ["--videos", ucf101 / "ucf"]
    options = [*videos, "--label-map", ucf101 / "classInd.txt"]
    assert run(ucf101 / "trainlist01.txt", train, *options) == 0
    assert VideoIndex.load(train).class_names == ("Archery", "Biking", "Tai Chi")
    assert classes_of(train) == {
        "Archery/v_Archery_g08_c01.avi": "Archery",
        "Biking/v_Biking_g08_c01.avi": "Biking",
    }
    assert run(ucf101 / "testlist01.txt", output, *videos, "--label-map", train) == 0
    assert classes_of(output) == {
        "Biking/v_Biking_g01_c01.avi": "Biking",
        "Tai Chi/v_Tai Chi_g01_c01.avi": "Tai Chi",
    }
    # Without numbers in the label map, or without one, the labels would be shifted by one.
    capsys.readouterr()
    (ucf101 / "names.txt").write_text("Archery\nBiking\nTai Chi\n")
    for label_map in (train, ucf101 / "names.txt"):
        options = [*videos, "--label-map", label_map]
        assert run(ucf101 / "trainlist01.txt", output, *options) == 2
        error = capsys.readouterr().err
        assert "v_Archery_g08_c01.avi (trainlist01.txt:1) is labeled 'Biking', but" in error
    assert run(ucf101 / "trainlist01.txt", output, *videos) == 2
    assert "pass a --label-map" in capsys.readouterr().err


def test_unlabeled_videos_are_counted(tmp_path, place_clip, output, capsys):
    place_clip(tmp_path / "a.mp4")
    (tmp_path / "list.txt").write_text("a.mp4\n")
    (tmp_path / "names.txt").write_text("yoga\n")
    assert run(tmp_path / "list.txt", output, "--label-map", tmp_path / "names.txt") == 0
    assert "unlabeled: 1 of the indexed videos" in capsys.readouterr().out
    assert report_of(output)["num_unlabeled"] == 1


def test_class_of_the_label_map_without_listed_videos_is_no_warning(
    tmp_path, place_clip, output, capsys
):
    place_clip(tmp_path / "a.mp4")
    (tmp_path / "list.csv").write_text("path,label\na.mp4,yoga\nb.mp4,zumba\n")
    (tmp_path / "names.txt").write_text("abseiling\nyoga\nzumba\n")
    assert run(tmp_path / "list.csv", output, "--label-map", tmp_path / "names.txt") == 0
    thinned = report_of(output)["thinned_classes"]
    assert [entry["class_name"] for entry in thinned] == ["zumba"]
    # A class folder without videos is one that training would have and never see.
    place_clip(tmp_path / "videos" / "yoga" / "a.mp4")
    (tmp_path / "videos" / "zumba").mkdir()
    assert run(tmp_path / "videos", output) == 0
    thinned = report_of(output)["thinned_classes"]
    assert [entry["class_name"] for entry in thinned] == ["zumba"]


def test_videos_shared_with_the_label_map_are_named(
    tmp_path, place_clip, encode, images, output, capsys
):
    train = tmp_path / "train"
    first = place_clip(train / "a" / "1.mp4")
    place_clip(train / "b" / "idididididi_000010_000020.mp4")
    place_clip(train / "b" / "other.mkv").write_bytes(first.read_bytes() + b"\0")
    encode(train / "b" / "same name.mp4", images)
    assert run(train, tmp_path / "train.parquet") == 0
    val = tmp_path / "val"
    (val / "a").mkdir(parents=True)
    (val / "a" / "link.mp4").symlink_to(first)
    (val / "a" / "copied.mp4").write_bytes((train / "b" / "other.mkv").read_bytes())
    encode(val / "a" / "idididididi_000030_000040.mp4", images[:5])
    encode(val / "a" / "same name.mp4", images[:4])
    encode(val / "a" / "same size.mp4", images[::-1])
    assert run(val, output, "--label-map", tmp_path / "train.parquet") == 0
    assert report_of(output)["shared_with_label_map"] == [
        {"path": "a/copied.mp4", "other_path": "b/other.mkv", "equal": "content"},
        {
            "path": "a/idididididi_000030_000040.mp4",
            "other_path": "b/idididididi_000010_000020.mp4",
            "equal": "YouTube id",
        },
        {"path": "a/link.mp4", "other_path": "a/1.mp4", "equal": "file"},
    ]
    text = capsys.readouterr().out
    assert "warning: 3 videos are also in the index used as label map" in text
    assert "a/link.mp4 has the file of a/1.mp4" not in text
    assert "a/link.mp4: same file as a/1.mp4" in text
    # The index of the same videos is no other split.
    assert run(val, output, "--label-map", output) == 0
    assert report_of(output)["shared_with_label_map"] == []
