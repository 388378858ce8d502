"""All videos of the archives are extracted or replaced, and nothing else is written."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from data_tools.processes import ItemFailure
from data_tools.safe_tar import check_expansion
from i3d_gn import cli


def run(*arguments):
    return cli.main(["extract", *map(str, arguments), "--workers", "1"])


def report_of(output):
    return json.loads((output / "extract.report.json").read_text())


def content_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*.mp4"))
        if path.is_file()
    }


def video(name, size):
    return name, (name.encode() * size)[:size]


def pack(path, members):
    """`members` are (name, content) or ready TarInfos."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "w" if path.suffix == ".tar" else "w:gz"
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size, info.mtime = len(member[1]), 1_500_000_000
                tar.addfile(info, io.BytesIO(member[1]))
    return path


A, B = video("-aaaaaaaaaa_000010_000020.mp4", 5000), video("_bbbbbbbbbb_000001_000011.mp4", 1024)
C, D = video("ccccccccccc_000010_000020.mp4", 7777), video("ddddddddddd_000010_000020.mp4", 1)


def test_release_layout(tmp_path, capsys):
    archives = tmp_path / "archives"
    pack(archives / "train" / "part_0.tar.gz", [A, B, ("notes.txt", b"x"), ("._" + A[0], b"x")])
    pack(archives / "train" / "part_1.tar.gz", [("./" + C[0], C[1])])
    pack(archives / "val" / "part_0.tar", [D])
    replacement = ("replacement_for_corrupted_k400/_bbbbbbbbbb_000002_000012.mp4", b"better")
    unused = ("replacement_for_corrupted_k400/zzzzzzzzzzz_000002_000012.mp4", b"unused")
    pack(archives / "replacement" / "replacement_for_corrupted_k400.tgz", [replacement, unused])
    output = tmp_path / "videos"
    assert run(archives, output) == 0
    assert content_of(output / "train") == {A[0]: A[1], B[0]: b"better", C[0]: C[1]}
    assert content_of(output / "val") == {D[0]: D[1]}
    report = report_of(output)
    assert (report["num_videos"], report["num_failed"], report["refused"]) == (4, 0, [])
    assert report["replaced"] == [f"train/{B[0]}"]
    assert report["unused_replacements"] == [f"replacement/{unused[0]}"]
    assert "4 videos" in capsys.readouterr().out

    before = {path: path.stat().st_ino for path in output.rglob("*.mp4")}
    assert run(archives, output) == 0
    assert "(3 already done)" in capsys.readouterr().out
    # A replacement archive that is added later is applied too.
    pack(archives / "replacement2" / "replacement_2.tar", [(C[0], b"best")])
    assert run(archives, output) == 0
    assert content_of(output / "train") == {A[0]: A[1], B[0]: b"better", C[0]: b"best"}
    after = {path: path.stat().st_ino for path in output.rglob("*.mp4")}
    assert [path.name for path in before if after[path] != before[path]] == [C[0]]


