"""Official lists, class folders, and what is refused; further formats in `test_*_lists.py`."""

import csv
import json
from pathlib import Path

import pytest
from pytorchvideo.data.labeled_video_paths import LabeledVideoPaths

from data_tools.annotations import read_annotations
from data_tools.class_names import label_ids
from data_tools.label_map import LabelMap
from data_tools.listed_videos import split_segment_name
from i3d_gn.video_io.find_videos import VIDEO_EXTENSIONS
from tests.data_tools.conftest import named

OFFICIAL = """label,youtube_id,time_start,time_end,split,is_cc
abseiling,0wR5jVB-WPk,417,427,val,0
"massaging person's head",-0abcdefghi,0,10,val,0
"passing American football (in game)",_123456789a,5,15,val,1
"""


def test_official_csv(write):
    annotations = read_annotations(write(OFFICIAL, "val.csv"))
    assert annotations.kind == "official Kinetics CSV"
    assert named(annotations) == [
        ("0wR5jVB-WPk_000417_000427", "abseiling"),
        ("-0abcdefghi_000000_000010", "massaging person's head"),
        ("_123456789a_000005_000015", "passing American football (in game)"),
    ]
    assert [video.video_id for video in annotations.videos][1:] == ["-0abcdefghi", "_123456789a"]
    assert annotations.videos[0].where == "val.csv:2"
    assert not any(video.is_path for video in annotations.videos)


def test_official_list_separated_by_tabs(write):
    text = OFFICIAL.replace("(in game)", "").replace(",", "\t")
    (first, *_) = read_annotations(write("\n" + text, "val.tsv")).videos
    assert (first.name, first.label) == ("0wR5jVB-WPk_000417_000427", "abseiling")


def test_official_csv_of_the_test_set(write):
    annotations = read_annotations(
        write("youtube_id,time_start,time_end,split\n--6bJUbfpnQ,17,27,test\n")
    )
    assert named(annotations) == [("--6bJUbfpnQ_000017_000027", None)]


@pytest.mark.parametrize("name", ["val", "validate", "validation"])
def test_split_is_selected(write, name):
    path = write(
        "label,youtube_id,time_start,time_end,split\n"
        "yoga,aaaaaaaaaaa,1,11,train\nyoga,bbbbbbbbbbb,1,11,validate\n"
    )
    assert named(read_annotations(path, split=name)) == [("bbbbbbbbbbb_000001_000011", "yoga")]
    with pytest.raises(ValueError, match="has the splits train, validate; select one with --split"):
        read_annotations(path)
    with pytest.raises(ValueError, match="has no split 'test', only train, validate"):
        read_annotations(path, split="test")


@pytest.fixture
def hmdb51(tmp_path):
    """Split files of two classes, as released: CRLF, odd names, blanks at the end of lines."""
    folder = tmp_path / "splits"
    folder.mkdir()
    (folder / "brush_hair_test_split1.txt").write_bytes(
        b"April_#1_brush;hair_u.avi 1 \r\nb (2).avi 2 \r\nc.avi 0 \r\n"
    )
    (folder / "brush_hair_test_split2.txt").write_text("b (2).avi 1\n")
    (folder / "wave_test_split1.txt").write_text("w.avi 1\n")
    (folder / "readme.txt").write_text("about")
    return folder


def test_hmdb51_splits(hmdb51):
    train = read_annotations(hmdb51, split="train1")
    assert named(train) == [("April_#1_brush;hair_u", "brush_hair"), ("w", "wave")]
    assert train.videos[0].where == "brush_hair_test_split1.txt:1"
    assert not any(video.is_path for video in train.videos)
    assert named(read_annotations(hmdb51, split="test1")) == [("b (2)", "brush_hair")]
    second = read_annotations(hmdb51, split="train2")
    assert named(second) == [("b (2)", "brush_hair")]
    assert second.further_class_names == ("brush_hair", "wave")
    with pytest.raises(ValueError, match="has the splits test1, train1, train2; select one"):
        read_annotations(hmdb51)
    with pytest.raises(ValueError, match="is one class of HMDB51; pass the folder of all"):
        read_annotations(hmdb51 / "wave_test_split1.txt")
    (hmdb51 / "wave_test_split1.txt").write_text("w.avi 3\n")
    with pytest.raises(ValueError, match="wave_test_split1.txt:1: 'w.avi 3' is not `file 0`"):
        read_annotations(hmdb51, split="train1")


