"""Lists with one video per line, and tables, with rows as they occur in practice."""

import pytest

from data_tools.annotations import read_annotations
from tests.data_tools.conftest import named


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


def test_split_column_of_a_table(write):
    table = write("path,label,split\na.mp4,yoga,train\nb.mp4,yoga,val\n", "t.csv")
    assert named(read_annotations(table, split="val")) == [("b.mp4", "yoga")]
    with pytest.raises(ValueError, match="has the splits train, val; select one with --split"):
        read_annotations(table)
    with pytest.raises(ValueError, match="has no split 'test', only train, val"):
        read_annotations(table, split="test")
    one = write("path,label,split\na.mp4,yoga,train\n", "one.csv")
    assert named(read_annotations(one)) == [("a.mp4", "yoga")]
    no_labels = write("path,split\nyoga/a.mp4,train\nyoga/b.mp4,val\n", "no_labels.csv")
    assert named(read_annotations(no_labels, split="val")) == [("yoga/b.mp4", None)]
    without = write("path,label\na.mp4,yoga\n", "without.csv")
    with pytest.raises(ValueError, match="has no splits, so --split val does not apply"):
        read_annotations(without, split="val")


@pytest.mark.parametrize(
    "rows",
    [
        'a.mp4,"fight\nb.mp4,b\nc.mp4,c\n',  # to the end
        'a.mp4,"fight\nb.mp4,b"\nc.mp4,c\n',  # to a later quote
        'a.mp4,"fight\nb.mp4,"b"\nc.mp4,c\n',
    ],
)
def test_quote_that_is_not_closed_swallows_no_rows(write, rows):
    with pytest.raises(ValueError, match="is a quote not closed"):
        read_annotations(write("path,label\n" + rows, "t.csv"))