def test_replacements_in_the_same_folder(tmp_path, capsys):
    """Then the folder has other videos beside the replacements."""
    pack(tmp_path / "archives" / "part_0.tar.gz", [A, B])
    better = ("replacement_for_corrupted_k400/_bbbbbbbbbb_000002_000012.mp4", b"better")
    pack(tmp_path / "archives" / "replacement_k400.tgz", [better])
    output = tmp_path / "videos"
    assert run(tmp_path / "archives", output) == 0
    first = report_of(output)
    assert first["replaced"] == [B[0]]
    assert run(tmp_path / "archives", output) == 0
    assert "(1 already done)" in capsys.readouterr().out
    assert report_of(output) == first
    # A deleted replacement is extracted again before it replaces a video.
    (output / better[0]).unlink()
    (output / B[0]).unlink()
    os.utime(tmp_path / "archives" / "part_0.tar.gz", (1, 1))
    assert run(tmp_path / "archives", output) == 0
    assert content_of(output) == {A[0]: A[1], B[0]: b"better", better[0]: b"better"}


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_members_outside_the_output_are_refused(tmp_path):
    secret = tmp_path / "secret.mp4"
    secret.write_text("secret")
    device = tarfile.TarInfo("device.mp4")
    device.type = tarfile.CHRTYPE
    pack(
        tmp_path / "archives" / "evil.tar.gz",
        [
            ("../outside.mp4", b"x"),
            ("a/../../outside.mp4", b"x"),
            (str(tmp_path / "absolute.mp4"), b"x"),
            link("soft.mp4", "../secret.mp4", tarfile.SYMTYPE),
            link("hard.mp4", str(secret), tarfile.LNKTYPE),
            link("folder.mp4", "..", tarfile.SYMTYPE),
            ("folder.mp4/through.mp4", b"x"),
            device,
            D,
        ],
    )
    output = tmp_path / "videos"
    assert run(tmp_path / "archives", output) == 0
    assert content_of(output) == {D[0]: D[1], "folder.mp4/through.mp4": b"x"}
    assert not (output / "folder.mp4").is_symlink()
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["secret.mp4"]
    refused = [(entry["member"], entry["reason"]) for entry in report_of(output)["refused"]]
    assert [reason for _, reason in refused] == [
        *["its path leads outside the folder"] * 3,
        *["a link"] * 3,
        "not a regular file",
    ]


def test_sparse_members_and_invalid_names_are_refused(tmp_path):
    """A name that is not UTF-8, and a few bytes that expand to 64 MiB of zeros."""
    sparse = tarfile.TarInfo("sparse.mp4")
    sparse.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**26)}
    members = [("caf\udce9.mp4", b"x"), link("caf\udce9 link.mp4", "x", tarfile.SYMTYPE), sparse, D]
    pack(tmp_path / "archives" / "odd.tar", members)
    output = tmp_path / "videos"
    assert run(tmp_path / "archives", output) == 0
    assert content_of(output) == {D[0]: D[1]}
    refused = {entry["member"]: entry["reason"] for entry in report_of(output)["refused"]}
    assert refused["caf\\udce9.mp4"] == "its name is not UTF-8"
    assert refused["caf\\udce9 link.mp4"] == "a link"
    assert refused["sparse.mp4"].startswith("a sparse file")


def test_links_in_the_output_folder_do_not_lead_out(tmp_path):
    """Whether they were there before, or an earlier archive of the release made them."""
    outside, output = tmp_path / "outside", tmp_path / "videos"
    (outside / "deep").mkdir(parents=True)
    (output / "inside").mkdir(parents=True)
    (output / "train").symlink_to(outside)
    (output / "val").symlink_to("inside")
    pack(tmp_path / "archives" / "train" / "a.tar", [A])
    pack(tmp_path / "archives" / "train" / "deep" / "b.tar", [B])
    pack(tmp_path / "archives" / "val" / "c.tar", [C])
    pack(tmp_path / "archives" / "d.tar", [("train/" + D[0], D[1])])
    pack(tmp_path / "archives" / "replacement.tar", [(D[0], b"better")])
    assert run(tmp_path / "archives", output) == 0
    assert content_of(outside) == {}
    assert content_of(output / "inside") == {C[0]: C[1]}
    refused = {entry["archive"]: entry["reason"] for entry in report_of(output)["refused"]}
    assert set(refused) == {"train/a.tar", "train/deep/b.tar", "d.tar"}
    assert refused["d.tar"] == f"a link in the output folder leads outside, to {outside}"