def test_folder_of_frames_is_not_supported(tmp_path):
    (tmp_path / "jump" / "1").mkdir(parents=True)
    (tmp_path / "jump" / "1" / "00001.jpg").touch()
    with pytest.raises(ValueError, match="folders of frames are not supported; make a video"):
        read_annotations(tmp_path)


@pytest.mark.parametrize("extension", sorted(VIDEO_EXTENSIONS))
def test_extensions(tmp_path, extension):
    for name in (f"1{extension}", f"2{extension.upper()}", f"3{extension}x", "notes.txt"):
        (tmp_path / "jump").mkdir(exist_ok=True)
        (tmp_path / "jump" / name).touch()
    annotations = read_annotations(tmp_path)
    assert [Path(video.name).stem for video in annotations.videos] == ["1", "2"]
    assert annotations.skipped == (f"jump/3{extension}x", "jump/notes.txt")


def test_class_folders(tmp_path):
    for name in [
        "air_drumming/-a.mp4",
        "air_drumming/deeper/_b.MKV",
        "yoga/c.webm",
        "yoga/notes.txt",
        "yoga/._c.webm",
        ".hidden/d.mp4",
        "flat.mp4",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty class").mkdir()
    annotations = read_annotations(tmp_path)
    assert annotations.kind == "class folders"
    assert named(annotations) == [
        ("air_drumming/-a.mp4", "air_drumming"),
        ("air_drumming/deeper/_b.MKV", "air_drumming"),
        ("yoga/c.webm", "yoga"),
    ]
    assert annotations.further_class_names == ("air_drumming", "empty class", "yoga")
    assert annotations.skipped == ("flat.mp4", "yoga/notes.txt")


def test_class_folders_agree_with_pytorchvideo(tmp_path):
    """On mp4 and avi, the only extensions that pytorchvideo reads."""
    for name in ["b c/x.mp4", "b c/-y.avi", "_a/z.MP4", "A/deep/er.mp4"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    annotations = read_annotations(tmp_path)
    _, ids = label_ids(
        [video.label for video in annotations.videos],
        where=[video.where for video in annotations.videos],
        label_map=None,
        source="folder",
    )
    ours = {str(tmp_path / v.name): i for v, i in zip(annotations.videos, ids, strict=True)}
    theirs = LabeledVideoPaths.from_directory(str(tmp_path))
    assert ours == {path: entry["label"] for path, entry in (theirs[i] for i in range(len(theirs)))}
    assert len(ours) == 4


def json_of(label="a", subset="training", labels=()):
    database = {"x": {"subset": subset, "annotations": {"label": label}}}
    return json.dumps({"labels": labels, "database": database})


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "list.txt", r"list.txt \(`path label` list\) lists no videos"),
        ("a.mp4 1\nwhat\n", "list.txt", r"list.txt:2: 'what' is neither `path label` nor"),
        ("a.mp4,1.5\n", "list.txt", r"list.txt:1: label 1.5 is neither an integer id nor a name"),
        ("path,path\na.mp4,1\n", "t.csv", r"t.csv: which columns of path, path"),
        ("x" * 200_000 + ",1\n", "t.csv", r"t.csv is not a list of videos: field larger"),
        ("path,start,stop\na.mp4,1,2\n", "t.csv", r"t.csv: which columns of path, start, stop"),
        (OFFICIAL.replace(",417,", ",4m,"), "v.csv", r"v.csv:2: time_start .* integer seconds"),
        (OFFICIAL + "yoga,,1,2,val,0\n", "v.csv", r"v.csv:5: field youtube_id is missing"),
        (OFFICIAL + "yoga,a,1\n", "v.csv", r"v.csv:5: expected the 6 fields label,youtube_id"),
        (OFFICIAL + "a, b,c,1,2,val,0\n", "v.csv", r"v.csv:5: .* quote fields that contain ','"),
        ("path,label\na.mp4,\n", "t.csv", r"t.csv:2: field label is missing or empty"),
        ("{}", "k.json", r"k.json \(Kinetics JSON of DeepMind\) lists no videos"),
        ("[1]", "k.json", r"k.json has none of the supported JSON formats"),
        ('"text"', "k.json", r"k.json has none of the supported JSON formats"),
        ('{"a": 1}', "k.json", r"k.json has none of the supported JSON formats"),
        ('[{"id": 1, "template": 5}]', "k.json", r"1 has the template 5"),
        ("{", "k.json", r"k.json is not a JSON file"),
        ("[" * 100_000, "k.json", r"k.json is not a JSON file"),
        (json_of(label=3.5), "k.json", r"x has the label 3.5"),
        (json_of(label=["a"]), "k.json", r"x has the label \['a'\]"),
        (json_of(subset=None), "k.json", r"x has the subset None"),
        (json_of(labels=[1]), "k.json", r"labels must be strings, not \(1,\)"),
    ],
)
def test_malformed_lists(write, text, name, message):
    with pytest.raises(ValueError, match=message) as error:
        read_annotations(write(text, name))
    assert "\n" not in str(error.value)


