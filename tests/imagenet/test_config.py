"""The commands in docs/reproduce.md run the experiments of [GN], section 4.1."""

import functools
import re
from pathlib import Path

import pytest
import torch

from i3d_gn.engine.typed_config import to_dict
from i3d_gn.imagenet.build import build_model
from i3d_gn.imagenet.config import load_imagenet_config

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted(REPOSITORY.glob("configs/imagenet/*.yaml"))

# (column before the command, config, overrides) of every table row that ends in a command.
ROWS = [
    (cells.rpartition("|")[2].strip(), config, tuple(overrides.split()))
    for cells, config, overrides in re.findall(
        r"^\|(.+) \| `i3d-gn train-imagenet (\S+)(.*)` \|$",
        (REPOSITORY / "docs" / "reproduce.md").read_text(),
        flags=re.MULTILINE,
    )
]

# From [GN] (Wu & He, arXiv:1803.08494): name of the output folder -> validation error (%), and the
# values that differ from those in RECIPE.
PAPER: dict[str, tuple[str, dict]] = {
    # Table 1
    "bn_32": ("23.6", {"model.norm": "bn"}),
    "ln_32": ("25.3", {"model.norm": "ln"}),
    "in_32": ("28.4", {"model.norm": "in"}),
    "gn_32": ("24.1", {"model.norm": "gn"}),
    # Table 2
    "bn_16": ("23.7", {"model.norm": "bn", "train.images_per_gpu": 16}),
    "bn_8": ("24.8", {"model.norm": "bn", "train.images_per_gpu": 8}),
    "bn_4": ("27.3", {"model.norm": "bn", "train.images_per_gpu": 4}),
    "bn_2": ("34.7", {"model.norm": "bn", "train.images_per_gpu": 2}),
    "gn_16": ("24.2", {"model.norm": "gn", "train.images_per_gpu": 16}),
    "gn_8": ("24.0", {"model.norm": "gn", "train.images_per_gpu": 8}),
    "gn_4": ("24.2", {"model.norm": "gn", "train.images_per_gpu": 4}),
    "gn_2": ("24.1", {"model.norm": "gn", "train.images_per_gpu": 2}),
    # Table 3
    "gn_32_groups64": ("24.6", {"model.norm": "gn", "model.num_groups": 64}),
    "gn_32_groups16": ("24.6", {"model.norm": "gn", "model.num_groups": 16}),
    "gn_32_groups8": ("24.4", {"model.norm": "gn", "model.num_groups": 8}),
    "gn_32_groups4": ("24.6", {"model.norm": "gn", "model.num_groups": 4}),
    "gn_32_groups2": ("24.7", {"model.norm": "gn", "model.num_groups": 2}),
    "gn_32_channels64": ("24.4", {"model.norm": "gn", "model.channels_per_group": 64}),
    "gn_32_channels32": ("24.5", {"model.norm": "gn", "model.channels_per_group": 32}),
    "gn_32_channels16": ("24.2", {"model.norm": "gn", "model.channels_per_group": 16}),
    "gn_32_channels8": ("24.3", {"model.norm": "gn", "model.channels_per_group": 8}),
    "gn_32_channels4": ("24.8", {"model.norm": "gn", "model.channels_per_group": 4}),
    "gn_32_channels2": ("25.6", {"model.norm": "gn", "model.channels_per_group": 2}),
    # Batch Renorm, ResNet-101
    "brn_4": (
        "26.3",
        {"model.norm": "brn", "model.r_max": 1.5, "model.d_max": 0.5, "train.images_per_gpu": 4},
    ),
    "resnet101_bn_32": ("22.0", {"model.name": "resnet101", "model.norm": "bn"}),
    "resnet101_bn_2": (
        "31.9",
        {"model.name": "resnet101", "model.norm": "bn", "train.images_per_gpu": 2},
    ),
    "resnet101_gn_32": ("22.4", {"model.name": "resnet101", "model.norm": "gn"}),
    "resnet101_gn_2": (
        "23.0",
        {"model.name": "resnet101", "model.norm": "gn", "train.images_per_gpu": 2},
    ),
    # Fig. 6; errors from tensorpack's examples/ImageNetModels, which has the code of it
    "vgg16_bn": ("28", {"model.name": "vgg16", "model.norm": "bn", "train.lr": 0.01}),
    "vgg16_gn": ("27.6", {"model.name": "vgg16", "model.norm": "gn", "train.lr": 0.01}),
    "vgg16_none": ("29 to 30", {"model.name": "vgg16", "model.norm": "none", "train.lr": 0.01}),
}

