"""A download gives the exact bytes of the file, or a reason and no file."""

import base64
import hashlib
import os

import pytest

from data_tools.http_download import download
from data_tools.processes import ItemFailure

CONTENT = bytes(range(256)) * 4096 + b"the end"  # 1 MiB


@pytest.fixture
def server(http_server):
    (http_server.folder / "a.bin").write_bytes(CONTENT)
    return http_server


def run_download(server, path, **options):
    options = {"attempts": 4, "stall_seconds": 30.0, "first_wait_seconds": 0.01, **options}
    return download(f"{server.url}/a.bin", path, **options)


def test_download(server, tmp_path):
    path = tmp_path / "new" / "a.bin"
    assert run_download(server, path).checked == "md5"
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == ["a.bin"]
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("faults", "requests"),
    [
        ([("drop", 300_000)], [(0, None), (299_999, None)]),
        ([("drop", 300_000), ("drop", 0), ("drop", 200_000)], None),
        ([("status", 500), ("status", 503), ("status", 429)], [(0, None)] * 4),
        ([("status", 403)], [(0, None)] * 2),
        ([("stall", 300_000)], [(0, None), (299_999, None)]),
        ([("length", 5000)], None),
        ([("flip", 700_000)], [(0, None), (0, None)]),
        ([("drop", 300_000), ("no_ranges", 0)], None),
        ([("drop", 300_000), ("shifted_range", 10)], None),
    ],
)
def test_temporary_faults(server, tmp_path, faults, requests):
    server.faults["a.bin"] = faults
    options = {"stall_seconds": 2.0} if faults[0][0] == "stall" else {}
    done = run_download(server, tmp_path / "a.bin", **options)
    assert (done.num_bytes, done.checked) == (len(CONTENT), "md5")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    if requests is not None:
        assert [(first or 0, last) for _, first, last in server.requests] == requests


@pytest.mark.parametrize(
    ("fault", "num_requests", "reason"),
    [
        (("status", 404), 2, "HTTP 404"),
        (("status", 403), 2, "HTTP 403"),
        (("status", 500), 4, "HTTP 500"),
        (("drop", 0), 4, "gave up after 4 attempts"),
        (("stall", 0), 4, "the server stalled"),
        (("drop", 1), 4, "closed at byte 1 of"),
    ],
)
def test_permanent_faults(server, tmp_path, fault, num_requests, reason):
    server.faults["a.bin"] = [fault] * 20
    options = {"stall_seconds": 0.3} if fault[0] == "stall" else {}
    with pytest.raises(ItemFailure, match=reason):
        run_download(server, tmp_path / "a.bin", **options)
    assert not (tmp_path / "a.bin").exists()
    assert len(server.requests) == num_requests


def test_retry_after_header(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("data_tools.http_download.time.sleep", waits.append)
    server.faults["a.bin"] = [("busy", 7), ("status", 500)]
    run_download(server, tmp_path / "a.bin", first_wait_seconds=1.0)
    assert waits[0] == 7
    assert 1 <= waits[1] <= 3  # twice the first wait, with 50 % jitter


def test_later_run_resumes(server, tmp_path):
    server.faults["a.bin"] = [("drop", 500_000), *[("status", 500)] * 3]
    with pytest.raises(ItemFailure):
        run_download(server, tmp_path / "a.bin")
    server.requests.clear()
    run_download(server, tmp_path / "a.bin")
    assert server.requests == [("a.bin", 499_999, None)]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_file_that_changed_on_the_server_is_downloaded_again(server, tmp_path):
    server.faults["a.bin"] = [("drop", 500_000), *[("status", 500)] * 3]
    with pytest.raises(ItemFailure):
        run_download(server, tmp_path / "a.bin")
    changed = CONTENT[::-1]
    (server.folder / "a.bin").write_bytes(changed)
    run_download(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == changed


def test_server_that_ignores_if_range_does_not_mix_versions(server, tmp_path):
    """The size is equal and the ETags are not MD5s, so nothing else can tell."""
    server.headers = {"ETag": '"first"'}
    server.faults["a.bin"] = [("drop", 500_000), *[("status", 500)] * 3, ("no_if_range", 0)]
    with pytest.raises(ItemFailure):
        run_download(server, tmp_path / "a.bin")
    server.headers = {"ETag": '"second"'}
    changed = CONTENT[::-1]
    (server.folder / "a.bin").write_bytes(changed)
    assert run_download(server, tmp_path / "a.bin").checked == "size"
    assert (tmp_path / "a.bin").read_bytes() == changed


def test_version_of_a_resumed_file_from_elsewhere_is_recorded(server, tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT[:1000])
    server.headers = {"ETag": '"first"'}
    server.faults["a.bin"] = [("drop", 500_000), *[("status", 500)] * 3]
    with pytest.raises(ItemFailure):
        run_download(server, tmp_path / "a.bin")
    server.headers = {"ETag": '"second"'}
    (server.folder / "a.bin").write_bytes(CONTENT[::-1])
    run_download(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("have", [CONTENT, CONTENT[:1000], CONTENT + b"more", b"x" * 1000])
def test_existing_file_is_checked_and_completed(server, tmp_path, have):
    (tmp_path / "a.bin").write_bytes(have)
    assert run_download(server, tmp_path / "a.bin").checked == "md5"
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    if have == CONTENT:
        assert server.requests == [("a.bin", len(CONTENT) - 1, None)]


def test_check_depends_on_headers(server, tmp_path):
    md5 = hashlib.md5(CONTENT).digest()
    half = 2**20
    parts = [hashlib.md5(CONTENT[i : i + half]).digest() for i in (0, half)]
    multipart = hashlib.md5(b"".join(parts)).hexdigest() + "-2"
    for headers, checked, num_requests in [
        ({"ETag": "-"}, "size", 1),
        ({"ETag": f'"{multipart}"'}, "md5", 1),
        ({"ETag": '"' + "0" * 32 + '-2"'}, "size", 1),
        ({"ETag": "-", "Content-MD5": base64.b64encode(md5).decode()}, "md5", 1),
        (
            {"ETag": "-", "x-goog-hash": f"crc32c=AAAA,md5={base64.b64encode(md5).decode()}"},
            "md5",
            1,
        ),
        # It looks like an MD5, but two downloads agree, so it is something else.
        ({"ETag": '"' + "0" * 32 + '"'}, "size", 2),
    ]:
        server.headers, server.requests[:] = headers, []
        path = tmp_path / "a.bin"
        assert run_download(server, path).checked == checked
        assert len(server.requests) == num_requests
        path.unlink()
    server.headers = {"ETag": "-", "Content-MD5": base64.b64encode(b"\0" * 16).decode()}
    with pytest.raises(ItemFailure, match="the server sent 0000"):
        run_download(server, path)
    assert not path.exists()


def test_two_processes_download_the_same_file(server, tmp_path):
    """The second process waits and finds the file of the first."""
    import subprocess
    import sys

    server.faults["a.bin"] = [("slow", 0)]
    code = (
        "from pathlib import Path; from data_tools.http_download import download;"
        f"download({server.url + '/a.bin'!r}, Path({str(tmp_path / 'a.bin')!r}), attempts=2,"
        "stall_seconds=20.0)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], env=os.environ) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert sorted(first or 0 for _, first, _ in server.requests) == [0, len(CONTENT) - 1]