def test_invalid_sources(tmp_path, write):
    with pytest.raises(ValueError, match="list or folder not found"):
        read_annotations(tmp_path / "none")
    with pytest.raises(ValueError, match="no class folders with videos.*pass its list as SOURCE"):
        read_annotations(tmp_path)
    with pytest.raises(ValueError, match="has no splits, so --split val does not apply"):
        read_annotations(write("a.mp4 1\n"), split="val")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not a UTF-8 text file"):
        read_annotations(tmp_path / "binary")


@pytest.mark.parametrize(
    ("stem", "video_id"),
    [
        ("-_A_0000000_000010_000020", "-_A_0000000"),
        ("abc_000001_000002_000010_000020", "abc_000001_000002"),
        ("0wR5jVB-WPk", "0wR5jVB-WPk"),
        ("a_12_34", "a_12_34"),
    ],
)
def test_split_segment_name(stem, video_id):
    assert split_segment_name(stem) == video_id


@pytest.mark.real_data
def test_official_lists_of_kinetics_400(shared_data):
    folder = shared_data / "kinetics400"
    val = read_annotations(folder / "val_official.csv")
    assert len(val.videos) == 19_906
    assert sum(video.video_id.startswith("-") for video in val.videos) == 644
    assert sum(video.video_id.startswith("_") for video in val.videos) == 290
    assert {len(video.video_id) for video in val.videos} == {11}

    label_map = (folder / "label_map.txt").read_text().splitlines()
    where = [video.where for video in val.videos]
    labels = [video.label for video in val.videos]
    names, ids = label_ids(labels, where=where, label_map=None, source="val")
    assert names == label_map
    given = LabelMap(label_map)
    assert label_ids(labels, where=where, label_map=given, source="val")[1] == ids
    with open(folder / "val_official.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [label_map[i] for i in ids] == [row["label"] for row in rows]
    assert [video.name for video in val.videos] == [
        f"{row['youtube_id']}_{row['time_start'].zfill(6)}_{row['time_end'].zfill(6)}"
        for row in rows
    ]

    test = read_annotations(folder / "test_official.csv")
    assert {video.label for video in test.videos} == {None}
    train = read_annotations(folder / "train_tiny_400rows.csv")
    assert len(train.videos) == 400
    assert {video.label for video in train.videos} <= set(label_map)


@pytest.mark.real_data
@pytest.mark.parametrize("split", ["train", "val"])
def test_list_of_kinetics_tiny_agrees_with_pytorchvideo(shared_data, split):
    path = shared_data / "kinetics_tiny" / f"kinetics_tiny_{split}_video.txt"
    theirs = LabeledVideoPaths.from_csv(str(path))
    assert named(read_annotations(path)) == [
        (name, entry["label"]) for name, entry in (theirs[i] for i in range(len(theirs)))
    ]


@pytest.mark.real_data
def test_list_of_grid_digits(shared_data):
    train = read_annotations(shared_data / "grid_digits" / "train.csv")
    assert len(train.videos) == 800
    assert train.videos[0].name == "videos/bbaf3s.mp4"
    assert len({video.label for video in train.videos}) == 10