# "Implementation details" of section 4.1, and fb.resnet.torch, which it follows.
RECIPE = {
    "seed": 0,
    "model.name": "resnet50",
    "model.num_classes": 1000,
    "model.zero_init_last_norm": True,
    "model.kernel_norm": None,
    "data.train_folder": "data/imagenet/train",
    "data.val_folder": "data/imagenet/val",
    "data.mean": [0.485, 0.456, 0.406],
    "data.std": [0.229, 0.224, 0.225],
    "data.crop_size": 224,
    "data.area_min": 0.08,
    "data.val_short_side": 256,
    "train.epochs": 100,
    "train.images_per_gpu": 32,
    "train.num_gpus": 8,
    "train.lr": 0.1,
    "train.lr_batch_size": 256,
    "train.milestones": [30, 60, 90],
    "train.momentum": 0.9,
    "train.nesterov": True,
    "train.weight_decay": 1e-4,
    "train.norm_weight_decay": 1e-4,
    "train.precision": "fp32",
}


def flat_values(config):
    flat = {}
    for key, value in to_dict(config).items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[key] = value
    return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}


@functools.cache
def load(config, overrides):
    return load_imagenet_config(REPOSITORY / config, overrides)


def run_name(row):
    _, config, overrides = row
    return Path(load(config, overrides).output_dir).name


@pytest.mark.parametrize("row", ROWS, ids=run_name)
def test_command_in_reproduce_md_is_the_papers_experiment(row, tmp_path):
    error, config, overrides = row
    name = run_name(row)
    paper_error, differs = PAPER[name]
    assert error == paper_error
    # Keys that neither the paper nor the command mention keep their defaults.
    minimal = tmp_path / "minimal.yaml"
    minimal.write_text("output_dir: out\ndata: {train_folder: a, val_folder: b}\n")
    expected = flat_values(load_imagenet_config(minimal)) | RECIPE | differs
    expected["output_dir"] = f"runs/imagenet/{name}"
    assert flat_values(load(config, overrides)) == expected


def test_defaults_are_the_papers_recipe(tmp_path):
    minimal = tmp_path / "minimal.yaml"
    minimal.write_text(
        "output_dir: out\ndata: {train_folder: data/imagenet/train, val_folder: data/imagenet/val}"
    )
    defaults = flat_values(load_imagenet_config(minimal))
    assert {key: defaults[key] for key in RECIPE} == RECIPE


def test_reproduce_md_has_one_command_per_cell():
    names = [run_name(row) for row in ROWS]
    assert len(names) == 31
    assert sorted(names) == sorted(PAPER)


def test_every_recipe_is_used_in_reproduce_md():
    used = {config for _, config, _ in ROWS} | {"configs/imagenet/imagenette_tiny.yaml"}
    assert used == {str(path.relative_to(REPOSITORY)) for path in CONFIGS}


@pytest.mark.parametrize("row", ROWS, ids=run_name)
def test_error_in_config_header_is_the_papers(row):
    error, config, _ = row
    header = (REPOSITORY / config).read_text().partition("output_dir:")[0]
    if run_name(row).startswith("gn_32_"):
        # Table 3 is quoted as a range.
        kind = "num_groups" if "groups" in run_name(row) else "channels_per_group"
        errors = [e for e, _, o in ROWS if o and o[0].startswith(f"model.{kind}=")]
        assert f"{min(errors)} to {max(errors)} %" in header
    else:
        assert re.search(rf"(?<!\d){re.escape(error)}\b", header)


@pytest.mark.parametrize(
    "row",
    [*ROWS, ("", "configs/imagenet/imagenette_tiny.yaml", ())],
    ids=run_name,
)
def test_config_builds_on_meta(row):
    _, path, overrides = row
    config = load(path, overrides)
    with torch.device("meta"):
        model = build_model(config, torch.device("meta"))
        side = config.data.crop_size
        images = torch.empty(2 * config.train.images_per_gpu, 3, side, side)
    assert model(images).shape == (len(images), config.model.num_classes)
