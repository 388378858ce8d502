"""Every supported list format, with rows as they occur in practice."""

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
    assert (annotations.videos[0].video_id, annotations.videos[0].is_path) == ("0wR5jVB-WPk", False)
    assert annotations.further_class_names == ("yoga", "abseiling")
    for split in ("training", "train"):
        assert named(read_annotations(path, split=split)) == [("_abc", "abseiling")]
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
    assert named(read_annotations(write('"a.mp4",3\nb, c.mp4,air drumming\nd, e.mp4 5\n'))) == [
        ("a.mp4", 3),
        ("b, c.mp4", "air drumming"),
        ("d, e.mp4", 5),
    ]
    assert named(read_annotations(write("a b.mp4\tair drumming\nc.mp4\tyoga\n"))) == [
        ("a b.mp4", "air drumming"),
        ("c.mp4", "yoga"),
    ]
    assert named(read_annotations(write("a.mp4\nb c.mp4\n"))) == [
        ("a.mp4", None),
        ("b c.mp4", None),
    ]


def test_csv_with_path_and_label(write):
    annotations = read_annotations(
        write('path,label,speaker\nvideos/a.mp4,three,s1\n"b, c.mp4",climbing a rope,s2\n', "t.csv")
    )
    assert annotations.kind == "table, videos in column 'path', labels in column 'label'"
    assert named(annotations) == [("videos/a.mp4", "three"), ("b, c.mp4", "climbing a rope")]


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("path\tlabel\na.mp4\tjump rope\nb c.mp4\trun\n", ("path", "label")),
        ("path label\na.mp4 jump rope\n", None),
        ("video_name,tag\na.mp4,jump rope\nb c.mp4,run\n", ("video_name", "tag")),
        ("Tag;Video_Name\njump rope;a.mp4\nrun;b c.mp4\n", ("Video_Name", "Tag")),
        ("take,gesture\na.mp4,jump rope\nb c.mp4,run\n", ("take", "gesture")),
        ("frames,class,clip_path\n7,jump rope,a.mp4\n9,run,b c.mp4\n", ("clip_path", "class")),
        ("id,what\na,jump rope\nb c,run\n", ("id", "what")),
    ],
)
def test_table_with_any_header(write, text, columns):
    annotations = read_annotations(write(text))
    if columns is None:  # Separated by spaces, like the lists that have no header.
        assert named(annotations) == [("a.mp4 jump", "rope")]
        return
    assert annotations.kind == f"table, videos in column {columns[0]!r}, labels in column " + repr(
        columns[1]
    )
    extension = "" if "id,what" in text else ".mp4"
    assert named(annotations) == [(f"a{extension}", "jump rope"), (f"b c{extension}", "run")]
    assert annotations.videos[0].where == "list.txt:2"


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("video_path", "label"),
        ("clip_path", "class"),
        ("file_path", "class_name"),
        ("filename", "category"),
        ("Video_Name", "Action"),
        ("clip", "tag"),
        ("id", "target"),
    ],
)
def test_known_column_names(write, path, label):
    annotations = read_annotations(write(f"x,{label},{path},y\n1,run,a,2\n"))
    assert named(annotations) == [("a", "run")]


def test_preferred_columns(write):
    """Of several that name videos or labels, the more explicit one."""
    text = "id,name,video_name,video_path,label_id,label\n1,b,c,d.mp4,7,run\n"
    annotations = read_annotations(write(text))
    assert named(annotations) == [("d.mp4", "run")]
    assert annotations.kind == "table, videos in column 'video_path', labels in column 'label'"


