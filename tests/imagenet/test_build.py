"""Every config key reaches the object that it describes."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from i3d_gn.engine.distributed import Process
from i3d_gn.engine.loop import TrainingLoop
from i3d_gn.imagenet.config import ImagenetConfig, load_imagenet_config
from i3d_gn.imagenet.train import ImageTraining
from i3d_gn.models.blocks import Bottleneck
from i3d_gn.norm import BatchRenorm, SplitBatchNorm

CPU = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of two classes: 32 and 16 images of noise, 40 x 40."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def make_loop(folders, tmp_path):
    """Makes the training loop of a small run; arguments are overrides."""

    folders_used = itertools.count()

    def make(*overrides):
        output_dir = tmp_path / f"run{next(folders_used)}"
        path = tmp_path / "small.yaml"
        path.write_text(f"""
output_dir: {output_dir}
model: {{name: resnet_tiny, num_classes: 2, norm: bn}}
data: {{train_folder: {folders}/train, val_folder: {folders}/val, num_workers: 0, crop_size: 32,
        val_short_side: 36}}
train: {{epochs: 3, images_per_gpu: 2, num_gpus: 4, lr_batch_size: 8, milestones: [2]}}
""")
        config = load_imagenet_config(path, overrides)
        task = ImageTraining(config, CPU)
        return TrainingLoop(
            task, task.recipe, config=config, seed=config.seed, output_dir=output_dir
        )

    return make


def layers(loop, kind):
    return [module for module in loop.model.modules() if isinstance(module, kind)]


def images(loop):
    return loop.task.training_batches(0).dataset


def validated(loop):
    """Losses of the validation, which depend on how its images are cropped."""
    lines = []

    class Log:
        def write(self, _kind, _step, values):
            lines.append(values["loss"])

    loop.task.validate(loop.model, loop.task.steps_per_epoch, Log())
    return lines[0]


# key -> (overrides, what to look at, expected); the defaults of `make_loop` differ from it.
KEYS = {
    "seed": (["seed=7"], lambda b: (images(b).seed, b.trainer.seed), (7, 7)),
    "model.name": (
        ["model.name=resnet50", "train.epochs=1"], lambda b: len(layers(b, Bottleneck)), 16
    ),
    "model.norm": (["model.norm=gn"], lambda b: len(layers(b, nn.GroupNorm)), 17),
    "model.num_groups": (
        ["model.norm=gn", "model.num_groups=4"],
        lambda b: {m.num_groups for m in layers(b, nn.GroupNorm)}, {4},
    ),
    "model.channels_per_group": (
        ["model.norm=gn", "model.channels_per_group=16"],
        lambda b: {m.num_channels // m.num_groups for m in layers(b, nn.GroupNorm)}, {16},
    ),
    "model.r_max": (
        ["model.norm=brn", "model.r_max=1.5"],
        lambda b: {m.r_max for m in layers(b, BatchRenorm)}, {1.5},
    ),
    "model.d_max": (
        ["model.norm=brn", "model.d_max=0.5"],
        lambda b: {m.d_max for m in layers(b, BatchRenorm)}, {0.5},
    ),
    "model.kernel_norm": (
        ["model.kernel_norm=weight_standardization"],
        lambda b: sum(type(m).__name__ == "WeightStandardization" for m in b.model.modules()), 17,
    ),
    "model.zero_init_last_norm": (
        ["model.zero_init_last_norm=false"],
        lambda b: b.model.res2[0].norm3.weight.unique().tolist(), [1.0],
    ),
    "data.num_workers": (
        ["data.num_workers=1"], lambda b: b.task.training_batches(0).num_workers, 1
    ),
    "data.mean": (
        ["data.mean=[0.1,0.2,0.3]"],
        lambda b: (b.task.to_device.mean, b.task.state()["input"]["mean"]),
        ((0.1, 0.2, 0.3), [0.1, 0.2, 0.3]),
    ),
    "data.std": (
        ["data.std=[0.4,0.5,0.6]"],
        lambda b: (b.task.to_device.std, b.task.state()["input"]["std"]),
        ((0.4, 0.5, 0.6), [0.4, 0.5, 0.6]),
    ),
    "data.crop_size": (
        ["data.crop_size=34"], lambda b: next(iter(b.task.training_batches(0))).inputs.shape[1], 34
    ),
    "data.area_min": (
        ["data.area_min=0.5"], lambda b: images(b).transform.transforms[0].scale[0], 0.5
    ),
    "train.epochs": (["train.epochs=4"], lambda b: b.recipe.steps, 16),
    "train.images_per_gpu": (
        ["train.images_per_gpu=4", "train.num_gpus=2"],
        lambda b: {m.stats_batch_size for m in layers(b, SplitBatchNorm)}, {4},
    ),
    "train.num_gpus": (["train.num_gpus=8"], lambda b: b.recipe.global_batch_size, 16),
    "train.images_per_forward": (
        ["train.images_per_forward=2"],
        lambda b: (b.trainer.micro_batches, b.task.micro_batch_size), (4, 2),
    ),
    "train.lr": (["train.lr=0.5"], lambda b: b.recipe.lr, 0.5),
    "train.lr_batch_size": (["train.lr_batch_size=16"], lambda b: b.recipe.lr_batch_size, 16),
    "train.milestones": (["train.milestones=[1]"], lambda b: b.recipe.milestones, (4,)),
    "train.momentum": (
        ["train.momentum=0.8"], lambda b: b.optimizer.param_groups[0]["momentum"], 0.8
    ),
    "train.nesterov": (
        ["train.nesterov=false"], lambda b: b.optimizer.param_groups[0]["nesterov"], False
    ),
    "train.weight_decay": (
        ["train.weight_decay=0.5"], lambda b: b.optimizer.param_groups[0]["weight_decay"], 0.5
    ),
    "train.norm_weight_decay": (
        ["train.norm_weight_decay=0.5"], lambda b: b.optimizer.param_groups[1]["weight_decay"], 0.5
    ),
    "train.precision": (
        ["train.precision=fp16"],
        lambda b: (b.trainer.scaler.is_enabled(), b.task.to_device.precision), (True, "fp16"),
    ),
    "train.channels_last": (
        ["train.channels_last=false"],
        lambda b: b.model.res3[0].conv2.weight.is_contiguous(), True,
    ),
    "train.compile": (
        ["train.compile=true"], lambda b: b.model._compiled_call_impl is not None, True
    ),
    "train.cuda_graphs": (["train.cuda_graphs=false"], lambda b: b.recipe.cuda_graphs, False),
    "train.log_every": (["train.log_every=7"], lambda b: b.recipe.log_every, 7),
    "train.log_activations": (
        ["train.log_activations=[conv1]"], lambda b: b.activations.layers, ("conv1",)
    ),
    "train.checkpoint_every_epochs": (
        ["train.checkpoint_every_epochs=2"], lambda b: b.recipe.checkpoint_every, 8
    ),
    "train.rank_timeout_minutes": (
        ["train.rank_timeout_minutes=3"], lambda b: b.recipe.rank_timeout_minutes, 3.0
    ),
    "train.keep_checkpoints": (
        ["train.keep_checkpoints=5"], lambda b: b.recipe.keep_checkpoints, 5
    ),
}  # fmt: skip

# Keys whose effect other tests assert.
ELSEWHERE = {
    "output_dir", "model.num_classes", "data.train_folder", "data.val_folder",
    "data.val_short_side",
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_key_reaches_its_object(key, make_loop):
    overrides, observe, expected = KEYS[key]
    assert observe(make_loop()) != expected
    assert observe(make_loop(*overrides)) == expected


def test_validation_resizes_to_the_short_side_of_the_config(make_loop):
    assert validated(make_loop()) == validated(make_loop())
    assert validated(make_loop()) != validated(make_loop("data.val_short_side=40"))


def test_every_key_is_covered():
    keys = set()
    for field in dataclasses.fields(ImagenetConfig):
        if dataclasses.is_dataclass(field.type):
            keys |= {f"{field.name}.{inner.name}" for inner in dataclasses.fields(field.type)}
        else:
            keys.add(field.name)
    assert keys == KEYS.keys() | ELSEWHERE
