import re

import pytest
import torch
from torch import nn

from i3d_gn import cli
from i3d_gn.engine.activation_memory import step_bytes
from i3d_gn.engine.checkpoint import save_checkpoint
from i3d_gn.engine.typed_config import to_dict
from i3d_gn.video import build
from i3d_gn.video.config import load_config
from i3d_gn.video.info import GPU_GIB, RESERVED_GIB, Memory, layers, memory

MEBIBYTE = 2**20


# docs/design.md of the paper's network: the figures that code and documentation agree on.
@pytest.mark.parametrize(("config", "giga"), [("gn_32x2_8clips", 32.83), ("bn_64x1_4clips", 65.66)])
def test_layers_of_the_papers_networks(config, giga):
    rows = layers(load_config(f"configs/kinetics400/{config}.yaml"))
    assert sum(row.num_parameters for row in rows) == 28_043_472
    assert sum(row.multiply_adds for row in rows) / 1e9 == pytest.approx(giga, abs=0.005)
    by_name = {row.name: row for row in rows}
    frames = 1 if "32x2" in config else 2
    assert by_name["conv1"].output_shape == (64, 16 * frames, 112, 112)
    assert by_name["conv1"].multiply_adds == 64 * 16 * frames * 112 * 112 * 3 * 5 * 7 * 7
    assert by_name["pool1"].output_shape == (64, 8 * frames, 55, 55)
    assert by_name["res3.3"].output_shape == (512, 4 * frames, 28, 28)
    assert by_name["res5.2"].output_shape == (2048, 4 * frames, 7, 7)
    assert by_name["head"].output_shape == (400,)
    assert by_name["head"].num_parameters == 819_600
    names = [row.name for row in rows]
    assert names[:4] == ["conv1", "norm1", "pool1", "res2.0"]
    assert len(names) == 3 + 3 + 1 + 4 + 6 + 3 + 1


def test_multiply_adds_grow_with_the_crop():
    config = load_config(
        "configs/kinetics400/gn_32x2_8clips.yaml", ["clip.crop_size=256", "train.precision=bf16"]
    )
    assert sum(row.multiply_adds for row in layers(config)) / 1e9 == pytest.approx(42.93, abs=0.005)


def saved_on_the_cpu(model, clips):
    """Bytes of the storages that autograd saves for backward, parameters and clips excepted."""
    known = {t.untyped_storage().data_ptr() for t in (clips, *model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(clips).sum()
    total = sum(storage.nbytes() for key, storage in saved.items() if key not in known)
    del loss
    return total


def test_saved_bytes_are_those_that_autograd_saves(small_run):
    sizes = ("clip.crop_size=64", "clip.short_side_min=64", "clip.short_side_max=72")
    config = small_run("model.norm=bn", "train.channels_last=false", "test.short_side=72", *sizes)
    model = build.build_model(config, torch.device("cpu")).train()
    expected = saved_on_the_cpu(model, torch.randn(1, 3, 8, 64, 64))
    assert memory(config, "bn").saved_per_clip == pytest.approx(expected, rel=0.02)


def test_bytes_of_a_linear_layer_are_counted_exactly():
    model = nn.Sequential(nn.Linear(100, 1000, bias=False), nn.Sigmoid()).to("meta")
    saved, peak = step_bytes(model, (2, 100), torch.float32)
    assert saved == 2 * 1000 * 4 + 4  # the result of the sigmoid, and the loss
    assert peak >= saved + 100 * 1000 * 4  # and the gradient of the weight


def test_memory_by_norm_is_that_of_the_papers_comparison():
    config = load_config("configs/kinetics400/gn_32x2_8clips.yaml", ["train.precision=bf16"])
    gn, bn = memory(config, "gn"), memory(config, "bn")
    # benchmarks/results/activation_memory.md
    assert bn.saved_per_clip / 1e6 == pytest.approx(310.5, rel=0.01)
    pytest.importorskip("triton")
    assert gn.saved_per_clip / 1e6 == pytest.approx(169.4, rel=0.01)
    assert gn.fixed > 28_043_472 * 12


def test_largest_clips_per_gpu_fills_the_memory_without_exceeding_it():
    needed = Memory("gn", 100 * MEBIBYTE, fixed=500 * MEBIBYTE, peak_per_clip=300 * MEBIBYTE)
    for gib in GPU_GIB:
        clips = needed.largest_clips_per_gpu(gib)
        free = (gib - RESERVED_GIB) * 1024 - 500
        assert clips * 300 <= free < (clips + 1) * 300
    assert needed.largest_clips_per_gpu(2) == 0


def test_info_of_a_config_and_of_its_checkpoint_agree(small_run, tmp_path, capsys):
    config = small_run()
    assert cli.main(["info", str(tmp_path / "small_run.yaml")]) == 0
    output = capsys.readouterr().out
    model = build.build_model(config, torch.device("cpu"))
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in output
    assert "| res5.0 | 512, 1, 1, 1 " in output
    assert "| frozen_bn |" in output
    contents = {"model": {}, "optimizer": {}, "config": to_dict(config), "trainer": {}}
    path = save_checkpoint(tmp_path, step=1, contents={**contents, "num_broken": 0}, keep=1)
    assert cli.main(["info", str(path)]) == 0
    assert capsys.readouterr().out == output


def test_errors_of_info_are_one_line(tmp_path, capsys):
    checkpoint = tmp_path / "x.pt"
    for arguments, error in {
        (str(checkpoint),): f"checkpoint not found: {checkpoint}",
        (str(checkpoint), "model.norm=bn"): "override 'model.norm=bn': .* whose config is fixed",
        (str(tmp_path),): f"{tmp_path} is a folder, not a checkpoint",
        ("nowhere.yaml",): "config file not found: nowhere.yaml",
    }.items():
        assert cli.main(["info", *arguments]) == 2
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1
        assert re.match(f"error: {error}", printed), printed
