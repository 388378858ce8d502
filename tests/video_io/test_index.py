"""The index file: round trip, and invalid contents are refused."""

import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from i3d_gn.video_io.errors import VideoDecodeError
from i3d_gn.video_io.index import VideoIndex, VideoRecord, write_index

CLASS_NAMES = ["air drumming", "massaging person's head", "yoga"]
RECORD = VideoRecord(
    path="yoga/-abc.mp4",
    label=2,
    num_frames=300,
    fps=29.97,
    duration_seconds=10.01,
    width=454,
    height=256,
)


def records():
    return [
        RECORD,
        replace(RECORD, path="b c/_x y.mkv", label=0, num_frames=7, width=128, height=96),
        replace(RECORD, path="unknown.mp4", label=-1, num_frames=1),
    ]


@pytest.fixture
def index_path(tmp_path):
    (tmp_path / "tree" / "videos").mkdir(parents=True)
    path = tmp_path / "tree" / "lists" / "val.parquet"
    write_index(path, records(), class_names=CLASS_NAMES, root=tmp_path / "tree" / "videos")
    return path


def test_round_trip(index_path, tmp_path):
    index = VideoIndex.load(index_path)
    assert len(index) == 3
    assert index.class_names == tuple(CLASS_NAMES)
    assert index.paths == ["yoga/-abc.mp4", "b c/_x y.mkv", "unknown.mp4"]
    for array, expected in [
        (index.labels, [2, 0, -1]),
        (index.num_frames, [300, 7, 1]),
        (index.widths, [454, 128, 454]),
        (index.heights, [256, 96, 256]),
    ]:
        assert array.dtype == np.int64
        assert array.tolist() == expected
        assert not array.flags.writeable
    videos = tmp_path / "tree" / "videos"
    assert [index.path_of(i) for i in range(3)] == [
        videos / "yoga/-abc.mp4",
        videos / "b c/_x y.mkv",
        videos / "unknown.mp4",
    ]
    assert index.path_of(np.int64(1)) == videos / "b c/_x y.mkv"


def test_columns_and_metadata(index_path):
    table = pq.read_table(index_path)
    assert table.to_pylist()[1] == {
        "video_id": "_x y",
        "path": "b c/_x y.mkv",
        "label": 0,
        "class_name": "air drumming",
        "num_frames": 7,
        "fps": 29.97,
        "duration_seconds": 10.01,
        "width": 128,
        "height": 96,
        "num_bytes": None,
        "mtime_ns": None,
    }
    assert table["class_name"].to_pylist()[2] is None
    metadata = table.schema.metadata
    assert json.loads(metadata[b"i3d_gn.class_names"]) == CLASS_NAMES
    assert metadata[b"i3d_gn.root"] == b"../videos"


def test_index_and_videos_can_be_moved_together(index_path, tmp_path):
    (tmp_path / "tree").rename(tmp_path / "moved")
    index = VideoIndex.load(tmp_path / "moved" / "lists" / "val.parquet")
    assert index.path_of(0) == tmp_path / "moved" / "videos" / "yoga/-abc.mp4"


def test_root_outside_the_folder_of_the_index(tmp_path):
    """A root with no common parent is recorded as an absolute path."""
    path = tmp_path / "val.parquet"
    write_index(path, records(), class_names=CLASS_NAMES, root="/")
    assert pq.read_schema(path).metadata[b"i3d_gn.root"] == b"/"
    assert str(VideoIndex.load(path).root) == "/"


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.dictionary(pa.int8(), pa.string())], ids=["large", "categorical"]
)
def test_other_string_types(kind, index_path):
    """As written by pandas and polars."""
    table = pq.read_table(index_path)
    number = table.schema.get_field_index("path")
    pq.write_table(table.set_column(number, "path", table["path"].cast(kind)), index_path)
    index = VideoIndex.load(index_path)
    assert index.paths == [record.path for record in records()]
    assert index.path_of(0).name == "-abc.mp4"


