"""A small copy of the CVDF release, from the web server to an index."""

import csv
import io
import json
import tarfile

import pyarrow.parquet as pq
import pytest

from data_tools import download_kinetics
from i3d_gn import cli

QUICK = ["--attempts", "3", "--stall-seconds", "4", "--workers", "2"]


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_500_000_000
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def publish(server, rows, content, *, corrupt):
    """Serve `rows` of an official CSV in the layout of the release; `corrupt` is a corrupted id."""
    official = download_kinetics.OFFICIAL_BASE_URL
    folder = server.folder
    for split in ("train", "val"):
        of_split = [row for row in rows if row["split"] == split]
        (folder / "annotations").mkdir(exist_ok=True)
        with open(folder / "annotations" / f"{split}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(of_split)
        (folder / split).mkdir()
        names = []
        for part in range(2):
            members = []
            for row in of_split[part::2]:
                start, end = int(row["time_start"]), int(row["time_end"])
                name = f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4"
                broken = row["youtube_id"] == corrupt
                members.append((name, content[:500] if broken else content))
            names.append(f"part_{part}.tar.gz")
            (folder / split / names[-1]).write_bytes(tar_of(members))
        (folder / split / f"k400_{split}_path.txt").write_text(
            "".join(f"{official}/{split}/{name}\n" for name in names)
        )
    better = f"replacement_for_corrupted_k400/{corrupt}_000000_000010.mp4"
    (folder / download_kinetics.REPLACEMENTS).write_bytes(tar_of([(better, content)]))


@pytest.fixture
def release(http_server, clip):
    rows = [
        {
            "label": label,
            "youtube_id": f"{prefix}{i:010d}",
            "time_start": str(i),
            "time_end": str(i + 10),
            "split": split,
            "is_cc": "0",
        }
        for split, prefix in (("train", "-"), ("val", "_"))
        for i, label in enumerate(["yoga", "air drumming", "zumba", "skiing (not slalom)"])
    ]
    publish(http_server, rows, clip.read_bytes(), corrupt="-0000000002")
    return http_server


def download(release, output, *arguments):
    return cli.main(["download", str(output), "--base-url", release.url, *QUICK, *arguments])


def report_of(output):
    return json.loads((output / "download.report.json").read_text())


FILES = [
    "annotations/train.csv",
    "annotations/val.csv",
    "replacement/replacement_for_corrupted_k400.tgz",
    "train/part_0.tar.gz",
    "train/part_1.tar.gz",
    "val/part_0.tar.gz",
    "val/part_1.tar.gz",
]


def test_download_extract_resize_index(release, tmp_path, capsys):
    release.faults |= {
        "train/part_0.tar.gz": [("drop", 3000), ("status", 500)],
        "train/part_1.tar.gz": [("flip", 2000)],
        "val/part_0.tar.gz": [("stall", 1000)],
        "val/k400_val_path.txt": [("status", 503)],
        "replacement_for_corrupted_k400.tgz": [("length", 100)],
    }
    archives, videos = tmp_path / "archives", tmp_path / "videos"
    assert download(release, archives) == 0
    report = report_of(archives)
    assert [file["path"] for file in report["files"]] == FILES
    assert {file["checked"] for file in report["files"]} == {"md5"}
    served = {"replacement/" + download_kinetics.REPLACEMENTS: download_kinetics.REPLACEMENTS}
    for name in FILES:
        original = release.folder / served.get(name, name)
        assert (archives / name).read_bytes() == original.read_bytes()

    assert cli.main(["extract", str(archives), str(videos), "--workers", "1"]) == 0
    assert cli.main(["resize", str(videos / "train"), str(tmp_path / "train"), "--workers=1"]) == 0
    source, index = archives / "annotations" / "train.csv", tmp_path / "train.parquet"
    arguments = [str(source), str(index), "--videos", str(tmp_path / "train"), "--workers", "1"]
    assert cli.main(["index", *arguments, "--decode"]) == 0
    rows = pq.read_table(index).to_pylist()
    assert [(row["path"], row["class_name"], row["num_frames"]) for row in rows] == [
        ("-0000000000_000000_000010.mp4", "yoga", 12),
        ("-0000000001_000001_000011.mp4", "air drumming", 12),
        ("-0000000002_000002_000012.mp4", "zumba", 12),
        ("-0000000003_000003_000013.mp4", "skiing (not slalom)", 12),
    ]


def test_failed_files_are_reported_and_downloaded_by_the_next_run(release, tmp_path, capsys):
    archives = tmp_path / "archives"
    release.faults["train/part_1.tar.gz"] = [("status", 404)] * 2
    release.faults["val/part_1.tar.gz"] = [("drop", 0)] * 3
    assert download(release, archives) == 1
    assert "5 files downloaded, 0 already there, 2 failed" in capsys.readouterr().out
    failed = {entry["path"]: entry["reason"] for entry in report_of(archives)["failed"]}
    assert "HTTP 404" in failed["train/part_1.tar.gz"]
    assert "gave up after 3 attempts" in failed["val/part_1.tar.gz"]

    (archives / "val" / "part_0.tar.gz").unlink()
    release.requests.clear()
    assert download(release, archives) == 0
    fetched = {name for name, first, _ in release.requests if first is None}
    assert fetched == {"train/part_1.tar.gz", "val/part_0.tar.gz", "val/part_1.tar.gz"}


def test_dry_run_and_shards(release, tmp_path, capsys):
    archives = tmp_path / "archives"
    assert download(release, archives, "--dry-run") == 0
    assert "dry run: 7 to do, 0 already done" in capsys.readouterr().out
    assert not archives.exists()
    for i in range(3):
        assert download(release, archives, "--shard", f"{i}/3") == 0
    assert download(release, archives, "--dry-run") == 0
    assert "dry run: 0 to do, 7 already done" in capsys.readouterr().out
    # Each file was downloaded by one shard only (the lists of archives by each).
    archive_requests = [name for name, *_ in release.requests if not name.endswith("path.txt")]
    assert len(archive_requests) == len(set(archive_requests)) == 7


@pytest.mark.parametrize("text", ["<html>nothing here</html>", ""])
def test_wrong_base_url(release, tmp_path, capsys, text):
    (release.folder / "train" / "k400_train_path.txt").write_text(text)
    assert download(release, tmp_path / "a") == 2
    assert "is not a list of archives" in capsys.readouterr().err
    (release.folder / "train" / "k400_train_path.txt").unlink()
    assert download(release, tmp_path / "b") == 2
    error = capsys.readouterr().err
    assert "HTTP 404" in error
    assert "check --base-url" in error


@pytest.mark.real_data
def test_real_annotations_and_clip(http_server, shared_data, tmp_path):
    """Real annotations, with ids that begin with - and _, and a real clip."""
    content = (shared_data / "kinetics_tiny" / "val" / "0pVGiAU6XEA.mp4").read_bytes()
    with open(shared_data / "kinetics400" / "val_official.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["youtube_id"][0] in "-_"][:6]
    with open(shared_data / "kinetics400" / "train_tiny_400rows.csv", newline="") as file:
        rows += list(csv.DictReader(file))[:6]
    rows = [{**row, "split": "val" if row["split"] == "val" else "train"} for row in rows]
    corrupt = rows[-1]["youtube_id"]
    publish(http_server, rows, content, corrupt=corrupt)
    archives, videos = tmp_path / "archives", tmp_path / "videos"
    assert download(http_server, archives) == 0
    assert cli.main(["extract", str(archives), str(videos), "--workers", "1"]) == 0
    for split in ("train", "val"):
        source, index = archives / "annotations" / f"{split}.csv", tmp_path / f"{split}.parquet"
        label_map = shared_data / "kinetics400" / "label_map.txt"
        arguments = [str(source), str(index), "--videos", str(videos / split)]
        assert cli.main(["index", *arguments, "--label-map", str(label_map)]) == 0
        table = pq.read_table(index).to_pylist()
        of_split = [row for row in rows if row["split"] == split]
        assert [row["class_name"] for row in table] == [row["label"] for row in of_split]
        assert {row["num_frames"] for row in table} == {table[0]["num_frames"]}
