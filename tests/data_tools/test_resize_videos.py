"""Copies have the frames of their source, smaller and upright; failures are reported."""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from data_tools import resize_videos
from data_tools.transcode import output_size
from i3d_gn import cli
from i3d_gn.video_io.decode import count_decodable_frames, probe_video


def run(*arguments, workers=1):
    return cli.main(["resize", *map(str, arguments), "--workers", str(workers)])


def report_of(output):
    return json.loads((output / "resize.report.json").read_text())


def stored_frames(path):
    """RGB as stored and timestamps in seconds, by sequential decoding."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), times_of(frames)


def times_of(frames):
    return np.array([float(frame.pts * frame.time_base) for frame in frames])


def psnr(a, b):
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b.astype(float)).mean())


def resized(images, height, width):
    """The images resized by torchvision."""
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    mode = transforms.InterpolationMode.BICUBIC
    batch = transforms.resize(batch, [height, width], interpolation=mode, antialias=True)
    return batch.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((1280, 720), 256, (456, 256)),
        ((720, 1280), 256, (256, 456)),
        ((454, 256), 256, (454, 256)),
        ((340, 256), 320, (340, 256)),  # never enlarged
        ((161, 121), 256, (160, 120)),  # even
        ((1, 1), 256, (2, 2)),
        ((1000, 2), 256, (1000, 2)),
    ],
)
def test_output_size(size, short_side, expected):
    assert output_size(*size, short_side=short_side) == expected


def test_frames_and_timestamps_are_kept(tmp_path, encode, images):
    encode(tmp_path / "in" / "b c" / "-x.mkv", images)
    assert run(tmp_path / "in", tmp_path / "out", "--short-side", 40, "--crf", 5) == 0
    copy = tmp_path / "out" / "b c" / "-x.mp4"
    got, times = stored_frames(copy)
    assert got.shape == (16, 40, 60, 3)
    np.testing.assert_allclose(times, np.arange(16) / 25, atol=1e-9)
    expected = resized(images, 40, 60)
    pillow = np.stack(
        [np.asarray(Image.fromarray(p).resize((60, 40), Image.Resampling.BICUBIC)) for p in images]
    )
    for t in range(16):
        assert psnr(got[t], expected[t]) > 36
        assert psnr(got[t], pillow[t]) > 36
        # Other frames are less similar, so order and number are right.
        assert psnr(got[t], expected[(t + 1) % 16]) < 30
    assert probe_video(copy).codec == "h264"


def test_encoder_options(tmp_path, encode, images):
    source = encode(tmp_path / "in" / "x.mp4", np.concatenate([images] * 5))
    with av.open(str(source)) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0)) < 5
    assert run(tmp_path / "in", tmp_path / "out", "--gop", 16) == 0
    with av.open(str(tmp_path / "out" / "x.mp4")) as container:
        assert not container.streams.audio
        keyframes = [p.is_keyframe for p in container.demux(video=0) if p.size]
    gaps = np.diff(np.flatnonzero([*keyframes, True]))
    assert gaps.max() <= 16
    content = (tmp_path / "out" / "x.mp4").read_bytes()
    # x264 writes its settings to the stream: fastdecode means no deblocking and no CABAC.
    assert b"cabac=0" in content
    assert b"deblock=0" in content
    assert b"keyint=16" in content
    assert run(tmp_path / "in", tmp_path / "plain", "--tune", "none") == 0
    assert b"cabac=1" in (tmp_path / "plain" / "x.mp4").read_bytes()


def test_output_is_deterministic(tmp_path, encode, images):
    """With the defaults of x264 it is not, on some processors with widths not divisible by 128."""
    for i in range(12):
        encode(tmp_path / "in" / f"{i}.mp4", images)
    assert run(tmp_path / "in", tmp_path / "out", "--short-side", 64, workers=2) == 0
    copies = list(tmp_path.glob("out/*.mp4"))
    assert len(copies) == 12
    assert len({copy.read_bytes() for copy in copies}) == 1


def test_variable_frame_rate_is_kept(tmp_path, encode, images):
    pts = [100, 133, 140, 200, 203, 290, 291, 350, 400, 401, 402, 500, 533, 566, 600, 1000]
    source = tmp_path / "in" / "x.mp4"
    encode(source, images, pts=pts, time_base=Fraction(1, 1000))
    assert run(tmp_path / "in", tmp_path / "out") == 0
    _, times = stored_frames(tmp_path / "out" / "x.mp4")
    np.testing.assert_allclose(times, (np.array(pts) - 100) / 1000, atol=1e-9)


@pytest.mark.parametrize("options", [[], ["--fps", "25"]])
def test_b_frames_in_avi_keep_their_times(tmp_path, encode, images, options):
    encode(tmp_path / "in" / "x.avi", images, bframes=3)
    assert run(tmp_path / "in", tmp_path / "out", "--crf", 5, *options) == 0
    copy = tmp_path / "out" / "x.mp4"
    got, times = stored_frames(copy)
    np.testing.assert_allclose(times, np.arange(16) / 25, atol=1e-9)
    assert probe_video(copy).duration_seconds == pytest.approx(16 / 25)
    assert psnr(got, images) > 34


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied(tmp_path, encode, images, rotation):
    source = encode(tmp_path / "in" / "x.mp4", images, rotation=rotation)
    with av.open(str(source)) as container:
        turn = next(container.decode(video=0)).rotation  # counter-clockwise, in degrees
    assert turn % 180 == rotation % 180
    assert run(tmp_path / "in", tmp_path / "out", "--crf", 5) == 0
    copy = tmp_path / "out" / "x.mp4"
    with av.open(str(copy)) as container:
        assert next(container.decode(video=0)).rotation == 0
    got, _ = stored_frames(copy)
    upright = np.rot90(images, k=turn // 90, axes=(1, 2))
    assert psnr(got, upright) > 36


@pytest.mark.parametrize(
    "options",
    [
        {"full_range": True},
        {"pixel_format": "yuv444p"},
        {"codec": "libx265", "pixel_format": "yuv420p10le"},
        {"codec": "mpeg4"},
    ],
)
def test_colors_are_kept(tmp_path, encode, images, options):
    encode(tmp_path / "in" / "x.mkv", images, **options)
    assert run(tmp_path / "in", tmp_path / "out", "--crf", 5) == 0
    source, _ = stored_frames(tmp_path / "in" / "x.mkv")
    got, _ = stored_frames(tmp_path / "out" / "x.mp4")
    assert psnr(source, images) > 30  # the source itself is right
    assert psnr(got, source) > 34
    assert np.abs(got.mean((0, 1, 2)) - source.mean((0, 1, 2))).max() < 2


def test_odd_sizes_become_even(tmp_path, encode, images):
    encode(tmp_path / "in" / "x.mkv", images[:, :79, :119], pixel_format="yuv444p")
    assert run(tmp_path / "in", tmp_path / "out", "--crf", 5) == 0
    got, _ = stored_frames(tmp_path / "out" / "x.mp4")
    assert got.shape == (16, 78, 118, 3)
    assert psnr(got, resized(images[:, :79, :119], 78, 118)) > 33


def test_failures_do_not_stop_the_others(tmp_path, place_clip, capsys):
    place_clip(tmp_path / "in" / "a" / "good.mp4")
    place_clip(tmp_path / "in" / "a" / "same.mkv")
    place_clip(tmp_path / "in" / "a" / "same.mp4")
    (tmp_path / "in" / "b").mkdir()
    (tmp_path / "in" / "b" / "text.mp4").write_text("no video " * 100)
    (tmp_path / "in" / "b" / "zero.mp4").touch()
    (tmp_path / "in" / "b" / "link.mp4").symlink_to("nowhere")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    report = report_of(tmp_path / "out")
    assert (report["num_written"], report["num_kept"], report["num_failed"]) == (2, 0, 4)
    assert [entry["path"] for entry in report["failed"]] == [
        "a/same.mp4",
        "b/link.mp4",
        "b/text.mp4",
        "b/zero.mp4",
    ]
    assert "the copy of a/same.mkv" in report["failed"][0]["reason"]
    assert report["failed"][1]["reason"] == "a broken link, or not a regular file"
    assert "Invalid data" in report["failed"][2]["reason"]
    files = {p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.glob("out/*/*")}
    assert files == {"a/good.mp4", "a/same.mp4"}
    assert "2 videos written, 0 already there, 4 failed" in capsys.readouterr().out


def test_no_video_written(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.mp4").write_text("no video")
    assert run(tmp_path / "in", tmp_path / "out") == 1


def test_invalid_folders(tmp_path, place_clip, capsys):
    place_clip(tmp_path / "in" / "x.mp4")
    (tmp_path / "empty").mkdir()
    for source, output, message in [
        (tmp_path / "none", tmp_path / "out", "folder not found"),
        (tmp_path / "empty", tmp_path / "out", "no videos found"),
        (tmp_path / "in", tmp_path / "in", "may be inside the other"),
        (tmp_path / "in", tmp_path / "in" / "small", "may be inside the other"),
        (tmp_path / "in", tmp_path, "may be inside the other"),
    ]:
        assert run(source, output) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert run(tmp_path / "in", tmp_path / "out", "--short-side", 121) == 2
    assert "the short side must be even" in capsys.readouterr().err


def test_only_changed_videos_are_encoded_again(tmp_path, place_clip, encode, images):
    output = tmp_path / "out"
    for name in ["1", "2", "3"]:
        place_clip(tmp_path / "in" / f"{name}.mp4")

    def again(*options):
        before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.mp4")}
        assert run(tmp_path / "in", output, *options) == 0
        after = {path.name: path.stat().st_mtime_ns for path in output.glob("*.mp4")}
        return {name for name in after if after[name] != before.get(name)}

    assert again() == {"1.mp4", "2.mp4", "3.mp4"}
    assert again() == set()
    assert report_of(output)["num_kept"] == 3
    encode(tmp_path / "in" / "2.mp4", images)
    assert again() == {"2.mp4"}
    (output / "3.mp4").unlink()
    (output / "1.mp4").write_text("another file")
    assert again() == {"1.mp4", "3.mp4"}
    assert again("--crf", "30", "--overwrite") == {"1.mp4", "2.mp4", "3.mp4"}


def test_other_options_need_overwrite(tmp_path, place_clip, capsys):
    """An accidental `resize IN OUT` must not touch copies that were made with options."""
    for name in ("1", "2"):
        place_clip(tmp_path / "in" / f"{name}.mp4")
    source, output = tmp_path / "in", tmp_path / "out"
    assert run(source, output, "--short-side", 32, "--fps", 5) == 0
    copies = {path: path.read_bytes() for path in output.glob("*.mp4")}
    capsys.readouterr()
    for options in ((), ("--dry-run",), ("--shard", "0/2")):
        assert run(source, output, *options) == 2
        error = capsys.readouterr().err
        assert f"{output} has 2 copies made with other options" in error
        assert "(short_side 32, now 256; fps 5.0, now None), for instance 1.mp4" in error
        assert "pass --overwrite" in error
    assert {path: path.read_bytes() for path in output.glob("*.mp4")} == copies
    # New videos with the old options, and a deleted copy, need nothing.
    place_clip(source / "3.mp4")
    assert run(source, output, "--short-side", 32, "--fps", 5) == 0
    for path in output.glob("*.mp4"):
        path.unlink()
    assert run(source, output) == 0
    assert report_of(output)["num_written"] == 3


def test_copies_without_record_need_overwrite(tmp_path, place_clip, capsys):
    """Such as someone's own videos, or copies whose ledger was deleted."""
    place_clip(tmp_path / "in" / "1.mp4")
    copy = tmp_path / "out" / "1.mp4"
    copy.parent.mkdir()
    copy.write_text("another file")
    assert run(tmp_path / "in", tmp_path / "out") == 2
    assert "(of which there is no record), for instance 1.mp4" in capsys.readouterr().err
    assert copy.read_text() == "another file"
    assert run(tmp_path / "in", tmp_path / "out", "--overwrite") == 0
    assert count_decodable_frames(copy) == 12
    # A kill between writing a copy and recording it leaves one of these: nothing to ask about.
    (tmp_path / "out" / ".resize.ledger.jsonl").write_text("")
    assert run(tmp_path / "in", tmp_path / "out") == 0


