import os

import pytest

from i3d_gn.files import (
    atomic_output,
    file_sha256,
    printable,
    remove_unfinished,
    write_json,
    write_text,
)


def write_half(path):
    with atomic_output(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def write_on_full_disk(path, error):
    with atomic_output(path):
        raise error


def test_output_appears_complete_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert list(path.parent.iterdir()) == []
    write_text(path, "old")
    with atomic_output(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("filename", [None, "other"])
def test_full_disk_is_reported_with_the_path(tmp_path, filename):
    path = tmp_path / "file"
    with pytest.raises(OSError, match=r"No space left on device: '.*/file'$"):
        write_on_full_disk(path, OSError(28, "Error writing bytes", filename))
    with pytest.raises(OSError, match="Input/output error"):
        write_on_full_disk(path, OSError(5, "Input/output error"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 255, "\u00fc" * 127, "x" * 160, "x" * 161])
def test_names_as_long_as_the_file_system_allows(tmp_path, name):
    with atomic_output(tmp_path / name) as temporary:
        temporary.write_text("new")
        unfinished = temporary.name
    assert (tmp_path / name).read_text() == "new"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / unfinished).touch()
    remove_unfinished(tmp_path, [name, "a/b"])
    assert (tmp_path / "a" / unfinished).exists()
    remove_unfinished(tmp_path, [f"a/{name}"])
    assert list((tmp_path / "a").iterdir()) == []
    assert (tmp_path / name).exists()


def test_escape_codes_are_printable():
    assert (
        printable("\u00fc \x1b[31m\x9b\n\u202e\udcff") == "\u00fc " + r"\x1b[31m\x9b\n\u202e\udcff"
    )


def test_json_is_readable_utf8(tmp_path):
    write_json(tmp_path / "a.json", {"name": "caf\u00e9"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "caf\u00e9"\n}\n'


def test_sha256_of_a_known_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")


@pytest.mark.timeout(20)
def test_only_regular_files_are_hashed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name, kind in [("pipe", "a pipe"), ("device", "a pipe"), (".", "a directory")]:
        with pytest.raises(OSError, match=f"{kind}.*, not a regular file"):
            file_sha256(tmp_path / name)