def test_root_argument_is_relative_to_the_current_folder(index_path, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert VideoIndex.load(index_path, "elsewhere").root == tmp_path / "elsewhere"


def test_size_and_time_of_files(tmp_path):
    folder = tmp_path / "videos"
    (folder / "yoga").mkdir(parents=True)
    (folder / "yoga" / "-abc.mp4").write_bytes(bytes(1234))
    os.utime(folder / "yoga" / "-abc.mp4", ns=(10**18, 10**18 + 7))
    path = tmp_path / "val.parquet"
    write_index(path, records(), class_names=CLASS_NAMES, root=folder)
    index = VideoIndex.load(path)
    assert index.num_bytes.tolist() == [1234, -1, -1]
    assert index.mtimes_ns.tolist() == [10**18 + 7, -1, -1]
    # Videos of unknown size and missing files are left to the decoder, a touched file is accepted.
    os.utime(folder / "yoga" / "-abc.mp4")
    (folder / "unknown.mp4").write_bytes(b"1")
    for i in range(3):
        with index.file_of(i) as file:
            assert file == index.path_of(i)
    (folder / "yoga" / "-abc.mp4").unlink()
    with index.file_of(0):
        pass

    (folder / "yoga" / "-abc.mp4").write_bytes(bytes(1235))
    message = r"-abc.mp4: the file has 1235 bytes, but had 1234 when it was indexed: was it repl"
    with pytest.raises(VideoDecodeError, match=message), index.file_of(0):
        pass


def test_index_without_size_and_time_of_files(index_path):
    """As written by earlier versions, also without checksums."""
    table = pq.read_table(index_path).drop_columns(["num_bytes", "mtime_ns"])
    metadata = {k: v for k, v in table.schema.metadata.items() if b"crc32" not in k}
    pq.write_table(table.replace_schema_metadata(metadata), index_path)
    index = VideoIndex.load(index_path)
    assert index.num_frames.tolist() == [300, 7, 1]
    assert index.num_bytes.tolist() == index.mtimes_ns.tolist() == [-1, -1, -1]


def contents(index: VideoIndex) -> tuple:
    arrays = [index.labels, index.num_frames, index.heights, index.widths]
    arrays += [index.num_bytes, index.mtimes_ns]
    return (index.paths, index.class_names, index.root, *(array.tolist() for array in arrays))


def test_damaged_index_is_refused_or_read_correctly(index_path):
    """A flipped byte is an error, or lies in a part of the file that is not read."""
    good = index_path.read_bytes()
    expected = contents(VideoIndex.load(index_path))
    messages = []
    for position in range(0, len(good), 3):
        data = bytearray(good)
        data[position] ^= 1 << position % 8
        index_path.write_bytes(data)
        try:
            index = VideoIndex.load(index_path)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert contents(index) == expected, f"byte {position}"
    assert len(messages) > len(good) / 6
    assert all(str(index_path) in message and "\n" not in message for message in messages)
    # Only the class names differ.
    index_path.write_bytes(good)
    table = pq.read_table(index_path)
    names = table.schema.metadata[b"i3d_gn.class_names"].replace(b"yoga", b"yogi")
    metadata = {**table.schema.metadata, b"i3d_gn.class_names": names}
    pq.write_table(table.replace_schema_metadata(metadata), index_path)
    with pytest.raises(ValueError, match=r"is damaged: its metadata do not match their checksum"):
        VideoIndex.load(index_path)


@pytest.mark.parametrize("names", ["{", '{"a": 0}', "[1, 2, 3]"])
def test_class_names_that_are_not_a_list(names, index_path):
    table = pq.read_table(index_path)
    metadata = {**table.schema.metadata, b"i3d_gn.class_names": names.encode()}
    del metadata[b"i3d_gn.crc32"]
    pq.write_table(table.replace_schema_metadata(metadata), index_path)
    with pytest.raises(ValueError, match=r"class names must be a JSON list of strings; create"):
        VideoIndex.load(index_path)


def test_root_argument(index_path, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    assert VideoIndex.load(index_path, tmp_path / "elsewhere").root == tmp_path / "elsewhere"
    with pytest.raises(ValueError, match=r"should be in .*nowhere.* not a folder; move them"):
        VideoIndex.load(index_path, tmp_path / "nowhere")


def test_pickle_holds_only_the_path(index_path, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    index = VideoIndex.load(index_path, tmp_path / "elsewhere")
    pickled = pickle.dumps(index)
    assert len(pickled) < 500 + 2 * len(str(tmp_path))
    copy = pickle.loads(pickled)
    assert copy.root == index.root
    assert copy.paths == index.paths
    assert copy.labels.tolist() == index.labels.tolist()


def test_other_columns_are_ignored(index_path):
    table = pq.read_table(index_path)
    table = table.append_column("key_frames", pa.array([[0, 30], [0], [0]]))
    pq.write_table(table, index_path)
    assert VideoIndex.load(index_path).num_frames.tolist() == [300, 7, 1]


def test_memory_of_a_large_index(tmp_path):
    """240,000 videos, as in Kinetics, are loaded without a Python object per video."""
    many = (
        replace(RECORD, path=f"class {i % 400}/{i:011d}_000010_000020.mp4") for i in range(240_000)
    )
    path = tmp_path / "train.parquet"
    write_index(path, many, class_names=CLASS_NAMES, root=tmp_path)
    before = pa.total_allocated_bytes()
    index = VideoIndex.load(path)
    assert pa.total_allocated_bytes() - before < 64 * 2**20
    assert len(index) == 240_000
    assert index.path_of(239_999).name == "00000239999_000010_000020.mp4"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], r"has no videos; see the report"),
        (
            [replace(RECORD, label=3)],
            r"yoga/-abc.mp4 has label 3, .* number of classes, 3 .*--label-map",
        ),
        ([replace(RECORD, label=-2)], r"has label -2"),
        ([RECORD, replace(RECORD, label=1)], r"path yoga/-abc.mp4 occurs more than once"),
        (
            [replace(RECORD, path="a.mp4"), RECORD, RECORD],
            r"path yoga/-abc.mp4 occurs more than once",
        ),
    ],
)
def test_invalid_rows_are_refused(bad, message, index_path, tmp_path):
    before = index_path.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_index(index_path, bad, class_names=CLASS_NAMES, root=tmp_path)
    assert index_path.read_bytes() == before
    assert list(index_path.parent.iterdir()) == [index_path]

    # The same rows are refused in a file written by another program.
    table = pq.read_table(index_path)
    rows = {name: [getattr(r, name, None) for r in bad] for name in table.schema.names}
    pq.write_table(pa.table(rows, schema=table.schema), index_path)
    with pytest.raises(ValueError, match=message):
        VideoIndex.load(index_path)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("label", pa.array([0, None, 1]), "column label has no value in 1 rows"),
        ("path", pa.array(["a", None, None]), "column path has no value in 2 rows"),
        ("label", pa.array([0.5, 1, 2]), "column label has type double, must be integer"),
        ("num_frames", pa.array([3, 0, 1]), "_x y.mkv has num_frames 0, must be at least 1"),
        ("width", pa.array([3, 4, -1]), "unknown.mp4 has width -1, must be at least 1"),
        ("height", None, "lacks height; create it again"),
        ("path", pa.array([1, 2, 3]), "column path has type int64, must be string"),
        ("path", pa.array([b"a", b"b", b"c"]), "column path has type binary, must be string"),
        ("label", pa.array([0, 1, 2**63], pa.uint64()), "column label: Integer value"),
        ("num_bytes", pa.array(["1", "2", "3"]), "column num_bytes has type string"),
    ],
)
def test_invalid_columns_are_refused(column, values, message, index_path):
    """As written by another program."""
    table = pq.read_table(index_path)
    number = table.schema.get_field_index(column)
    if values is None:
        table = table.remove_column(number)
    else:
        table = table.set_column(number, column, values)
    pq.write_table(table, index_path)
    with pytest.raises(ValueError, match=message) as error:
        VideoIndex.load(index_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["root", "class_names"])