def test_overwriting_replaces_only_by_complete_copies(tmp_path, place_clip, kill_midway):
    for i in range(4):
        place_clip(tmp_path / "in" / f"{i}.mp4")
    source, output = tmp_path / "in", tmp_path / "out"
    assert run(source, output, "--crf", 30) == 0
    before = {path.name: path.read_bytes() for path in output.glob("*.mp4")}
    ledger = output / ".resize.ledger.jsonl"
    arguments = [source, output, "--overwrite", "--workers", "1"]
    kill_midway(
        "resize_videos",
        "transcode",
        calls=2,
        arguments=arguments,
        is_midway=lambda: ledger.read_bytes().count(b"\n") == 6,
    )
    after = {path.name: path.read_bytes() for path in output.glob("[0-9].mp4")}
    assert sorted(name for name in before if before[name] != after[name]) == ["0.mp4", "1.mp4"]
    assert run(*arguments[:3]) == 0
    assert report_of(output)["num_kept"] == 2


def test_failure_keeps_the_copy_of_an_unchanged_source(tmp_path, place_clip):
    """Here it takes too long."""
    place_clip(tmp_path / "in" / "1.mp4")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    copy = tmp_path / "out" / "1.mp4"
    written = copy.read_bytes()
    options = ["--crf", "30", "--timeout-seconds", "0.001", "--overwrite"]
    assert run(tmp_path / "in", tmp_path / "out", *options) == 1
    (failed,) = report_of(tmp_path / "out")["failed"]
    assert failed["reason"].endswith("(its earlier copy is kept)")
    assert copy.read_bytes() == written


