import pickle
from typing import ClassVar

import numpy as np
import pytest
import torch


def randomize_norms(network):
    """Random norm parameters and statistics, in place, so that swapped tensors change results."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif name.endswith("running_mean") or (tensor.dim() == 1 and name.endswith("bias")):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif tensor.dim() == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.5)
    return network.eval()


@pytest.fixture(scope="session")
def randomized():
    return randomize_norms


class _Python2Pickler(pickle._Pickler):
    """Pickles as Python 2 with NumPy 1: byte strings, numpy.core, flags as integers."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        if id(value) in self.memo:  # b"" and single bytes are shared objects
            return self.write(self.get(self.memo[id(value)][0]))
        if self.bin:
            self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        else:  # a literal, quoted and escaped, up to the end of the line
            self.write(pickle.STRING + repr(value).removeprefix("b").encode() + b"\n")
        return self.memoize(value)

    dispatch[bytes] = save_bytes

    def save_text(self, value):
        self.save_bytes(value.encode("latin1"))

    dispatch[str] = save_text

    def save_flag(self, value):
        self.save_long(int(value))

    dispatch[bool] = save_flag

    def save_global(self, obj, name=None):
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch[type(len)] = save_global
    dispatch[type(lambda: 0)] = save_global
    dispatch[type] = save_global


@pytest.fixture(scope="session")
def write_python2_pickle():
    def write(path, content, protocol=2):
        with path.open("wb") as file:
            _Python2Pickler(file, protocol).dump(content)

    return write


# Names of tensors in Caffe2, written independently of the package.
def caffe2_blob(own, norm):
    layer, tensor = own.rsplit(".", 1)
    suffix = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}.get(tensor)
    if suffix is None:
        return None
    if layer == "conv1":
        return "conv1_w"
    if layer == "norm1":
        return f"{'conv1_gn' if norm == 'gn' else 'res_conv1_bn'}_{suffix}"
    if layer == "head.linear":
        return {"weight": "pred_w", "bias": "pred_b"}[tensor]
    stage, block, name = layer.split(".")
    branch = {"1": "branch2a", "2": "branch2b", "3": "branch2c"}.get(name[-1], "branch1")
    if "conv" in name:
        return f"{stage}_{block}_{branch}_w"
    return f"{stage}_{block}_{branch}_{norm}_{suffix}"


@pytest.fixture(scope="session")
def caffe2_blobs():
    def make(state_dict, norm):
        """Blobs of our network, and what else a Caffe2 checkpoint contains."""
        blobs = {"model_iter": 450450, "lr": np.array(0.01, dtype=np.float32)}
        for own, tensor in state_dict.items():
            if name := caffe2_blob(own, norm):
                blobs[name] = tensor.numpy()
                if own.endswith("weight"):
                    blobs[f"{name}_momentum"] = np.zeros_like(tensor.numpy())
        return blobs

    return make