def test_link_in_place_of_a_video_is_replaced(tmp_path):
    secret, output = tmp_path / "secret.mp4", tmp_path / "videos"
    secret.write_bytes(A[1])
    os.utime(secret, (1_500_000_000, 1_500_000_000))
    output.mkdir()
    (output / A[0]).symlink_to(secret)
    (output / B[0]).symlink_to(tmp_path / "new.mp4")
    pack(tmp_path / "archives" / "a.tar", [A, B])
    assert run(tmp_path / "archives", output) == 0
    assert [(output / name).is_symlink() for name, _ in (A, B)] == [False, False]
    assert not (tmp_path / "new.mp4").exists()


def test_bad_names_do_not_fail_an_archive(tmp_path):
    """Too long for the file system, a file where a folder must be, a folder in place of a file."""
    long, almost = "x" * 300 + ".mp4", "y" * 251 + ".mp4"
    members = [(long, b"1"), ("a.mp4", b"2"), ("a.mp4/b.mp4", b"3"), (almost, b"4"), A]
    pack(tmp_path / "archives" / "odd.tar.gz", [*members, ("f/g.mp4", b"5"), ("f", b"6")])
    output = tmp_path / "videos"
    (output / "taken.mp4").mkdir(parents=True)
    pack(tmp_path / "archives" / "second.tar", [("taken.mp4", b"7"), B])
    assert run(tmp_path / "archives", output) == 0
    assert content_of(output) == {
        "a.mp4": b"2",
        almost: b"4",
        A[0]: A[1],
        B[0]: B[1],
        "f/g.mp4": b"5",
    }
    refused = {entry["member"]: entry["reason"] for entry in report_of(output)["refused"]}
    assert set(refused) == {long, "a.mp4/b.mp4", "taken.mp4"}
    assert refused[long] == "the file system refuses its name (File name too long)"


def test_times_out_of_range(tmp_path):
    infos = []
    for i, mtime in enumerate(("-5", "1e30", "nan", "1500000000.5")):
        info = tarfile.TarInfo(f"{i}.mp4")
        info.pax_headers = {"mtime": mtime}
        infos.append(info)
    pack(tmp_path / "archives" / "odd.tar", infos)
    output = tmp_path / "videos"
    assert run(tmp_path / "archives", output) == 0
    times = [int((output / f"{i}.mp4").stat().st_mtime) for i in range(4)]
    assert times == [0, 0, 0, 1_500_000_000]