def test_skipped_files_are_named(tmp_path, place_clip, capsys):
    place_clip(tmp_path / "in" / "a" / "1.MTS")
    (tmp_path / "in" / "a" / "2.rmvb").touch()
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert (tmp_path / "out" / "a" / "1.mp4").is_file()
    assert report_of(tmp_path / "out")["skipped"] == ["a/2.rmvb"]
    assert "skipped files (not videos): 1\n    a/2.rmvb\n" in capsys.readouterr().out


def test_copy_whose_source_is_gone_is_kept_and_named(tmp_path, place_clip, capsys):
    for name in ("in/a/1.mp4", "in/a/2.mp4"):
        place_clip(tmp_path / name)
    output = tmp_path / "out"
    assert run(tmp_path / "in", output, "--short-side", 32) == 0
    assert report_of(output)["without_source"] == []
    assert "sources are gone" not in capsys.readouterr().out
    (tmp_path / "in/a/1.mp4").unlink()
    # A copy of another file with the name is not of the one that is gone.
    (tmp_path / "in/a/2.mp4").rename(tmp_path / "in/a/2.avi")
    assert run(tmp_path / "in", output, "--short-side", 32) == 0
    assert report_of(output)["without_source"] == ["a/1.mp4"]
    assert "sources are gone: 1; delete them if" in capsys.readouterr().out
    assert (output / "a/1.mp4").is_file()


