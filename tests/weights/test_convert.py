import pickle
import re
import subprocess
import sys

import pytest
import torch
from torchvision.models.resnet import Bottleneck, ResNet

from i3d_gn import cli
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.typed_config import ConfigError
from i3d_gn.models import i3d_tiny
from i3d_gn.models.inflate import load_imagenet_weights
from i3d_gn.video import build
from i3d_gn.video.train import train
from i3d_gn.weights.read import read_weights

SHALLOW = (1, 1, 1, 1)


@pytest.fixture
def plain_file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "plain.pth"
    torch.save(ResNet(Bottleneck, list(SHALLOW), num_classes=5).state_dict(), path)
    return path


def test_options_complete_the_metadata(plain_file, tmp_path, capsys):
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


def test_round_trip_to_torchvision_names_is_bit_identical(plain_file, tmp_path):
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    assert cli.main(["convert", str(plain_file), str(ours)]) == 0
    assert cli.main(["convert", str(ours), str(back), "--naming", "torchvision"]) == 0
    import safetensors.torch

    original, returned = torch.load(plain_file), safetensors.torch.load_file(back)
    assert original.keys() == returned.keys()
    assert all(torch.equal(returned[k], v) for k, v in original.items())


def test_stem_and_pool_padding_of_a_video_pickle_are_options(tmp_path):
    """PySlowFast's I3D_8x8_R50.pkl has video-nonlocal-net's names, but padded pools."""
    rules = (
        (r"^conv1\.weight", "conv1_w"), (r"^norm1\.", "res_conv1_bn."),
        (r"head\.linear\.weight", "pred_w"), (r"head\.linear\.bias", "pred_b"),
        (r"^res(\d)\.(\d)\.", r"res\1_\2_"),
        (r"_conv1\.weight", "_branch2a_w"), (r"_norm1\.", "_branch2a_bn."),
        (r"_conv2\.weight", "_branch2b_w"), (r"_norm2\.", "_branch2b_bn."),
        (r"_conv3\.weight", "_branch2c_w"), (r"_norm3\.", "_branch2c_bn."),
        (r"_shortcut_conv\.weight", "_branch1_w"), (r"_shortcut_norm\.", "_branch1_bn."),
        (r"bn\.weight", "bn_s"), (r"bn\.bias", "bn_b"),
        (r"bn\.running_mean", "bn_rm"), (r"bn\.running_var", "bn_riv"),
    )  # fmt: skip
    blobs = {}
    for own, tensor in i3d_tiny("bn", 5).state_dict().items():
        name = own
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if not name.endswith("num_batches_tracked"):
            blobs[name] = tensor.numpy()
    source, dest = tmp_path / "I3D_8x8_R50.pkl", tmp_path / "w.safetensors"
    source.write_bytes(pickle.dumps({"blobs": blobs}, 2))
    for options, stem, padding in (
        ([], "strided", 0),
        (["--stem", "8x8"], "8x8", 0),
        (["--stem", "8x8", "--pool-padding", "1"], "8x8", 1),
    ):
        assert cli.main(["convert", str(source), str(dest), *options]) == 0
        info = read_weights(dest).info
        assert (info.stem, info.pool_padding, info.inflate) == (stem, padding, True)
        assert info.mean == (0.45, 0.45, 0.45)
    load_imagenet_weights(i3d_tiny("bn", 5, stem="8x8", pool_padding=1), dest)
    with pytest.raises(ValueError, match=r"pool_padding=0 where the weights need 1"):
        load_imagenet_weights(i3d_tiny("bn", 5, stem="8x8"), dest)


def test_help_does_not_import_torch():
    program = (
        "import atexit, sys; from i3d_gn import cli;"
        "atexit.register(lambda: print('torch' in sys.modules)); cli.main(['convert', '--help'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert "--stride-in" in run.stdout
    assert run.stdout.endswith("False\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["{pickle}", "{dest}"], "os.system, which is refused"),
        (["{plain}", "{dest}", "--stem", "8x8"], "is an image network"),
        (["{plain}", "{dest}", "--pool-padding", "0"], "is an image network"),
        (["{plain}", "{dest}", "--std", "0.2", "0", "0.2"], "every value must be positive"),
        (["{plain}", "{folder}"], "cannot be written"),
        (["{folder}", "{dest}"], "is a directory"),
        (["{plain}", "{dest}", "--naming", "pytorchvideo"], "is not for image networks"),
    ],
)
def test_user_errors_are_one_line(arguments, line, plain_file, tmp_path, capsys):
    (tmp_path / "w.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    (tmp_path / "folder").mkdir()
    places = {"pickle": "w.pkl", "dest": "w", "folder": "folder", "plain": plain_file.name}
    places = {name: tmp_path / place for name, place in places.items()}
    assert cli.main(["convert", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_run_takes_mean_and_std_from_its_weights(small_run, tmp_path):
    """A checkpoint of one run is converted and starts another run."""
    source = small_run("train.steps=1", output_dir=tmp_path / "first")
    train(source, Process(0, 1, torch.device("cpu")))
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
    with pytest.raises(ConfigError, match=r"data\.mean.*0\.5, 0\.4, 0\.3.*remove data\.mean"):
        build.load_starting_weights(i3d_tiny("gn", 6), wrong)


def test_mean_and_std_default_to_imagenet(small_run):
    given = build.load_starting_weights(i3d_tiny("gn", 6), small_run())
    assert given == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