def test_decompression_bomb_is_refused(tmp_path, capsys):
    """5 GiB of zeros in 5 MB; the videos before it are extracted, and other archives too."""
    bomb = tmp_path / "archives" / "bomb.tar.gz"
    bomb.parent.mkdir()
    info = tarfile.TarInfo("bomb.mp4")
    info.size = 5 * 2**30
    with gzip.open(bomb, "wb", compresslevel=9) as file:
        file.write(bytes(raw_tar(tmp_path, [A]))[: 512 + -(-len(A[1]) // 512) * 512])
        file.write(info.tobuf())
        file.write(bytes(2**20))
    pack(tmp_path / "archives" / "good.tar", [B])
    output = tmp_path / "videos"
    assert run(bomb.parent, output) == 1
    (failed,) = report_of(output)["failed"]
    assert failed["archive"] == "bomb.tar.gz"
    assert "expand to more than 1073741824" in failed["reason"]
    assert "stopped at 'bomb.mp4'" in failed["reason"]
    assert content_of(output) == {A[0]: A[1], B[0]: B[1]}


def test_large_but_incompressible_archives_are_no_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.safe_tar._ALWAYS_ALLOWED_BYTES", 1000)
    archive = pack(tmp_path / "a.tar.gz", [A])
    with tarfile.open(archive) as tar:
        (member,) = tar
    size = member.offset_data + member.size
    check_expansion(member, archive_bytes=size // 100 + 1)
    with pytest.raises(ItemFailure, match="100 times its size"):
        check_expansion(member, archive_bytes=size // 100 - 1)


def test_unfinished_files_of_a_killed_run_are_removed(tmp_path):
    pack(tmp_path / "archives" / "train" / "part_0.tar", [A, B])
    folder = tmp_path / "videos" / "train"
    folder.mkdir(parents=True)
    (folder / f".{A[0]}.machine-1.part").write_bytes(A[1][:100])
    (folder / f".{C[0]}.machine-1.part").write_text("of another shard that is running")
    assert run(tmp_path / "archives", tmp_path / "videos") == 0
    assert {path.name for path in folder.iterdir()} == {A[0], B[0], f".{C[0]}.machine-1.part"}


def raw_tar(tmp_path, members):
    return bytearray(pack(tmp_path / "raw" / "x.tar", members).read_bytes())


@pytest.mark.parametrize(
    "damage", ["cut stream", "cut at a member", "flipped bit", "bad header", "no archive"]
)
def test_damaged_archive_is_reported_and_earlier_videos_are_kept(tmp_path, damage):
    """`tarfile` alone accepts all of these but the first and last."""
    archive = tmp_path / "archives" / "part_0.tar.gz"
    archive.parent.mkdir()
    raw = raw_tar(tmp_path, [A, C, D])
    second_header = 512 + -(-len(A[1]) // 512) * 512
    if damage == "cut at a member":
        raw = raw[:second_header]
    if damage == "bad header":
        raw[second_header + 10] ^= 0xFF
    packed = bytearray(gzip.compress(bytes(raw)))
    if damage == "cut stream":
        packed = packed[: len(packed) // 2]
    if damage == "flipped bit":
        packed[-6] ^= 1  # of the checksum
    if damage == "no archive":
        packed = bytearray(b"<html>404</html>" * 100)
    archive.write_bytes(packed)
    output = tmp_path / "videos"
    assert run(archive.parent, output) == 1
    (failed,) = report_of(output)["failed"]
    assert failed["archive"] == "part_0.tar.gz"
    assert "damaged after" in failed["reason"]
    assert "download it again" in failed["reason"]
    whole = {A[0]: A[1], C[0]: C[1], D[0]: D[1]}
    got = content_of(output)
    assert got.items() <= whole.items()
    if damage in {"cut at a member", "bad header"}:
        assert got == {A[0]: A[1]}
    archive.write_bytes(gzip.compress(bytes(raw_tar(tmp_path, [A, C, D]))))
    assert run(archive.parent, output) == 0
    assert content_of(output) == whole


def test_damaged_replacement_archive_is_an_error(tmp_path, capsys):
    pack(tmp_path / "archives" / "part_0.tar", [A])
    (tmp_path / "archives" / "replacement.tgz").write_bytes(b"no archive")
    assert run(tmp_path / "archives", tmp_path / "videos") == 2
    assert "archives of replacements must be complete" in capsys.readouterr().err
    assert content_of(tmp_path / "videos") == {}


def test_killed_run_resumes(tmp_path, kill_midway):
    """Existing videos are not written again, and the result equals that of one run."""
    members = [video(f"{i:011d}_000000_000010.mp4", 40_000) for i in range(30)]
    for part in range(2):
        pack(tmp_path / "archives" / f"part_{part}.tar.gz", members[part::2])
    output = tmp_path / "videos"
    arguments = [tmp_path / "archives", output, "--workers", "2"]
    kill_midway(
        "extract_archives",
        "_write",
        calls=5,
        arguments=arguments,
        is_midway=lambda: len(content_of(output)) == 10,
    )
    assert content_of(output) == dict(members[:10])
    inodes = {path: path.stat().st_ino for path in output.glob("*.mp4")}
    assert cli.main(["extract", *map(str, arguments)]) == 0
    assert content_of(output) == dict(members)
    assert all(path.stat().st_ino == inode for path, inode in inodes.items())


def test_no_archives(tmp_path, capsys):
    Path(tmp_path / "x.zip").touch()
    assert run(tmp_path, tmp_path / "videos") == 2
    assert "no archives" in capsys.readouterr().err