def test_broken_source_keeps_no_earlier_copy(tmp_path, place_clip):
    for name in "ab":
        place_clip(tmp_path / "in" / f"{name}.mp4")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    (tmp_path / "in" / "a.mp4").write_text("no longer a video")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out").glob("*.mp4")] == ["b.mp4"]


def test_two_concurrent_runs_encode_nothing_twice(tmp_path, place_clip):
    """The later run waits, and finds the results of the first."""
    for i in range(12):
        place_clip(tmp_path / "in" / f"{i}.mp4")
    arguments = [tmp_path / "in", tmp_path / "out", "--preset", "veryslow", "--workers", "1"]
    processes = [
        subprocess.Popen(
            [sys.executable, resize_videos.__file__, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    texts = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    counts = sorted(out.partition(": ")[2].partition(";")[0] for out, _ in texts)
    assert counts == [
        "0 videos written, 12 already there, 0 failed",
        "12 videos written, 0 already there, 0 failed",
    ]
    assert "waiting for another run" in "".join(err for _, err in texts)
    assert len((tmp_path / "out" / ".resize.ledger.jsonl").read_text().splitlines()) == 12


@pytest.mark.parametrize("option", ["--timeout-seconds", "--memory-gib", "--crf", "--fps"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e-09", "1e+300"])
def test_invalid_numbers(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, tmp_path / "out", f"{option}={value}")
    assert f"argument {option}: {value} is not between" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--short-side", "--gop", "--workers"])
@pytest.mark.parametrize("value", ["0", "-1", "2147483648"])
def test_invalid_integers(tmp_path, capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, tmp_path / "out", f"{option}={value}")
    assert f"argument {option}: {value} is not between 1 and" in capsys.readouterr().err


@pytest.mark.parametrize("rate", ["0.01", "1000"])
def test_extreme_frame_rates(tmp_path, place_clip, rate):
    """At one frame per 100 s one frame is left, at 1000 per second each is repeated 40 times."""
    source = place_clip(tmp_path / "in" / "x.mp4")
    assert run(tmp_path / "in", tmp_path / "out", "--fps", rate) == 0
    before, after = probe_video(source), probe_video(tmp_path / "out" / "x.mp4")
    assert after.num_frames == max(1, round(float(rate) * before.duration_seconds))


def test_unwritable_output_is_one_error_line(tmp_path, place_clip, capsys):
    place_clip(tmp_path / "in" / "x.mp4")
    (tmp_path / "file").touch()
    assert run(tmp_path / "in", tmp_path / "file" / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert str(tmp_path / "file" / "out") in error
    assert error.count("\n") == 1


def test_killed_run_resumes(tmp_path, place_clip, kill_midway):
    """No unfinished file has a final name, and the result equals that of one run."""
    for i in range(24):
        place_clip(tmp_path / "in" / str(i % 3) / f"{i}.mp4")
    output = tmp_path / "out"
    ledger = output / ".resize.ledger.jsonl"
    kill_midway(
        "resize_videos",
        "_transcode_item",
        calls=3,
        arguments=[tmp_path / "in", output, "--workers", "2"],
        is_midway=lambda: ledger.exists() and ledger.read_bytes().count(b"\n") == 6,
    )
    done = {path: path.stat().st_mtime_ns for path in output.glob("*/[0-9]*.mp4")}
    assert len(done) == 6
    for path in done:
        assert count_decodable_frames(path) == 12
    # As left by a kill in the middle of a file.
    (output / "0" / ".0.mp4.1.part").write_text("half")
    (output / "0" / ".23.mp4.1.part").write_text("of another run")
    (output / "0" / "0.mp4").unlink()

    assert run(tmp_path / "in", output, workers=2) == 0
    assert len(list(output.glob("*/[0-9]*.mp4"))) == 24
    assert [path.name for path in output.glob("*/.*.part")] == [".23.mp4.1.part"]
    for path, written in done.items():
        assert (path.stat().st_mtime_ns == written) == (path.name != "0.mp4")
    undisturbed = tmp_path / "undisturbed"
    assert run(tmp_path / "in", undisturbed, workers=2) == 0
    for path in undisturbed.glob("*/*.mp4"):
        assert path.read_bytes() == (output / path.relative_to(undisturbed)).read_bytes()


@pytest.mark.real_data
def test_odd_videos(shared_data, tmp_path):
    """Each is either copied frame by frame or reported as broken."""
    assert run(shared_data / "odd", tmp_path / "out", workers=2) == 0
    failed = {Path(entry["path"]).name for entry in report_of(tmp_path / "out")["failed"]}
    assert failed == {
        "audio_only.mp4",
        "chunk_out_of_range.mp4",
        "cut_30k_av1.mp4",
        "header_only_no_frames.mp4",
        "invalid_nalu.mp4",
        "invalid_vp9.webm",
        "malformed_box.mp4",
        "moov_only_5544_claimed.mp4",
        "no_timescale.mp4",
        "tiny_zero_frames.avi",
        "truncated_mid_stream.mp4",
        "zero_bytes.mp4",
        "zero_stsc.mp4",
    }
    for source in (shared_data / "odd").iterdir():
        copy = (tmp_path / "out" / source.name).with_suffix(".mp4")
        assert copy.exists() == (source.name not in failed)
        if copy.exists():
            with av.open(str(source)) as container:
                times = times_of(container.decode(video=0))
            with av.open(str(copy)) as container:
                copied_times = times_of(container.decode(video=0))
                assert (
                    min(container.streams.video[0].height, container.streams.video[0].width) <= 256
                )
            np.testing.assert_allclose(copied_times, times - times[0], atol=1e-6)


@pytest.mark.real_data
def test_kinetics_clip(shared_data, tmp_path):
    source = shared_data / "kinetics_tiny" / "val" / "ddvJ6-faICE.mp4"
    (tmp_path / "in").mkdir()
    os.symlink(source, tmp_path / "in" / source.name)
    assert run(tmp_path / "in", tmp_path / "out", "--short-side", 128) == 0
    expected, _ = stored_frames(source)
    got, _ = stored_frames(tmp_path / "out" / source.name)
    assert got.shape == (299, 128, 206, 3)
    sample = slice(None, None, 30)
    assert psnr(got[sample], resized(expected[sample], 128, 206)) > 28


@pytest.mark.parametrize(("fps", "last"), [(10, 0.9), (25, None), (30, None), (12.5, None)])
def test_resampling_shows_what_ffmpeg_would(tmp_path, encode, images, fps, last):
    """Which frame is seen when, by ffmpeg's own fps filter; and every frame is on time."""
    pts = [0, 33, 40, 100, 103, 190, 191, 250, 300, 301, 302, 400, 433, 466, 500, 900]
    source = tmp_path / "in" / "x.mkv"
    encode(source, images, pts=pts, time_base=Fraction(1, 1000), crf=1)
    assert run(tmp_path / "in", tmp_path / "out", "--fps", fps, "--crf", 1) == 0
    got, times = stored_frames(tmp_path / "out" / "x.mp4")
    np.testing.assert_allclose(times, np.arange(len(got)) / fps, atol=1e-6)

    graph = av.filter.Graph()
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        nodes = [
            graph.add_buffer(template=stream),
            graph.add("fps", f"fps={fps}"),
            graph.add("buffersink"),
        ]
        graph.link_nodes(*nodes).configure()
        for frame in container.decode(stream):
            graph.push(frame)
        graph.push(None)
    expected = []
    while True:
        try:
            expected.append(graph.pull().to_ndarray(format="rgb24"))
        except (av.error.BlockingIOError, av.error.EOFError):
            break
    # ffmpeg ends where the last frame begins; here it is shown for a frame's time.
    assert len(expected) - 1 <= len(got) <= len(expected) + 3
    shown = min(len(expected), len(got))
    for t in range(shown):
        differences = np.abs(images.astype(int) - expected[t]).mean((1, 2, 3))
        own = np.abs(images.astype(int) - got[t]).mean((1, 2, 3))
        assert differences.argmin() == own.argmin(), t


@pytest.mark.parametrize(
    ("fps", "num_frames", "rate"),
    [
        (50, 32, Fraction(50)),
        (12.5, 9, Fraction(25, 2)),
        (10, 7, Fraction(10)),
        (29.97002997, 19, Fraction(30_000, 1001)),
    ],
)
def test_number_of_resampled_frames(tmp_path, encode, images, fps, num_frames, rate):
    """16 frames at 25 fps are 0.64 seconds; the last frame is shown at least once."""
    encode(tmp_path / "in" / "x.mp4", images)
    assert run(tmp_path / "in", tmp_path / "out", "--fps", fps) == 0
    _, times = stored_frames(tmp_path / "out" / "x.mp4")
    np.testing.assert_allclose(times, np.arange(num_frames) / float(rate), atol=1e-6)


def test_source_with_new_time_and_same_content_is_not_encoded_again(tmp_path, place_clip):
    source = place_clip(tmp_path / "in" / "x.mp4")
    output = tmp_path / "out" / "x.mp4"
    assert run(tmp_path / "in", tmp_path / "out") == 0
    written = output.stat().st_mtime_ns
    os.utime(source, (1, 1))
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert output.stat().st_mtime_ns == written
    content = bytearray(source.read_bytes())
    content[-1] ^= 1  # of the same size
    source.write_bytes(content)
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert output.stat().st_mtime_ns != written


def test_shards_split_the_work(tmp_path, place_clip, capsys):
    for i in range(9):
        place_clip(tmp_path / "in" / f"{i}.mp4")
    done = set()
    for i in range(3):
        assert run(tmp_path / "in", tmp_path / "out", "--shard", f"{i}/3") == 0
        new = {path.name for path in tmp_path.glob("out/*.mp4")} - done
        assert new
        done |= new
    assert len(done) == 9
    assert sorted(path.name for path in tmp_path.glob("out/*.json")) == [
        *(f"resize.{i}-of-3.report.json" for i in range(3))
    ]
    capsys.readouterr()
    assert run(tmp_path / "in", tmp_path / "out", "--dry-run") == 0
    assert "dry run: 0 to do, 9 already done" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(tmp_path / "in", tmp_path / "out", "--shard", "3/3")
