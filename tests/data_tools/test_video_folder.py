"""Listed videos are found in all known layouts of file names and folders."""

import pytest

from data_tools.annotations import ListedVideo
from data_tools.video_folder import find_listed_videos


def listed(video_id, start=10, label="air drumming"):
    name = f"{video_id}_{start:06d}_{start + 10:06d}"
    return ListedVideo(name=name, video_id=video_id, label=label, where="x", is_path=False)


@pytest.fixture
def folder(tmp_path):
    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return make


def paths(videos, folder):
    return [found.path for found in find_listed_videos(videos, folder)]


@pytest.mark.parametrize(
    "file",
    [
        "{id}_000010_000020.mp4",
        "{id}.mp4",
        "air drumming/{id}_000010_000020.mp4",
        "air_drumming/{id}.mp4",
        "val/air_drumming/{id}_000010_000020.mkv",
        "{id}.webm",
        "{id}_000010_000020.MP4",
    ],
)
@pytest.mark.parametrize("video_id", ["0wR5jVB-WPk", "-_abcdefghi", "_-000001_00", "--6bJUbfpnQ"])
def test_supported_file_names(folder, file, video_id):
    root = folder(file.format(id=video_id), "other/aaaaaaaaaaa_000010_000020.mp4")
    assert paths([listed(video_id)], root) == [file.format(id=video_id)]


def test_missing(folder):
    root = folder("0wR5jVB-WPk.txt", "x0wR5jVB-WPk.mp4", ".0wR5jVB-WPk.mp4")
    (root / "0wR5jVB-WPk.mp4").symlink_to("nowhere")
    assert paths([listed("0wR5jVB-WPk")], root) == [None]


def test_names_that_are_not_utf8(folder):
    root = folder("a/\udcff.mp4")
    with pytest.raises(ValueError, match=r"is not UTF-8, rename it: 'a/\\udcff.mp4'"):
        find_listed_videos([listed("a")], root)


def test_segments_of_one_video(folder):
    root = folder("aaa_000010_000020.mp4", "aaa_000030_000040.mp4")
    videos = [listed("aaa", 30), listed("aaa", 10), listed("aaa", 50)]
    assert paths(videos, root) == ["aaa_000030_000040.mp4", "aaa_000010_000020.mp4", None]


def test_replacement_matches_by_id(folder):
    root = folder("replacement/aaa_000011_000021.mp4")
    assert paths([listed("aaa", 10)], root) == ["replacement/aaa_000011_000021.mp4"]


def test_best_of_several_files(folder):
    root = folder(
        "a/aaa_000010_000020.mp4",
        "air_drumming/aaa_000010_000020.mkv",
        "air_drumming/aaa_000010_000020.mp4",
        "aaa.mp4",
    )
    (found,) = find_listed_videos([listed("aaa")], root)
    assert found.path == "air_drumming/aaa_000010_000020.mp4"
    assert found.alternatives == ("air_drumming/aaa_000010_000020.mkv", "a/aaa_000010_000020.mp4")


def test_paths_match_exactly(folder, tmp_path):
    root = folder("videos/a b.mp4", "videos/c.mp4", "elsewhere/d.mp4") / "videos"
    videos = [
        ListedVideo(name=name, label=0, where="x", is_path=True)
        for name in [
            "a b.mp4",
            f"{root}/c.mp4",
            "./../videos/c.mp4",
            f"{tmp_path}/elsewhere/d.mp4",
            "c.mkv",
            ".",
        ]
    ]
    assert paths(videos, root) == [
        "a b.mp4",
        "c.mp4",
        "c.mp4",
        f"{tmp_path}/elsewhere/d.mp4",
        None,
        None,
    ]


def test_linked_folders_are_searched_once(folder, tmp_path):
    root = folder("root/real/bbb.mp4", "store/aaa.mp4") / "root"
    (root / "linked").symlink_to(tmp_path / "store")
    (root / "real" / "loop").symlink_to(root)
    (found,) = find_listed_videos([listed("aaa")], root)
    assert found.path == "linked/aaa.mp4"
    assert find_listed_videos([listed("bbb")], root)[0].alternatives == ()


def test_replacement_precedes_corrupted_video(tmp_path):
    """In the layout of the CVDF's own script, with any times in its name."""
    for name in [
        "train/aaaaaaaaaaa_000010_000020.mp4",
        "train/bbbbbbbbbbb_000010_000020.mp4",
        "replacement/replacement_for_corrupted_k400/aaaaaaaaaaa_000000_000010.mp4",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    listed = [
        ListedVideo(name=f"{i}_000010_000020", video_id=i, label="yoga", where="", is_path=False)
        for i in ("aaaaaaaaaaa", "bbbbbbbbbbb")
    ]
    assert [found.path for found in find_listed_videos(listed, tmp_path)] == [
        "replacement/replacement_for_corrupted_k400/aaaaaaaaaaa_000000_000010.mp4",
        "train/bbbbbbbbbbb_000010_000020.mp4",
    ]
