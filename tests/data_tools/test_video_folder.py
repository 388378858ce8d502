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
    root = folder("replacement/aaa_000011_000021.mp4", "train/aaa_000010_000020.mp4")
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


def listed_path(name, label=None):
    return ListedVideo(name=name, label=label, where="x", is_path=True)


def test_paths_without_extension(folder):
    root = folder("a/x.mp4", "a/y.webm", "b/x.mp4", "b/only.avi", "z.v1.mkv", "odd.rm")
    names = ["a/x", "a/y", "b/x", "only", "z.v1", "a/only", "odd.rm", "x"]
    assert paths([listed_path(name) for name in names], root) == [
        "a/x.mp4",
        "a/y.webm",
        "b/x.mp4",
        "b/only.avi",
        "z.v1.mkv",
        None,  # Only a name without folder is searched in all folders.
        "odd.rm",
        "a/x.mp4",
    ]
    (found,) = find_listed_videos([listed_path("x", label="b")], root)
    assert (found.path, found.alternatives) == ("b/x.mp4", ("a/x.mp4",))


def test_path_with_extension_is_not_searched(folder):
    root = folder("a/x.mp4", "y.mkv")
    assert paths([listed_path("x.mp4"), listed_path("y.mp4")], root) == [None, None]


def test_normal_forms_of_unicode_are_equal(folder):
    """macOS decomposes accented letters of file names, lists rarely do."""
    composed, decomposed = "Caf\u00e9", "Cafe\u0301"
    root = folder(f"{decomposed}/1 {decomposed}.mp4", f"b/{composed}_000010_000020.mp4")
    videos = [
        listed_path(f"{composed}/1 {composed}.mp4"),
        listed_path(f"{composed}/1 {composed}"),
        listed(decomposed),
        listed(decomposed, start=30),
    ]
    assert paths(videos, root) == [
        f"{decomposed}/1 {decomposed}.mp4",
        f"{decomposed}/1 {decomposed}.mp4",
        f"b/{composed}_000010_000020.mp4",
        None,
    ]


def test_folders_of_frames_are_named(folder):
    root = folder("videos/7/00001.jpg", "videos/8/00001.jpg")
    seven = ListedVideo(name="7", label="x", where="x", is_path=False)
    videos = [seven, listed_path("8 120"), listed_path("9 120"), listed_path("9")]
    reasons = [found.reason for found in find_listed_videos(videos, root / "videos")]
    assert [reason.startswith("a folder, not a file") for reason in reasons] == [1, 1, 0, 0]
    assert reasons[2:] == ["no such file"] * 2


def test_name_too_long_for_any_file_system(folder):
    root = folder("a.mp4")
    long = "x" * 300
    assert paths([listed_path(f"{long}.mp4"), listed_path(long), listed_path("a.mp4")], root) == [
        None,
        None,
        "a.mp4",
    ]
