"""Every defect is classified, and valid videos have none."""

import json
import shutil

import av
import numpy as np
import pytest

from data_tools import verify_videos
from data_tools.step import StepResult
from i3d_gn import cli


def run(*arguments):
    return cli.main(["verify", *map(str, arguments), "--workers", "2"])


def defects_of(report):
    return {entry["path"]: entry["defect"] for entry in json.loads(report.read_text())["defective"]}


@pytest.fixture
def report(tmp_path):
    return tmp_path / "report.json"


def remux_with_times(source, target, times):
    """Copy packets, without B-frames, with other timestamps."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(video=0) if packet.size]
        for packet, time in zip(packets, times, strict=True):
            packet.stream, packet.pts, packet.dts = stream, time, time
            new.mux(packet)


def test_defects(tmp_path, place_clip, encode, images, report, capsys):
    videos = tmp_path / "videos"
    whole = place_clip(videos / "a" / "-whole.mp4")
    shutil.copyfile(whole, videos / "a" / "copy of it.mp4")
    with av.open(str(whole)) as old, av.open(str(videos / "a" / "remuxed.mkv"), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    content = whole.read_bytes()
    (videos / "cut.mp4").write_bytes(content[: len(content) * 9 // 10])
    (videos / "zero.mp4").touch()
    (videos / "text.mp4").write_text("no video " * 100)
    (videos / "link.mp4").symlink_to("nowhere")
    with av.open(str(videos / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        container.mux([*stream.encode(sound), *stream.encode(None)])
    plain = encode(tmp_path / "plain.mkv", images, codec="mpeg4")
    remux_with_times(plain, videos / "twice.mkv", [0, 40, 80, 80, *range(120, 600, 40)])
    encode(videos / "odd.mkv", images[:, :79, :119], codec="mpeg4")

    assert run(videos, report) == 1
    assert defects_of(report) == {
        "link.mp4": "missing",
        "a/copy of it.mp4": "duplicate",
        "a/remuxed.mkv": "duplicate",
        "cut.mp4": "truncated",
        "sound.mp4": "no_video_stream",
        "text.mp4": "unreadable",
        "twice.mkv": "timestamps",
        "zero.mp4": "no_frames",
    }
    content = json.loads(report.read_text())
    assert (content["num_videos"], content["num_defective"]) == (10, 8)
    assert {"path": "a/-whole.mp4", "defect": "", "reason": ""}.items() <= content["valid"][
        0
    ].items()
    assert (content["valid"][0]["num_frames"], content["valid"][0]["fps"]) == (12, 25.0)
    assert (content["valid"][1]["width"], content["valid"][1]["height"]) == (119, 79)
    text = capsys.readouterr()
    assert "10 videos, 8 with defects (80.00%)" in text.out
    assert "--max-defects" in text.err
    assert run(videos, report, "--max-defects", "0.8") == 0


def test_concealed_errors_are_damaged(tmp_path, place_clip, report):
    """The decoder conceals them and reports them only in its log."""
    clip = place_clip(tmp_path / "videos" / "a.mp4")
    content = bytearray(clip.read_bytes())
    with av.open(str(clip)) as container:
        packet = max((p for p in container.demux(video=0) if p.size), key=lambda p: p.size)
        middle = packet.pos + packet.size // 2
    for i in range(middle, middle + 20):
        content[i] ^= 0xFF
    clip.write_bytes(content)
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as messages, av.open(str(clip)) as container:
            assert len(list(container.decode(video=0))) == 12
    finally:
        av.logging.set_level(None)
    assert any("error while decoding" in text for _, _, text in messages)
    assert run(tmp_path / "videos", report, "--max-defects", "1") == 0
    (entry,) = json.loads(report.read_text())["defective"]
    assert entry["defect"] == "damaged"
    assert entry["reason"].startswith("1 of 12 frames are damaged, the first is frame ")
    assert entry["num_frames"] == 12


def test_b_frames_in_avi_are_valid(tmp_path, encode, images, report):
    """AVI has no presentation times: they follow from the order of the frames."""
    source = encode(tmp_path / "videos" / "a.avi", images, bframes=3)
    with av.open(str(source)) as container:
        assert {int(frame.pict_type) for frame in container.decode(video=0)} == {1, 2, 3}
    assert run(tmp_path / "videos", report) == 0
    (entry,) = json.loads(report.read_text())["valid"]
    assert (entry["num_frames"], entry["fps"]) == (16, 25.0)
    assert entry["duration_seconds"] == pytest.approx(16 / 25)


def test_header_without_frames_is_truncated(tmp_path, place_clip, report):
    clip = place_clip(tmp_path / "videos" / "a.mp4")
    content = clip.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    clip.write_bytes(content[: content.index(b"mdat") + 4])
    assert run(tmp_path / "videos", report) == 1
    (entry,) = json.loads(report.read_text())["defective"]
    assert (entry["defect"], entry["reason"]) == ("truncated", "none of 12 frames can be decoded")


def test_frames_of_another_shape_are_not_duplicates(tmp_path, encode, report):
    """Even if their bytes are equal."""
    (tmp_path / "videos").mkdir()
    for name, height, width in [("a", 32, 64), ("b", 64, 32)]:
        encode(tmp_path / "videos" / f"{name}.mp4", np.zeros((3, height, width, 3), np.uint8))
    assert run(tmp_path / "videos", report) == 0
    assert defects_of(report) == {}


def test_missing_videos_of_a_list(tmp_path, place_clip, report):
    place_clip(tmp_path / "videos" / "aaaaaaaaaaa_000001_000011.mp4")
    place_clip(tmp_path / "videos" / "not listed.mp4")
    source = tmp_path / "val.csv"
    rows = ["yoga,aaaaaaaaaaa,1,11,val", "yoga,bbbbbbbbbbb,2,12,val"]
    source.write_text("\n".join(["label,youtube_id,time_start,time_end,split", *rows]) + "\n")
    assert run(source, report, "--videos", tmp_path / "videos", "--max-defects", "0.5") == 0
    assert defects_of(report) == {"bbbbbbbbbbb_000002_000012": "missing"}
    (entry,) = json.loads(report.read_text())["defective"]
    assert entry["reason"] == "no such file (val.csv:3)"


def test_only_changed_files_are_decoded_again(tmp_path, place_clip, report, capsys):
    for name in "ab":
        place_clip(tmp_path / "videos" / f"{name}.mp4")
    assert run(tmp_path / "videos", report, "--dry-run") == 0
    assert "dry run: 2 to do, 0 already done" in capsys.readouterr().out
    assert not report.exists()
    assert run(tmp_path / "videos", report, "--max-defects", "1") == 0
    before = report.read_bytes()
    (tmp_path / "videos" / "b.mp4").write_text("no longer a video")
    assert run(tmp_path / "videos", report, "--dry-run") == 0
    assert "dry run: 1 to do, 1 already done" in capsys.readouterr().out
    assert run(tmp_path / "videos", report, "--max-defects", "1") == 0
    assert report.read_bytes() != before
    assert defects_of(report) == {"b.mp4": "unreadable"}


def test_defects_of_failed_processes():
    kinds = {"a": "crash", "b": "timeout", "c": "memory", "d": "error", "e": "lost"}
    step = StepResult(failures=dict.fromkeys(kinds, "why"), kinds=kinds)
    defects = {e["path"]: e["defect"] for e in verify_videos._verdicts(list(kinds), step)}
    assert defects == {
        "a": "crashed",
        "b": "hung",
        "c": "memory",
        "d": "unreadable",
        "e": "crashed",
    }


def test_memory_limit(tmp_path, place_clip, encode, report):
    place_clip(tmp_path / "videos" / "small.mp4")
    image = np.zeros((1, 8000, 8000, 3), np.uint8)
    encode(tmp_path / "videos" / "large.mp4", image, codec="mpeg4")
    limits = ["--memory-gib", "0.3", "--max-defects", "0.5"]
    assert run(tmp_path / "videos", report, *limits) == 0
    assert defects_of(report) == {"large.mp4": "memory"}
    assert run(tmp_path / "videos", report) == 0
    assert defects_of(report) == {}


def test_no_videos(tmp_path, report, capsys):
    assert run(tmp_path, report) == 2
    assert "no videos found" in capsys.readouterr().err


ODD = {
    "audio_only.mp4": "no_video_stream",
    "chunk_out_of_range.mp4": "unreadable",
    "cut_30k_av1.mp4": "unreadable",
    "header_only_no_frames.mp4": "no_frames",
    "invalid_nalu.mp4": "truncated",
    "invalid_vp9.webm": "unreadable",
    "malformed_box.mp4": "unreadable",
    "moov_only_5544_claimed.mp4": "truncated",
    "no_timescale.mp4": "truncated",
    "tiny_zero_frames.avi": "no_frames",
    "truncated_mid_stream.mp4": "truncated",
    "zero_bytes.mp4": "no_frames",
    "zero_stsc.mp4": "unreadable",
}


@pytest.mark.real_data
def test_odd_videos(shared_data, report):
    """Odd videos (rotated, variable frame rate, one pixel, wrong headers) are valid."""
    assert run(shared_data / "odd", report) == 1
    assert defects_of(report) == ODD
    assert json.loads(report.read_text())["num_videos"] == 30
