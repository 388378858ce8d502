"""Every supported list format, with rows as they occur in practice."""

import csv
import json
from pathlib import Path

import pytest
from pytorchvideo.data.labeled_video_paths import LabeledVideoPaths

from data_tools.annotations import read_annotations, split_segment_name
from data_tools.class_names import label_ids

OFFICIAL = """label,youtube_id,time_start,time_end,split,is_cc
abseiling,0wR5jVB-WPk,417,427,val,0
"massaging person's head",-0abcdefghi,0,10,val,0
"passing American football (in game)",_123456789a,5,15,val,1
"""


@pytest.fixture
def write(tmp_path):
    def write_text(text: str, name: str = "list.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return write_text


def named(annotations):
    return [(video.name, video.label) for video in annotations.videos]


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


def test_json_of_3d_resnets(write):
    database = {
        "0wR5jVB-WPk_000417_000427": {"subset": "validation", "annotations": {"label": "yoga"}},
        "_abc": {"subset": "training", "annotations": {"label": "abseiling"}},
        "-xy": {"subset": "testing", "annotations": {}},
    }
    path = write(json.dumps({"labels": ["yoga", "abseiling"], "database": database}), "k.json")
    annotations = read_annotations(path, split="val")
    assert annotations.kind == "3D-ResNets JSON"
    assert named(annotations) == [("0wR5jVB-WPk_000417_000427", "yoga")]
    assert annotations.videos[0].video_id == "0wR5jVB-WPk"
    assert annotations.further_class_names == ("yoga", "abseiling")
    assert named(read_annotations(path, split="training")) == [("_abc", "abseiling")]
    assert named(read_annotations(path, split="test")) == [("-xy", None)]


def test_path_label_list(write):
    annotations = read_annotations(
        write(
            "D32_1gwq35E.mp4 0\r\n"
            "-wiliK50Zw.mp4 1\r\n"
            "\r\n"
            "/data/my videos/a b.MP4 12\r\n"
            "sub/x.mkv\t-1\r\n"
        )
    )
    assert annotations.kind == "`path label` list"
    assert named(annotations) == [
        ("D32_1gwq35E.mp4", 0),
        ("-wiliK50Zw.mp4", 1),
        ("/data/my videos/a b.MP4", 12),
        ("sub/x.mkv", -1),
    ]
    assert annotations.videos[2].where == "list.txt:4"
    assert all(video.is_path for video in annotations.videos)


def test_path_label_list_with_names_commas_or_without_labels(write):
    assert named(read_annotations(write("\ufeffa.mp4 yoga\nb c.mp4 air_drumming\n"))) == [
        ("a.mp4", "yoga"),
        ("b c.mp4", "air_drumming"),
    ]
    assert named(read_annotations(write("a.mp4,3\nb, c.mp4,air drumming\nd, e.mp4 5\n"))) == [
        ("a.mp4", 3),
        ("b, c.mp4", "air drumming"),
        ("d, e.mp4", 5),
    ]
    assert named(read_annotations(write("a.mp4\nb c.mp4\n"))) == [
        ("a.mp4", None),
        ("b c.mp4", None),
    ]


def test_csv_with_path_and_label(write):
    annotations = read_annotations(
        write('path,label,speaker\nvideos/a.mp4,three,s1\n"b, c.mp4",climbing a rope,s2\n', "t.csv")
    )
    assert annotations.kind == "CSV with path,label"
    assert named(annotations) == [("videos/a.mp4", "three"), ("b, c.mp4", "climbing a rope")]


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


def test_class_folders_agree_with_pytorchvideo(tmp_path):
    """On mp4 and avi, the only extensions that pytorchvideo reads."""
    for name in ["b c/x.mp4", "b c/-y.avi", "_a/z.MP4", "A/deep/er.mp4"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    annotations = read_annotations(tmp_path)
    _, ids = label_ids(
        [video.label for video in annotations.videos],
        where=[video.where for video in annotations.videos],
        class_names=None,
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
        (OFFICIAL.replace(",417,", ",4m,"), "v.csv", r"v.csv:2: time_start .* integer seconds"),
        (OFFICIAL + "yoga,,1,2,val,0\n", "v.csv", r"v.csv:5: field youtube_id is missing"),
        (OFFICIAL + "yoga,a,1\n", "v.csv", r"v.csv:5: expected the 6 fields label,youtube_id"),
        (OFFICIAL + "a, b,c,1,2,val,0\n", "v.csv", r"v.csv:5: .* quote names that contain a comma"),
        ("path,label\na.mp4,\n", "t.csv", r"t.csv:2: field label is missing or empty"),
        ("{}", "k.json", r"k.json is not in the JSON format of 3D-ResNets-PyTorch"),
        ("[1]", "k.json", r"k.json is not in the JSON format"),
        ("{", "k.json", r"k.json is not in the JSON format"),
        (json_of(label=3.5), "k.json", r"x has the label 3.5 and the subset 'training'"),
        (json_of(label=["a"]), "k.json", r"x has the label \['a'\]"),
        (json_of(subset=None), "k.json", r"x has the label 'a' and the subset None"),
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
    names, ids = label_ids(labels, where=where, class_names=None, source="val")
    assert names == label_map
    assert label_ids(labels, where=where, class_names=label_map, source="val")[1] == ids
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
