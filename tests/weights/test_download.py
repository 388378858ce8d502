"""Published weights by name, from a server on this machine."""

import functools
import hashlib
import http.server
import threading
import types

import pytest
import torch
import torchvision

from i3d_gn.models import I3D
from i3d_gn.models.resnet2d import ResNet2d
from i3d_gn.weights.read import export_names, read_weights

SHALLOW = (1, 1, 1, 1)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder served over loopback, and its URL."""
    folder = tmp_path / "published"
    folder.mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_torchvision_enum_is_downloaded_and_its_hash_checked(published, monkeypatch):
    folder, url = published
    state = export_names(ResNet2d(SHALLOW, norm="bn").state_dict(), "torchvision")
    torch.save(state, folder / "new.pth")
    digest = hashlib.sha256((folder / "new.pth").read_bytes()).hexdigest()[:8]
    (folder / "new.pth").rename(folder / f"resnet50-{digest}.pth")
    (folder / "resnet50-00000000.pth").write_bytes(b"something else")

    def weight_at(name):
        return types.SimpleNamespace(url=f"{url}/{name}")

    monkeypatch.setattr(
        torchvision.models, "get_weight", lambda _: weight_at(f"resnet50-{digest}.pth")
    )
    weights = read_weights("ResNet50_Weights.IMAGENET1K_V2")
    assert weights.info.mean == (0.485, 0.456, 0.406)
    assert weights.info.std == (0.229, 0.224, 0.225)
    assert weights.info.stride_in == "3x3"
    assert torch.equal(weights.tensors["res2.0.norm1.bias"], state["layer1.0.bn1.bias"])
    # A second file goes into the same cache, and files in the cache are not downloaded again.
    torch.save({**state, "fc.bias": torch.ones(1000)}, folder / "other.pth")
    digest = hashlib.sha256((folder / "other.pth").read_bytes()).hexdigest()[:8]
    (folder / "other.pth").rename(folder / f"resnet50-{digest}.pth")
    monkeypatch.setattr(
        torchvision.models, "get_weight", lambda _: weight_at(f"resnet50-{digest}.pth")
    )
    for _ in range(2):
        weights = read_weights("ResNet50_Weights.IMAGENET1K_V1")
        assert weights.tensors["head.linear.bias"].sum() == 1000
        (folder / f"resnet50-{digest}.pth").unlink(missing_ok=True)
    for name, reason in (
        ("resnet50-00000000.pth", "invalid hash value"),
        ("missing-00000000.pth", "HTTP Error 404"),
    ):
        monkeypatch.setattr(torchvision.models, "get_weight", lambda _, name=name: weight_at(name))
        with pytest.raises(ValueError, match=rf"could not download .*{reason}.*; check the conn"):
            read_weights("ResNet50_Weights.IMAGENET1K_V2")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"no weights 'ResNet50_Weights.V9'"):
        read_weights("ResNet50_Weights.V9")


def test_pytorchvideo_zoo_is_downloaded(published, monkeypatch):
    folder, url = published
    network = I3D(SHALLOW, norm="bn", stem="8x8", pool_padding=1)
    state = export_names(network.state_dict(), "pytorchvideo")
    torch.save({"model_state": state}, folder / "I3D_8x8_R50.pyth")
    from pytorchvideo.models.hub.resnet import checkpoint_paths

    monkeypatch.setitem(checkpoint_paths, "i3d_r50", f"{url}/I3D_8x8_R50.pyth")
    weights = read_weights("pytorchvideo/i3d_r50")
    assert (weights.info.stem, weights.info.pool_padding, weights.info.mean) == (
        "8x8", 1, (0.45, 0.45, 0.45)
    )  # fmt: skip
    assert torch.equal(weights.tensors["res5.0.conv2.weight"], network.res5[0].conv2.weight)
    with pytest.raises(ValueError, match=r"use one of pytorchvideo/i3d_r50, pytorchvideo/c2d_r50"):
        read_weights("pytorchvideo/mvit_base_16x4")
