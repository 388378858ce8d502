"""Pipes and devices in place of videos are refused before they are opened, by every command."""

import os

import pytest

from data_tools.full_decode_check import check_video
from data_tools.probing import probe
from data_tools.transcode import transcode
from i3d_gn import cli
from i3d_gn.video_io.errors import VideoDecodeError

pytestmark = pytest.mark.timeout(20)
KIND = "a pipe, socket or device, not a regular file"


@pytest.fixture(params=["pipe", "device"])
def special(request, tmp_path):
    """A file that blocks when opened, or has no end."""
    path = tmp_path / "videos" / "class" / "special.mp4"
    path.parent.mkdir(parents=True)
    if request.param == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/urandom")
    return path


def test_functions_refuse(special):
    with pytest.raises(OSError, match=KIND):
        probe(special.parent, special.name, decode=False)
    with pytest.raises(OSError, match=KIND):
        check_video(special)
    output = special.parent / "copy.mp4"
    with pytest.raises(VideoDecodeError, match=KIND):
        transcode(special, output, short_side=32, fps=None, options=None)  # type: ignore[arg-type]
    assert not output.exists()


def test_commands_name_the_file(special, place_clip, tmp_path, capsys):
    videos = special.parents[1]
    place_clip(videos / "class" / "good.mp4")
    runs = [
        ["index", videos, tmp_path / "index.parquet"],
        ["verify", videos, tmp_path / "verify.json", "--max-defects", "1"],
        ["resize", videos, tmp_path / "small"],
    ]
    for command in runs:
        assert cli.main([*map(str, command), "--workers", "1"]) == 0
        assert "special.mp4" in capsys.readouterr().out, command


def test_pack_refuses_a_file_that_became_special(place_clip, tmp_path, capsys):
    pytest.importorskip("webdataset", reason="packing needs webdataset")
    video = place_clip(tmp_path / "videos" / "class" / "a.mp4")
    index = str(tmp_path / "index.parquet")
    assert cli.main(["index", str(tmp_path / "videos"), index, "--workers", "1"]) == 0
    video.unlink()
    os.mkfifo(video)
    assert cli.main(["pack", index, str(tmp_path / "shards"), "--workers", "1"]) == 1
    assert KIND in capsys.readouterr().out
