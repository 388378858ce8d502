"""Videos of two indexes that are the same file, id or content."""

import os

import pytest

from i3d_gn.video_io.index import VideoIndex, VideoRecord, write_index
from i3d_gn.video_io.shared_videos import shared_videos


@pytest.fixture
def index(tmp_path):
    """Write an index of files with the given bytes, or (bytes, number of frames)."""

    def make(name, **contents):
        folder = tmp_path / name
        folder.mkdir()
        records = []
        for stem, content in contents.items():
            data, num_frames = content if isinstance(content, tuple) else (content, 10)
            (folder / f"{stem}.mp4").write_bytes(data)
            records.append(
                VideoRecord(
                    path=f"{stem}.mp4",
                    label=0,
                    num_frames=num_frames,
                    fps=25,
                    duration_seconds=num_frames / 25,
                    width=8,
                    height=8,
                )
            )
        path = tmp_path / f"{name}.parquet"
        write_index(path, records, class_names=["a"], root=folder)
        return VideoIndex.load(path)

    return make


def test_equal_content(index):
    train = index("train", a=b"1234", b=b"5678", c=(b"same", 7))
    val = index("val", x=b"5678", y=b"9999", a=b"abcd", c=(b"same", 8))
    assert shared_videos(val, train) == [("x.mp4", "b.mp4", "content")]
    assert shared_videos(train, val) == [("b.mp4", "x.mp4", "content")]


def test_same_file_by_another_name(index, tmp_path):
    train = index("train", a=b"1234", b=b"5678")
    val = index("val", x=b"", y=b"")
    for name, target in (("x", "a"), ("y", "b")):
        (tmp_path / "val" / f"{name}.mp4").unlink()
        link = os.link if name == "x" else os.symlink
        link(tmp_path / "train" / f"{target}.mp4", tmp_path / "val" / f"{name}.mp4")
    assert shared_videos(val, train) == [("x.mp4", "a.mp4", "file"), ("y.mp4", "b.mp4", "file")]


def test_segments_of_one_youtube_video(index):
    """The id is what precedes the times, which other names do not have."""
    train = index("train", _b_c_000001_000011=b"1", roll_000=b"2", d_000001_000011=b"3")
    val = index("val", _b_c_000100_000110=b"44", roll_000=b"55", _000001_000011=b"66")
    assert shared_videos(val, train) == [
        ("_b_c_000100_000110.mp4", "_b_c_000001_000011.mp4", "YouTube id")
    ]


def test_missing_files_are_not_shared(index, tmp_path):
    train, val = index("train", a=b"1234"), index("val", x=b"1234", y=b"1234")
    (tmp_path / "val" / "x.mp4").unlink()
    assert shared_videos(val, train) == [("y.mp4", "a.mp4", "content")]
    (tmp_path / "train" / "a.mp4").unlink()
    assert shared_videos(val, train) == []
