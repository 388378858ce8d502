"""Files of torch.save: read without running code, refused when damaged or oversized."""

import argparse
import os
import pathlib
import random
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from i3d_gn.weights.files import read_weight_file

STATE = {"a": torch.arange(1000.0), "b": torch.arange(7)}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(STATE, path)
    return path


def refusal(path):
    with pytest.raises(ValueError, match=r"\S") as error:
        read_weight_file(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    # torch advises weights_only=False, with which "this file can still be loaded".
    assert "weights_only" not in message
    assert "still be loaded" not in message
    return message


def is_state(content):
    return content.keys() == STATE.keys() and all(torch.equal(content[k], STATE[k]) for k in STATE)


def rewrite(path, *, compression=zipfile.ZIP_STORED, add=(), remove=()):
    """Write the archive again with other members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in {**members, **dict(add)}.items():
            if not name.endswith(tuple(remove)):
                archive.writestr(name, data)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "extra",
    [
        argparse.Namespace(lr=0.1, steps=[1, 2]),
        np.float64(0.5),
        np.int64(3),
        np.bool_(True),
        np.str_("resnet50"),
        np.arange(5.0),
        pathlib.Path("runs"),
        argparse.Namespace(out=pathlib.Path("runs"), best=np.float32(0.5)),
    ],
    ids=repr,
)
def test_scripts_arguments_and_numpy_objects_are_ignored(tmp_path, extra, legacy):
    path = tmp_path / "w.pth"
    content = {"model": STATE, "extra": [extra, {"again": extra}]}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert is_state(read_weight_file(path)[0]["model"])


def test_code_inside_ignored_objects_is_refused(tmp_path, monkeypatch):
    class Runs:
        def __reduce__(self):
            return os.system, ("touch ran",)

    monkeypatch.chdir(tmp_path)
    torch.save({"model": STATE, "args": argparse.Namespace(x=Runs())}, tmp_path / "w.pth")
    assert f"calls {os.system.__module__}.system, which is refused" in refusal(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_every_byte_flip_is_refused_or_harmless(saved, tmp_path):
    """torch.load compares no checksums, so that flips in tensor data change weights."""
    whole = saved.read_bytes()
    damaged = tmp_path / "damaged.pth"
    rng = random.Random(0)
    refused = 0
    for position in sorted(rng.sample(range(len(whole)), 150)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << rng.randrange(8)
        damaged.write_bytes(flipped)
        try:
            content, _ = read_weight_file(damaged)
        except ValueError:
            refusal(damaged)
            refused += 1
        else:
            assert is_state(content), position
    assert refused > 75


def test_damaged_tensor_is_named(saved):
    whole = bytearray(saved.read_bytes())
    whole[whole.index(STATE["a"].numpy().tobytes()) + 3999] ^= 1
    saved.write_bytes(whole)
    assert "damaged: the checksum of w/data/0 is wrong" in refusal(saved)


def test_files_without_checksums_load(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert is_state(read_weight_file(tmp_path / "w.pth")[0])


def test_zip_bomb_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"layer1.0.conv3.weight": torch.zeros(10_000_000)}, path)
    rewrite(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    assert "unpack to 4000" in refusal(path)


def test_torchscript_is_refused_with_its_name(saved):
    rewrite(saved, add=[("w/constants.pkl", b"\x80\x02).")])
    assert "are a TorchScript archive" in refusal(saved)


def test_other_zip_archives_are_refused(saved, tmp_path):
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    assert "are a zip archive that torch.save did not write" in refusal(tmp_path / "w.npz")
    rewrite(saved, remove=["data.pkl"])
    assert "are a zip archive that torch.save did not write" in refusal(saved)


def test_other_formats_never_give_torch_s_advice(saved, tmp_path):
    (tmp_path / "w.csv").write_text("path,label\na.mp4,0\n")
    (tmp_path / "w.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        archive.add(saved, "w.pth")
    for name in ("w.csv", "w.h5", "w.tar"):
        assert "expected a state dict saved by torch.save" in refusal(tmp_path / name)
    assert "(damaged, or of another format);" in refusal(tmp_path / "w.csv")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    os.truncate(tmp_path / "old.pth", 600)
    assert "(damaged, or" not in refusal(tmp_path / "old.pth")  # torch's reason instead


def test_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "w.pth")
    assert "not a regular file" in refusal(tmp_path / "w.pth")
