"""Damaged, foreign and hostile files are refused with a one-line message and never run."""

import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors.torch
import torch

from i3d_gn.weights.files import read_weight_file, write_safetensors
from i3d_gn.weights.info import WeightsInfo
from i3d_gn.weights.read import read_weights


class Runs:
    """Is pickled as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refusal(path):
    with pytest.raises(ValueError, match=r"\S") as error:
        read_weight_file(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_format_is_detected_from_the_first_bytes(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    torch.save(tensors, tmp_path / "1")
    torch.save(tensors, tmp_path / "2", _use_new_zipfile_serialization=False)
    info = WeightsInfo("torchvision", 2, "bn", mean=(0.1, 0.2, 0.3))
    write_safetensors(tmp_path / "3", tensors, info)
    safetensors.torch.save_file(tensors, tmp_path / "4", metadata={"k": "v"})
    for protocol in (0, 2, 4):
        content = pickle.dumps({"blobs": {"a": np.arange(3.0), "lr": 0.1}}, protocol)
        (tmp_path / f"p{protocol}.pkl").write_bytes(content)
        assert read_weight_file(tmp_path / f"p{protocol}.pkl")[0]["a"].tolist() == [0, 1, 2]
    for name in "1234":
        content, metadata = read_weight_file(tmp_path / name)
        assert content["a"].tolist() == [0, 1, 2]
        assert metadata == (info if name == "3" else None)


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_python2_pickles(write_python2_pickle, tmp_path, protocol):
    numbers = np.random.default_rng(0).normal(size=(5, 3, 2))
    blobs = {
        "single": numbers.astype(np.float32),
        "half": numbers.astype(np.float16),
        "big_endian": numbers.astype(">f4"),
        "fortran": np.asfortranarray(numbers),
        "counts": np.arange(7),
        "empty": np.zeros((0, 3)),
        "no_dimensions": np.array(0.5),
    }
    write_python2_pickle(tmp_path / "w.pkl", {**blobs, "lr": np.float32(0.25)}, protocol)
    assert b"numpy.core.multiarray" in (tmp_path / "w.pkl").read_bytes()
    content, _ = read_weight_file(tmp_path / "w.pkl")
    assert content.pop("lr") == 0.25
    assert content.keys() == blobs.keys()
    for name, array in blobs.items():
        assert content[name].dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(content[name], array), name


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Runs(os.system, "touch ran"), f"{os.system.__module__}.system"),
        (Runs(eval, "open('ran', 'w')"), ".eval"),
        ({"blobs": {"x": Runs(os.mkdir, "ran")}}, f"{os.mkdir.__module__}.mkdir"),
        ({"x": torch.zeros(2)}, "torch._utils._rebuild_tensor_v2"),
        ({"x": slice(3)}, ".slice"),
        (Runs(np.load, "ran"), ".load"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickle_with_a_call_is_refused_by_name(content, name, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    assert name in refusal(path)
    assert not (tmp_path / "ran").exists()


def test_pickle_of_objects_is_refused(tmp_path):
    path = tmp_path / "w.pkl"
    for content, line in (
        ({"x": np.array([{}, []], dtype=object)}, "an array of 'O8', which is refused"),
        ({"x": [np.array(["text"])]}, "an array of 'U4', which is refused"),
        ({"x": np.zeros(2, [("a", "f4"), ("b", "O")])}, "an array of 'V12', which is refused"),
        ([1, 2], "contains a list, not a dictionary of Caffe2 blobs"),
        ({1: np.zeros(2)}, "not a dictionary of Caffe2 blobs"),
    ):
        path.write_bytes(pickle.dumps(content, 2))
        assert line in refusal(path)
    path.write_bytes(b"\x80\x02U\x01xQ.")  # a persistent id
    assert "objects outside it" in refusal(path)


def name_of(module, name):
    return b"c" + f"{module}\n{name}\n".encode()


@pytest.mark.parametrize(
    ("program", "line"),
    [
        # getattr(__import__("os"), "system")("touch ran"), and other ways to reach a function
        (
            name_of("__builtin__", "getattr")
            + b"("
            + name_of("__builtin__", "__import__")
            + b"(U\x02ostRU\x06systemtR(U\ttouch rantR",
            "__builtin__.getattr, which is refused",
        ),
        (
            name_of("numpy.core.multiarray", "_reconstruct.__globals__"),
            "__globals__, which is refused",
        ),
        (b"(U\ttouch ranios\nsystem\n", "os.system, which is refused"),
        (b"\x8c\x02os\x8c\x06system\x93U\ttouch ran\x85R", "os.system, which is refused"),
        (b"\x82\x01", "unregistered extension code 1"),
        # An array with a shape and no bytes would expose uninitialized memory.
        (name_of("numpy", "ndarray") + b"(J\xff\xff\xff\x0ftR", "takes no arguments"),
        (name_of("numpy", "ndarray") + b")\x81", "cannot be read"),
        # State that would replace methods of the objects read.
        (name_of("collections", "OrderedDict") + b")R}U\x05itemsK\x01sb", "no attribute"),
        # A dtype whose state marks its numbers as object references.
        (
            name_of("numpy.core.multiarray", "_reconstruct")
            + b"("
            + name_of("numpy", "ndarray")
            + b"K\x00\x85U\x01btR(K\x01K\x01\x85"
            + name_of("numpy", "dtype")
            + b"(U\x02O8K\x00K\x01tR",
            "an array of 'O8', which is refused",
        ),
        (
            name_of("numpy.core.multiarray", "scalar")
            + b"("
            + name_of("numpy", "dtype")
            + b"(U\x02f8K\x00K\x01tRU\x02abtR",
            "cannot be read",
        ),
    ],
)
def test_hostile_programs(program, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pkl"
    path.write_bytes(b"\x80\x02}U\x01x" + program + b"s.")
    assert line in refusal(path)
    path.write_bytes(b"\x80\x02" + program + b".")
    refusal(path)
    assert not (tmp_path / "ran").exists()


def test_dtype_state_changes_the_byte_order_only(tmp_path):
    """The state of a dtype is version, byte order, ..., flags; 63 would mean objects."""
    state = b"(K\x03U\x01>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb"
    for copies in (0, 1):
        program = name_of("numpy", "dtype") + b"(U\x02f8K\x00" + bytes([75, copies]) + b"tR" + state
        (tmp_path / "w.pkl").write_bytes(b"\x80\x02}U\x01x" + program + b"s.")
        read_weight_file(tmp_path / "w.pkl")
        assert np.dtype("f8").isnative
        assert not np.dtype("f8").hasobject


def test_high_memo_index_allocates_no_memory(tmp_path):
    path = tmp_path / "w.pkl"
    path.write_bytes(b"\x80\x02}r" + struct.pack("<I", 1 << 24) + b"U\x01xK\x01s.")
    tracemalloc.start()
    try:
        assert read_weight_file(path) == ({"x": 1}, None)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_file_with_a_call_is_refused_by_name(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    for content, name in (
        ({"x": Runs(os.system, "touch ran")}, f"{os.system.__module__}.system"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ):
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        line = refusal(path)
        assert f"calls {name}, which is refused" in line
        assert "weights_only" not in line  # torch advises weights_only=False
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", ["pth", "pkl", "safetensors", "bin"])
def test_not_a_weight_file(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    reason = "no such file or directory; give the path of a weight file"
    assert refusal(path) == f"weights {path}: {reason}"
    path.write_text("<!DOCTYPE html><html><body>404: Not Found</body></html>")
    assert "it is a web page" in refusal(path)
    path.write_text('{"error": "rate limit exceeded"}')
    assert "cannot be read" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "is a directory" in refusal(path)


def test_unwritable_path(tmp_path):
    tensors, info = {"a": torch.zeros(1)}, WeightsInfo("x", 2, "bn")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "file" / "w"):
        with pytest.raises(ValueError, match=r"cannot be written .*; give the path") as error:
            write_safetensors(path, tensors, info)
        assert "\n" not in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_truncated_files_give_one_line(tmp_path):
    tensors = {"a": torch.arange(100.0), "b": torch.arange(50.0)}
    torch.save(tensors, tmp_path / "w.pth")
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    blobs = {name: tensor.numpy() for name, tensor in tensors.items()}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(blobs, 2))
    for name in ("w.pth", "w.safetensors", "w.pkl"):
        whole = (tmp_path / name).read_bytes()
        for length in [*range(0, 40), *range(40, len(whole), len(whole) // 13), len(whole) - 1]:
            cut = tmp_path / f"cut_{name}"
            cut.write_bytes(whole[:length])
            refusal(cut)


def test_damaged_metadata(tmp_path):
    tensors = {"layer1.0.conv3.weight": torch.zeros(1)}
    for text in ("{", "{}", '{"mean": null, "std": null, "color": 3}'):
        safetensors.torch.save_file(tensors, tmp_path / "w", metadata={"i3d_gn": text})
        with pytest.raises(ValueError, match=r"convert the original again"):
            read_weights(tmp_path / "w")


def test_written_file_has_the_permissions_of_any_new_file(tmp_path):
    write_safetensors(tmp_path / "w.safetensors", {"a": torch.zeros(1)}, WeightsInfo("x", 2, "bn"))
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
