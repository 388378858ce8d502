"""Indexes of videos that are packed in shards."""

import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest

from i3d_gn.video_io.decode import VideoDecodeError, decode_frames
from i3d_gn.video_io.index import VideoIndex, VideoRecord, write_index, write_packed_index
from i3d_gn.video_io.packed import host_of

OFFSETS = (5, 40)


@pytest.fixture
def packed(tmp_path, plain_video):
    """Two videos in two shards, the second one is not a video."""
    records = [
        VideoRecord(
            path=f"class/{name}.mp4",
            label=label,
            num_frames=60,
            fps=25.0,
            duration_seconds=2.4,
            width=96,
            height=64,
        )
        for label, name in enumerate(["first", "second"])
    ]
    (tmp_path / "videos" / "class").mkdir(parents=True)
    contents = [plain_video.read_bytes(), b"not a video" * 9]
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, (record, content) in enumerate(zip(records, contents, strict=True)):
        (tmp_path / "videos" / record.path).write_bytes(content)
        before = bytes(OFFSETS[number])
        (shards / f"{number}.tar").write_bytes(before + content + b"more")
    loose = tmp_path / "loose.parquet"
    write_index(loose, records, class_names=["a", "b"], root=tmp_path / "videos")
    path = shards / "index.parquet"
    write_packed_index(
        path,
        loose,
        shards=["0.tar", "1.tar"],
        offsets=OFFSETS,
        sizes=[len(content) for content in contents],
        root=str(shards),
    )
    return path


def test_videos_are_read_from_shards(packed, plain_video):
    index = VideoIndex.load(packed)
    assert index.is_packed
    assert index.root == packed.parent
    assert index.paths == ["class/first.mp4", "class/second.mp4"]
    assert index.num_bytes.tolist() == [plain_video.stat().st_size, 99]
    assert index.mtimes_ns.tolist() == [-1, -1]
    with index.file_of(0) as file:
        assert file.read_bytes() == plain_video.read_bytes()
        assert np.array_equal(decode_frames(file, [7]), decode_frames(plain_video, [7]))
    assert not file.exists()
    copy = pickle.loads(pickle.dumps(index))
    with copy.file_of(0) as file:
        assert file.read_bytes() == plain_video.read_bytes()


def test_loose_index_is_not_packed(packed):
    index = VideoIndex.load(packed.parent.parent / "loose.parquet")
    assert not index.is_packed
    assert index.path_of(0) == packed.parent.parent / "videos/class/first.mp4"


def test_errors_name_the_video(packed):
    index = VideoIndex.load(packed)
    message = r"^1.tar: class/second.mp4: Invalid data"
    with pytest.raises(VideoDecodeError, match=message) as error, index.file_of(1) as file:
        decode_frames(file, [0])
    assert error.value.frame is None
    message = "has only 60 frames"
    with pytest.raises(VideoDecodeError, match=message) as error, index.file_of(0) as file:
        decode_frames(file, [61])
    assert error.value.frame == 61
    assert error.value.path == "0.tar: class/first.mp4"


def test_missing_or_short_shards(packed):
    index = VideoIndex.load(packed)
    shard = packed.parent / "0.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-4])
    VideoIndex.load(packed)
    shard.write_bytes(content[:-5])
    needed = len(content) - 4
    with pytest.raises(ValueError, match=f"0.tar has {needed - 1} bytes, but .* least {needed}"):
        VideoIndex.load(packed)
    # A shard that becomes unreadable later is an error of its videos.
    message = r"^0.tar: class/first.mp4: .*0.tar: got \d+ bytes, expected"
    with pytest.raises(VideoDecodeError, match=message), index.file_of(0):
        pass
    shard.unlink()
    with pytest.raises(ValueError, match="0.tar has 0 bytes"):
        VideoIndex.load(packed)
    message = r"^0.tar: class/first.mp4: .*No such file"
    with pytest.raises(VideoDecodeError, match=message), index.file_of(0):
        pass


def test_root_is_recorded(packed, tmp_path):
    assert pq.read_schema(packed).metadata[b"i3d_gn.root"] == b"."
    loose = packed.parent.parent / "loose.parquet"
    path = tmp_path / "remote.parquet"
    places = {"shards": ["0.tar"] * 2, "offsets": [0, 1], "sizes": [1, 1]}
    write_packed_index(path, loose, root="memory://bucket/shards", **places)
    index = VideoIndex.load(path)
    assert index.root == "memory://bucket/shards"
    assert VideoIndex.load(path, packed.parent).root == packed.parent


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("offset", [-1, 0], r"class/first.mp4 has offset -1, must be at least 0"),
        ("num_bytes", [1, 0], r"class/second.mp4 has num_bytes 0, must be at least 1"),
        ("num_bytes", [1, None], r"column num_bytes has no value in 1 rows"),
        ("shard", [1, 2], r"column shard has type int64, must be string"),
        ("shard", ["0.tar", None], r"column shard has no value in 1 rows"),
        ("offset", None, r"lacks offset; create it again"),
        ("shard", ["0.tar", "1.tar::http://127.0.0.1/1.tar"], r"a shard has :: in its name"),
    ],
)
def test_invalid_columns_are_refused(column, values, message, packed):
    table = pq.read_table(packed)
    number = table.schema.get_field_index(column)
    if values is None:
        table = table.remove_column(number)
    else:
        table = table.set_column(number, column, [values])
    pq.write_table(table, packed)
    with pytest.raises(ValueError, match=message):
        VideoIndex.load(packed)


@pytest.mark.parametrize(
    ("root", "host"),
    [
        ("https://data.example.org/k400", "data.example.org"),
        ("https://data.example.org:8080", "data.example.org"),
        ("http://DATA.example.org/a b".replace(" ", "%20"), "data.example.org"),
        ("s3://bucket-1/k400/train", "bucket-1"),
        ("http://[::1]:80/x", None),
        ("http://data.example.org@evil.example/x", None),
        ("http://evil.example\\\\@data.example.org/x", None),
        ("http://data.example.org /x", None),
        ("zip://data.example.org::http://evil.example/x", None),
        ("http://data.example.org/x::http://evil.example/y", None),
        ("data.example.org/x", None),
    ],
)
def test_host_of_a_url(root, host):
    assert host_of(root) == host