def test_header_unlike_other_lines(write):
    """Column names in no list of known names, before ids; but a first video is no header."""
    assert named(read_annotations(write("vid gesture\nx1 3\nx2 4\n"))) == [("x1", 3), ("x2", 4)]
    assert named(read_annotations(write("x0 2\nx1 3\n"))) == [("x0", 2), ("x1", 3)]
    assert named(read_annotations(write("file 2\nx1 3\n"))) == [("file", 2), ("x1", 3)]
    assert named(read_annotations(write("a.rm run\nb.mp4 jump\n"))) == [
        ("a.rm", "run"),
        ("b.mp4", "jump"),
    ]
    unlabeled = read_annotations(write("path\na b.mp4\nc.mp4\n"))
    assert named(unlabeled) == [("a b.mp4", None), ("c.mp4", None)]
    assert unlabeled.kind == "table, videos in column 'path', no labels"
    assert named(read_annotations(write("my clip run\nb.mp4 jump\n"))) == [
        ("my clip", "run"),
        ("b.mp4", "jump"),
    ]


def test_names_without_extension(write):
    """AUTSL and Jester; the test list of Jester has only names."""
    assert named(read_annotations(write("signer0_sample1,41\nsigner1_sample3,2\n"))) == [
        ("signer0_sample1", 41),
        ("signer1_sample3", 2),
    ]
    assert named(read_annotations(write("34870;Drumming Fingers\n56557;Holding a, b.\n"))) == [
        ("34870", "Drumming Fingers"),
        ("56557", "Holding a, b."),
    ]
    names_only = read_annotations(write("34870\n56557\n"))
    assert named(names_only) == [("34870", None), ("56557", None)]
    assert all(video.is_path for video in names_only.videos)


def test_ids_that_pandas_made_floats(write):
    text = "path,label\n0.mp4,0.0\n10.mp4,10.0\n2.mp4,2\n"
    assert named(read_annotations(write(text))) == [("0.mp4", 0), ("10.mp4", 10), ("2.mp4", 2)]


def test_ucf101_lists(write):
    train = read_annotations(write("Archery/v_Archery_g08_c01.avi 1\r\nBiking/v_B_g08.avi 2\r\n"))
    assert named(train) == [("Archery/v_Archery_g08_c01.avi", 1), ("Biking/v_B_g08.avi", 2)]
    test = read_annotations(write("Archery/v_Archery_g01_c01.avi\r\nBiking/v_B_g01.avi\r\n"))
    assert named(test) == [("Archery/v_Archery_g01_c01.avi", None), ("Biking/v_B_g01.avi", None)]


def test_json_of_something_something(write):
    entries = [
        {
            "id": "78687",
            "label": "holding a potato",
            "template": "Holding [something]",
            "placeholders": ["a potato"],
        },
        {"id": 42, "label": "x", "template": "Putting [something] on [something]"},
        {"id": "1420"},
    ]
    annotations = read_annotations(write(json.dumps(entries), "train.json"))
    assert annotations.kind == "Something-Something JSON"
    assert named(annotations) == [
        ("78687", "Holding something"),
        ("42", "Putting something on something"),
        ("1420", None),
    ]
    assert not any(video.is_path for video in annotations.videos)
    with pytest.raises(ValueError, match="has no splits"):
        read_annotations(write(json.dumps(entries), "train.json"), split="train")


def test_json_of_deepmind(write):
    def entry(subset, **annotations):
        return {"annotations": annotations, "duration": 10.0, "subset": subset, "url": "x"}

    document = {
        "0wR5jVB-WPk": entry("train", label="abseiling", segment=[417.0, 427.0]),
        "_b": entry("validate", label="yoga", segment=[1.0, 11.0]),
        "-c": entry("test", segment=[2.0, 12.0]),
    }
    path = write(json.dumps(document), "kinetics700.json")
    (train,) = read_annotations(path, split="train").videos
    assert (train.name, train.label) == ("0wR5jVB-WPk_000417_000427", "abseiling")
    assert (train.video_id, train.is_path) == ("0wR5jVB-WPk", False)
    assert named(read_annotations(path, split="val")) == [("_b_000001_000011", "yoga")]
    assert named(read_annotations(path, split="test")) == [("-c_000002_000012", None)]
    with pytest.raises(ValueError, match="has the splits test, train, validate; select one"):
        read_annotations(path)


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
