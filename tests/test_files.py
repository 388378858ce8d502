import pytest

from i3d_gn.files import atomic_output, file_sha256, write_json, write_text


def write_half(path):
    with atomic_output(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


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


def test_json_is_readable_utf8(tmp_path):
    write_json(tmp_path / "a.json", {"name": "caf\u00e9"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "name": "caf\u00e9"\n}\n'


def test_sha256_of_a_known_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea")
