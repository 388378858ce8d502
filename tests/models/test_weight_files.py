"""Files that are damaged, foreign or hostile are refused with one line, and never run."""

import os
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from i3d_gn.models.weight_files import read_weight_file, write_safetensors
from i3d_gn.models.weights import read_weights


class Runs:
    """Pickles to a call."""

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


def test_the_first_bytes_tell_the_format(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    torch.save(tensors, tmp_path / "1")
    torch.save(tensors, tmp_path / "2", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors, tmp_path / "3", metadata={"k": "v"})
    for protocol in (0, 2, 4):
        content = pickle.dumps({"blobs": {"a": np.arange(3.0), "lr": 0.1}}, protocol)
        (tmp_path / f"p{protocol}.pkl").write_bytes(content)
        assert read_weight_file(tmp_path / f"p{protocol}.pkl")[0]["a"].tolist() == [0, 1, 2]
    for name in "123":
        content, metadata = read_weight_file(tmp_path / name)
        assert content["a"].tolist() == [0, 1, 2]
        assert metadata == ({"k": "v"} if name == "3" else {})


def test_scalars_and_python2_strings(write_python2_pickle, tmp_path):
    blobs = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "lr": np.float32(0.25)}
    write_python2_pickle(tmp_path / "w.pkl", blobs)
    content, _ = read_weight_file(tmp_path / "w.pkl")
    assert np.array_equal(content["x"], blobs["x"])
    assert content["lr"] == 0.25
    assert b"numpy.core.multiarray" in (tmp_path / "w.pkl").read_bytes()


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
def test_a_pickle_that_calls_anything_is_refused_by_name(
    content, name, protocol, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    assert name in refusal(path)
    assert not (tmp_path / "ran").exists()


def test_arrays_of_objects_and_odd_contents_are_refused(tmp_path):
    path = tmp_path / "w.pkl"
    for content, line in (
        ({"x": np.array([{}, []], dtype=object)}, "x is an array of object"),
        ([1, 2], "a pickle of list"),
        ({1: np.zeros(2)}, "not of Caffe2 blobs by name"),
    ):
        path.write_bytes(pickle.dumps(content, 2))
        assert line in refusal(path)
    path.write_bytes(b"\x80\x02U\x01xQ.")  # a persistent id
    assert "objects outside it" in refusal(path)


def test_every_truncation_is_one_line(tmp_path):
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
    tensors = {"layer1.0.conv1.weight": torch.zeros(1)}
    for text in ("{", "{}", '{"mean": null, "std": null, "colour": 3}'):
        write_safetensors(tmp_path / "w", tensors, {"i3d_gn": text})
        with pytest.raises(ValueError, match=r"convert the original again"):
            read_weights(tmp_path / "w")
