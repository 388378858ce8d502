"""A list and a folder give the expected index and report."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_tools.full_decode_check import check_video
from data_tools.probing import probe
from i3d_gn.video_io.index import VideoIndex
from tests.data_tools.index_runs import report_of, run


def test_class_folders(motion_clips, output, capsys):
    assert run(motion_clips / "train", output, workers=2) == 0
    index = VideoIndex.load(output)
    motions = ["down", "left", "right", "up"]
    names = [f"move_{m}" for m in motions] + ["roll_clockwise", "roll_counterclockwise"]
    assert list(index.class_names) == names
    assert index.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert index.num_frames.tolist() == [12] * 6
    assert (set(index.widths), set(index.heights)) == ({128}, {96})
    rows = pq.read_table(output).to_pylist()
    assert {(row["fps"], round(row["duration_seconds"], 6)) for row in rows} == {(25.0, 0.48)}
    assert all(index.path_of(i).is_file() for i in range(6))
    text = capsys.readouterr().out
    assert "6 of 6 videos usable" in text
    assert f"--label-map {output}" in text


def test_rejected_videos_are_reported(tmp_path, place_clip, output, capsys):
    """Missing, listed twice, with two labels, with two files, empty, not a video."""
    videos = tmp_path / "videos"
    for name in [
        "air_drumming/-aaaaaaaaaa_000010_000020.mp4",
        "air_drumming/_bbbbbbbbbb.mp4",
        "yoga/ccccccccccc_000010_000020.mp4",
        "yoga/ccccccccccc_000010_000020.mkv",
        "yoga/ddddddddddd.mp4",
        "yoga/eeeeeeeeeee.mp4",
    ]:
        place_clip(videos / name)
    (videos / "yoga" / "fffffffffff.mp4").touch()
    (videos / "yoga" / "ggggggggggg.mp4").write_text("no video " * 100)
    source = tmp_path / "val.csv"
    source.write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        "air drumming,-aaaaaaaaaa,10,20,val,0\n"
        '"air drumming",_bbbbbbbbbb,10,20,val,0\n'
        "yoga,ccccccccccc,10,20,val,0\n"
        "yoga,ddddddddddd,10,20,val,0\n"
        "yoga,ddddddddddd,10,20,val,0\n"
        "yoga,eeeeeeeeeee,10,20,val,0\n"
        "air drumming,eeeeeeeeeee,10,20,val,0\n"
        "yoga,fffffffffff,10,20,val,0\n"
        "yoga,ggggggggggg,10,20,val,0\n"
        "zumba,hhhhhhhhhhh,10,20,val,0\n"
    )
    assert run(source, output, "--videos", videos) == 0
    index = VideoIndex.load(output)
    assert [Path(path).stem for path in index.paths] == [
        "-aaaaaaaaaa_000010_000020",
        "_bbbbbbbbbb",
        "ccccccccccc_000010_000020",
        "ddddddddddd",
    ]
    assert index.labels.tolist() == [0, 0, 1, 1]
    assert index.class_names == ("air drumming", "yoga", "zumba")

    report = report_of(output)
    assert (report["num_listed"], report["num_indexed"]) == (10, 4)
    assert [(e["where"], e["path"]) for e in report["missing"]] == [
        ("val.csv:11", "hhhhhhhhhhh_000010_000020")
    ]
    assert [(e["where"], e["path"], e["reason"]) for e in report["duplicated"]] == [
        (
            "val.csv:4",
            "yoga/ccccccccccc_000010_000020.mkv",
            "another file of the same video is used: yoga/ccccccccccc_000010_000020.mp4",
        ),
        ("val.csv:6", "yoga/ddddddddddd.mp4", "listed before at val.csv:5"),
        (
            "val.csv:8",
            "yoga/eeeeeeeeeee.mp4",
            "listed before at val.csv:7 with another label, so neither is used",
        ),
        (
            "val.csv:7",
            "yoga/eeeeeeeeeee.mp4",
            "listed again with another label, so neither is used",
        ),
    ]
    assert [(e["path"], e["reason"]) for e in report["empty"]] == [
        ("yoga/fffffffffff.mp4", "the file is empty")
    ]
    (undecodable,) = report["undecodable"]
    assert undecodable["path"] == "yoga/ggggggggggg.mp4"
    assert "Invalid data" in undecodable["reason"]
    assert report["thinned_classes"] == [
        {"class_name": "zumba", "num_listed": 1, "num_indexed": 0},
        {"class_name": "yoga", "num_listed": 6, "num_indexed": 2},
        {"class_name": "air drumming", "num_listed": 3, "num_indexed": 2},
    ]
    text = capsys.readouterr().out
    assert "4 of 10 videos usable" in text
    assert "yoga: 2 of 6" in text


def test_decode_finds_broken_frames(place_clip, tmp_path, output):
    whole = place_clip(tmp_path / "videos" / "a" / "whole.mp4")
    content = whole.read_bytes()
    whole.with_name("cut.mp4").write_bytes(content[: len(content) * 9 // 10])
    assert run(tmp_path / "videos", output) == 0
    assert VideoIndex.load(output).paths == ["a/cut.mp4", "a/whole.mp4"]
    assert run(tmp_path / "videos", output, "--decode") == 0
    assert VideoIndex.load(output).paths == ["a/whole.mp4"]
    (undecodable,) = report_of(output)["undecodable"]
    assert "frames can be decoded" in undecodable["reason"]


def test_no_usable_videos(tmp_path, output, capsys):
    (tmp_path / "list.txt").write_text("none.mp4 0\n")
    assert run(tmp_path / "list.txt", output) == 1
    assert not output.exists()
    assert report_of(output)["num_missing"] == 1
    assert "no index was written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["LIST", "out.csv"], "name it NAME.parquet"),
        (["CSV", "o.parquet"], "names videos by id; pass their folder as --videos"),
        (["LIST", "o.parquet", "--videos", "none"], "--videos none is not a folder"),
        (["FOLDER", "o.parquet", "--videos", "x"], "is the folder of the videos itself"),
        (["none.txt", "o.parquet"], "list or folder not found: none.txt"),
    ],
)
def test_invalid_arguments(arguments, message, tmp_path, place_clip, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("LIST").write_text("a.mp4 0\n")
    Path("CSV").write_text("label,youtube_id,time_start,time_end,split\na,b,1,2,val\n")
    place_clip(Path("FOLDER/class/a.mp4"))
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_file_without_permission_gets_no_verdict(tmp_path, place_clip, monkeypatch):
    """Fixing permissions does not change the modification time, so nothing may be recorded."""
    place_clip(tmp_path / "a.mp4")

    def deny(*arguments, **options):
        raise PermissionError

    monkeypatch.setattr("builtins.open", deny)
    with pytest.raises(PermissionError):
        probe(tmp_path, "a.mp4", decode=False)
    with pytest.raises(PermissionError):
        check_video(tmp_path / "a.mp4")


def test_only_new_and_changed_files_are_opened(tmp_path, place_clip, encode, images, output):
    first, second = (place_clip(tmp_path / "videos" / "a" / f"{n}.mp4") for n in "12")
    assert run(tmp_path / "videos", output) == 0
    ledger = Path(f"{output}.ledger.jsonl")
    assert len(ledger.read_text().splitlines()) == 2
    assert run(tmp_path / "videos", output) == 0
    assert len(ledger.read_text().splitlines()) == 2

    encode(second, images)
    place_clip(first.with_name("3.mp4"))
    assert run(tmp_path / "videos", output) == 0
    assert len(ledger.read_text().splitlines()) == 4
    assert VideoIndex.load(output).num_frames.tolist() == [12, 16, 12]


def test_killed_run_resumes(tmp_path, place_clip, output, kill_midway, capfd):
    """The result equals that of an undisturbed run, and finished videos are not probed again."""
    videos = tmp_path / "videos"
    for i in range(40):
        place_clip(videos / "yoga" / f"{i:04d}.mp4")
    ledger = Path(f"{output}.ledger.jsonl")

    def num_lines():
        return ledger.read_bytes().count(b"\n") if ledger.exists() else 0

    kill_midway(
        "index_videos",
        "_probe_item",
        calls=5,
        arguments=[videos, output, "--workers", "2"],
        is_midway=lambda: num_lines() == 10,
    )
    assert not output.exists()
    done = ledger.read_bytes()
    capfd.readouterr()
    assert run(videos, output, workers=2) == 0
    assert capfd.readouterr().err == ""  # no progress bar without a terminal
    assert num_lines() == 40
    assert ledger.read_bytes().startswith(done)
    undisturbed = tmp_path / "undisturbed" / "val.parquet"
    assert run(videos, undisturbed, workers=2) == 0
    assert output.read_bytes() == undisturbed.read_bytes()


def test_skipped_files_are_named(tmp_path, place_clip, output, capsys):
    place_clip(tmp_path / "videos" / "a" / "1.MTS")
    place_clip(tmp_path / "videos" / "flat.mp4")
    (tmp_path / "videos" / "a" / "2.rmvb").touch()
    assert run(tmp_path / "videos", output) == 0
    assert VideoIndex.load(output).paths == ["a/1.MTS"]
    assert report_of(output)["skipped"] == ["flat.mp4", "a/2.rmvb"]
    text = capsys.readouterr().out
    assert "skipped files (not videos, or not in a class folder): 2" in text
    assert "    a/2.rmvb\n" in text


def test_escape_codes_in_names_are_not_printed_raw(tmp_path, place_clip, output, capsys):
    place_clip(tmp_path / "videos" / "a\x1b[31m" / "1.mp4")
    (tmp_path / "videos" / "a\x1b[31m" / "2\x9b\n.mp4").write_text("no video")
    (tmp_path / "videos" / "a\x1b[31m" / "3\x1b]0;title\x07.txt").touch()
    assert run(tmp_path / "videos", output) == 0
    (tmp_path / "list.txt").write_text("a.mp4 \x1b[31mred\n")
    assert run(tmp_path / "list.txt", output, "--label-map", output) == 2
    text = "".join(capsys.readouterr())
    assert "a\\x1b[31m/2\\x9b\\n.mp4" in text
    assert "3\\x1b]0;title\\x07.txt" in text
    assert "class '\\\\x1b[31mred'" in text.replace("'\\x1b", "'\\\\x1b")
    assert not any(character in text for character in "\x1b\x9b\x07")


@pytest.mark.real_data
def test_grid_digits(shared_data, output):
    folder = shared_data / "grid_digits"
    assert run(folder / "val.csv", output, workers=2) == 0
    index = VideoIndex.load(output)
    assert len(index) == 200
    assert len(index.class_names) == 10
    assert set(index.num_frames) <= {74, 75}


@pytest.mark.real_data
@pytest.mark.parametrize(("split", "count"), [("train", 30), ("val", 10)])
def test_kinetics_tiny(shared_data, output, tmp_path, split, count):
    folder = shared_data / "kinetics_tiny"
    label_map = tmp_path / "names.txt"
    label_map.write_text("climbing a rope\nblowing glass\n")
    source = folder / f"kinetics_tiny_{split}_video.txt"
    options = ["--label-map", label_map, *(["--decode"] if split == "val" else [])]
    assert run(source, output, "--videos", folder / split, *options) == 0
    index = VideoIndex.load(output)
    assert len(index) == count
    assert index.class_names == ("climbing a rope", "blowing glass")
    assert min(index.heights.min(), index.widths.min()) == 256
    report = report_of(output)
    assert [report[f"num_{v}"] for v in ("missing", "duplicated", "undecodable", "empty")] == [
        0
    ] * 4


UNREADABLE = {
    "audio_only.mp4",
    "chunk_out_of_range.mp4",
    "cut_30k_av1.mp4",
    "invalid_vp9.webm",
    "malformed_box.mp4",
    "zero_stsc.mp4",
}
EMPTY = {
    "header_only_no_frames.mp4",
    "moov_only_5544_claimed.mp4",
    "tiny_zero_frames.avi",
    "zero_bytes.mp4",
}
# Number of frames of a full decode, fewer than the header promises.
TRUNCATED = {"invalid_nalu.mp4": 26, "no_timescale.mp4": 8, "truncated_mid_stream.mp4": 28}


@pytest.mark.real_data
@pytest.mark.parametrize("decode", [False, True])
def test_verdicts_of_odd_videos(shared_data, tmp_path, output, decode):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "odd").symlink_to(shared_data / "odd")
    arguments = ["--decode"] if decode else []
    assert run(tmp_path / "videos", output, *arguments, workers=2) == 0
    report = report_of(output)
    reasons = {Path(e["path"]).name: e["reason"] for e in report["undecodable"]}
    assert {Path(e["path"]).name for e in report["empty"]} == EMPTY
    assert set(reasons) == UNREADABLE | (set(TRUNCATED) if decode else set())
    for name, num_frames in TRUNCATED.items() if decode else ():
        assert reasons[name].startswith(f"{num_frames} of ")
    assert report["num_indexed"] == 30 - len(EMPTY) - len(reasons)


def test_shards_then_index(motion_clips, output, capsys):
    for i in range(2):
        assert run(motion_clips / "train", output, "--shard", f"{i}/3") == 0
        assert "run the command again without --shard" in capsys.readouterr().out
    assert not output.exists()
    assert run(motion_clips / "train", output, "--shard", "2/3") == 0
    assert run(motion_clips / "train", output, "--dry-run") == 0
    assert "dry run: 0 to do, 6 already done" in capsys.readouterr().out
    assert run(motion_clips / "train", output) == 0
    assert len(VideoIndex.load(output)) == 6
    assert Path(f"{output}.ledger.jsonl").read_text() == ""  # the shards' ledgers sufficed
