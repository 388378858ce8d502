"""The ledger keeps all recorded results and ignores incomplete lines."""

import errno
import os
import threading

import pytest

from data_tools.file_status import file_fingerprint
from data_tools.ledger import Ledger


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "ledger.jsonl"


def test_results_are_read_back(path):
    with Ledger(path) as ledger:
        ledger.record("-a ü.mp4", [1, {"crf": 23.0}], {"num_frames": 3})
        ledger.record("b", (1, 2), "first")
        ledger.record("b", (1, 2), "second")
        assert ledger.get("b", [1, 2]) == "second"
    with Ledger(path) as ledger:
        assert ledger.get("-a ü.mp4", [1, {"crf": 23.0}]) == {"num_frames": 3}
        assert ledger.get("b", [1, 2]) == "second"


def test_other_fingerprint_counts_as_absent(path):
    with Ledger(path) as ledger:
        ledger.record("a", [1, "crf 23"], "done")
        assert ledger.get("a", [1, "crf 24"]) is None
        assert ledger.get("b", [1, "crf 23"]) is None


@pytest.mark.parametrize("kept_bytes", [1, 10, -1])
def test_incomplete_last_line_is_removed(path, kept_bytes):
    with Ledger(path) as ledger:
        ledger.record("a", 1, "done")
        complete = path.read_bytes()
        ledger.record("b", 1, "done")
    path.write_bytes(complete + path.read_bytes()[len(complete) :][:kept_bytes])
    with Ledger(path) as ledger:
        assert ledger.get("a", 1) == "done"
        assert ledger.get("b", 1) is None
        ledger.record("c", 1, "done")
    with Ledger(path) as ledger:
        assert [ledger.get(key, 1) for key in "abc"] == ["done", None, "done"]


@pytest.fixture
def lines(path):
    """The lines of a ledger of three items."""
    with Ledger(path) as ledger:
        for key in "abc":
            ledger.record(key, 1, {"num_frames": 12})
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    "damaged",
    [b"\0\0\0\n", b"\n", b"5\n", b"null\n", b"{}\n", b"[]\n", b'[[], 1, "done", 5.0]\n', b"\xff\n"],
)
def test_line_of_another_kind_is_skipped(path, lines, damaged, capsys):
    path.write_bytes(lines[0] + damaged + lines[2])
    with Ledger(path) as ledger:
        assert [ledger.get(key, 1) is not None for key in "abc"] == [True, False, True]
    assert f"{path}: 1 damaged lines ignored" in capsys.readouterr().err


def test_any_flipped_byte_is_found(path, lines):
    """Also where the line stays valid JSON: 12 frames must not become 13."""
    for i in range(len(lines[1]) - 1):
        damaged = bytearray(lines[1])
        damaged[i] ^= 1
        path.write_bytes(lines[0] + damaged + lines[2])
        assert [Ledger(path).get(key, 1) is not None for key in "abc"] == [True, False, True], i


def test_fingerprint_changes_with_the_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    first = file_fingerprint(file)
    assert first[0] == 3
    file.write_bytes(b"abcd")
    assert file_fingerprint(file) != first


def test_shards_write_own_files_and_read_all(path):
    with Ledger(path, shard="0-of-2") as first, Ledger(path, shard="1-of-2") as second:
        first.record("a", 1, "old")
        second.record("b", 1, "done")
        second.record("a", 2, "new")
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "ledger.jsonl.0-of-2",
        "ledger.jsonl.1-of-2",
    ]
    for shard in [None, "0-of-2", "2-of-3"]:
        ledger = Ledger(path, shard=shard)
        assert ledger.get("b", 1) == "done"
        # The latest line counts, in any file.
        assert ledger.get("a", 1) is None
        assert ledger.last("a") == (2, "new")


def test_second_run_waits_for_the_first(path, capsys):
    found = []

    def second_run():
        with Ledger(path) as ledger:
            found.append(ledger.get("a", 1))

    with Ledger(path) as first:
        thread = threading.Thread(target=second_run)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        first.record("a", 1, "done")
    thread.join(10)
    assert found == ["done"]
    assert f"waiting for another run to release {path}" in capsys.readouterr().err


def test_file_system_without_locks(path, monkeypatch):
    def refuse(code):
        def flock(file, operation):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("i3d_gn.files.fcntl.flock", flock)

    refuse(errno.ENOSYS)
    with Ledger(path) as ledger:
        ledger.record("a", 1, "done")
    assert Ledger(path).get("a", 1) == "done"
    refuse(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), Ledger(path):
        pass


def test_reading_does_not_write(path):
    Ledger(path).get("a", 1)
    assert not path.parent.exists()
