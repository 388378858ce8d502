"""The ledger forgets nothing that was recorded and believes nothing half-written."""

import errno
import os
import threading

import pytest

from data_tools.ledger import Ledger, file_fingerprint


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "ledger.jsonl"


def test_results_survive(path):
    with Ledger(path) as ledger:
        ledger.record("-a ü.mp4", [1, {"crf": 23.0}], {"num_frames": 3})
        ledger.record("b", (1, 2), "first")
        ledger.record("b", (1, 2), "second")
        assert ledger.get("b", [1, 2]) == "second"
    with Ledger(path) as ledger:
        assert ledger.get("-a ü.mp4", [1, {"crf": 23.0}]) == {"num_frames": 3}
        assert ledger.get("b", [1, 2]) == "second"


def test_another_fingerprint_counts_as_absent(path):
    with Ledger(path) as ledger:
        ledger.record("a", [1, "crf 23"], "done")
        assert ledger.get("a", [1, "crf 24"]) is None
        assert ledger.get("b", [1, "crf 23"]) is None


@pytest.mark.parametrize("kept_bytes", [1, 10, -1])
def test_a_torn_line_is_ignored_and_repaired(path, kept_bytes):
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


def test_a_garbled_line_costs_only_itself(path):
    path.parent.mkdir()
    path.write_bytes(b'["a", 1, "done", 5.0]\n\0\0\0\n["b", 1, "done", 5.0]\n')
    with Ledger(path) as ledger:
        assert [ledger.get(key, 1) for key in "ab"] == ["done", "done"]


def test_fingerprint_follows_content_and_time(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    first = file_fingerprint(file)
    assert first[0] == 3
    file.write_bytes(b"abcd")
    assert file_fingerprint(file) != first


def test_shards_write_apart_and_know_of_each_other(path):
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
        # The latest line counts, whichever file it stands in.
        assert ledger.get("a", 1) is None
        assert ledger.last("a") == (2, "new")


def test_the_second_of_two_runs_waits_and_knows_what_the_first_did(path, capsys):
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
    assert f"waiting for the end of another run, which has {path}" in capsys.readouterr().err


def test_a_file_system_without_locks_is_no_obstacle(path, monkeypatch):
    def refuse(code):
        def flock(file, operation):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("data_tools.files.fcntl.flock", flock)

    refuse(errno.ENOSYS)
    with Ledger(path) as ledger:
        ledger.record("a", 1, "done")
    assert Ledger(path).get("a", 1) == "done"
    refuse(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), Ledger(path):
        pass


def test_reading_writes_nothing(path):
    Ledger(path).get("a", 1)
    assert not path.parent.exists()