def test_missing_metadata(key, index_path):
    table = pq.read_table(index_path)
    metadata = dict(table.schema.metadata)
    del metadata[f"i3d_gn.{key}".encode()]
    pq.write_table(table.replace_schema_metadata(metadata), index_path)
    with pytest.raises(ValueError, match=rf"lacks i3d_gn\.{key}; create it again"):
        VideoIndex.load(index_path)


def test_missing_file(tmp_path):
    with pytest.raises(
        ValueError, match=r"index not found: .*none.parquet; create it with `i3d-gn index`"
    ):
        VideoIndex.load(tmp_path / "none.parquet")


def test_file_is_not_an_index(tmp_path, index_path):
    text = tmp_path / "list.txt"
    text.write_text("a.mp4 0\n" * 100)
    with pytest.raises(
        ValueError,
        match=r"list.txt is not a video index or damaged \(Parquet magic .*\); create one",
    ) as error:
        VideoIndex.load(text)
    assert "\n" not in str(error.value)

    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"path": ["a"]}), other)
    with pytest.raises(ValueError, match=r"Parquet file but not a video index"):
        VideoIndex.load(other)

    truncated = tmp_path / "truncated.parquet"
    truncated.write_bytes(index_path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"truncated.parquet is not a video index"):
        VideoIndex.load(truncated)


def test_unknown_format_version(index_path):
    table = pq.read_table(index_path)
    metadata = {**table.schema.metadata, b"i3d_gn.format_version": b"3"}
    pq.write_table(table.replace_schema_metadata(metadata), index_path)
    with pytest.raises(
        ValueError, match=r"format version 3, but only versions 1 and 2 are supported; create it"
    ):
        VideoIndex.load(index_path)
