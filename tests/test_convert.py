import pytest
import torch
from torchvision.models.resnet import Bottleneck, ResNet

from i3d_gn import build, cli
from i3d_gn.config import ConfigError
from i3d_gn.distributed import World
from i3d_gn.models import i3d_tiny
from i3d_gn.models.weights import read_weights
from i3d_gn.train import train

SHALLOW = (1, 1, 1, 1)


@pytest.fixture
def plain_file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "plain.pth"
    torch.save(ResNet(Bottleneck, list(SHALLOW), num_classes=5).state_dict(), path)
    return path


def test_convert_states_what_the_file_does_not_tell(plain_file, tmp_path, capsys):
    dest = tmp_path / "out" / "w.safetensors"
    assert cli.main(["convert", str(plain_file), str(dest)]) == 0
    printed = capsys.readouterr().out
    assert "norm bn" in printed
    assert "stride_in 3x3" in printed
    info = read_weights(dest).info
    assert (info.mean, info.stride_in) == ((0.485, 0.456, 0.406), "3x3")
    options = ["--stride-in", "1x1", "--mean", "0.5", "0.4", "0.3", "--std", "1", "1", "1"]
    assert cli.main(["convert", str(plain_file), str(dest), *options]) == 0
    info = read_weights(dest).info
    assert (info.mean, info.std, info.stride_in) == ((0.5, 0.4, 0.3), (1.0, 1.0, 1.0), "1x1")


def test_out_again_is_bit_equal(plain_file, tmp_path):
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    assert cli.main(["convert", str(plain_file), str(ours)]) == 0
    assert cli.main(["convert", str(ours), str(back), "--naming", "torchvision"]) == 0
    import safetensors.torch

    original, returned = torch.load(plain_file), safetensors.torch.load_file(back)
    assert original.keys() == returned.keys()
    assert all(torch.equal(returned[k], v) for k, v in original.items())


def test_a_mistake_is_one_line(tmp_path, capsys):
    (tmp_path / "w.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert cli.main(["convert", str(tmp_path / "w.pkl"), str(tmp_path / "w")]) == 2
    error = capsys.readouterr().err
    assert "os.system, refused" in error
    assert error.count("\n") == 1


def test_a_run_takes_mean_and_deviation_from_its_weights(small_run, tmp_path):
    """Weights of a run start another: the checkpoint is read as any other file."""
    source = small_run("train.steps=1", output_dir=tmp_path / "first")
    train(source, World(0, 1, torch.device("cpu")))
    checkpoint = tmp_path / "first" / "checkpoints" / "step_00000001.pt"
    assert read_weights(checkpoint).info.norm == "gn"
    converted = tmp_path / "w.safetensors"
    means = ["--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.2", "0.2"]
    assert cli.main(["convert", str(checkpoint), str(converted), *means]) == 0

    config = small_run(f"model.weights={converted}")
    model = i3d_tiny("gn", 6)
    assert build.load_starting_weights(model, config) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    saved = torch.load(checkpoint)["model"]
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())

    wrong = small_run(f"model.weights={converted}", "data.mean=[0.485,0.456,0.406]")
    with pytest.raises(ConfigError, match=r"data\.mean.*0\.5, 0\.4, 0\.3.*leave data\.mean out"):
        build.load_starting_weights(i3d_tiny("gn", 6), wrong)


def test_without_weights_imagenet_s_mean(small_run):
    given = build.load_starting_weights(i3d_tiny("gn", 6), small_run())
    assert given == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
