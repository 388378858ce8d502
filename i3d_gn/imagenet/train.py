"""Train an image network from one YAML file, as [GN] section 4.1 does on ImageNet.

    python -m i3d_gn.imagenet.train CONFIG [key=value ...] [--print-config]
    torchrun --nproc-per-node 8 -m i3d_gn.imagenet.train CONFIG [key=value ...]

Any number of GPUs that divides `train.num_gpus` runs the same experiment: batch norm sees
`train.images_per_gpu` images at a time. Writes `config.yaml`, `log.jsonl`, `tensorboard/`,
`checkpoints/` and in the end `results.json` under `output_dir`; started again, goes on after the
newest checkpoint. A checkpoint can be named as `model.weights` of video training.
"""

import argparse
import contextlib
import functools
import json
import logging
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from i3d_gn.data.batches import ClipBatch
from i3d_gn.data.images import CenterImages, LabelledImages, TrainingImages
from i3d_gn.data.loader import clip_loader, default_num_workers
from i3d_gn.data.samplers import EachVideoOnce, ShuffledMicroBatches
from i3d_gn.data.to_device import DeviceImages
from i3d_gn.engine.checkpoint import load_checkpoint, load_model_state
from i3d_gn.engine.command import run_command
from i3d_gn.engine.distributed import World, join_world
from i3d_gn.engine.loop import run_steps
from i3d_gn.engine.optim import build_sgd, learning_rate, load_sgd_state
from i3d_gn.engine.run_dir import claim_output_dir
from i3d_gn.engine.run_log import RunLog, read_log, write_text_atomically
from i3d_gn.engine.trainer import Trainer, validate
from i3d_gn.engine.typed_config import to_dict, to_yaml
from i3d_gn.imagenet.config import ImageModelConfig, ImagenetConfig, load_imagenet_config
from i3d_gn.models.resnet2d import resnet50, resnet101, resnet_tiny
from i3d_gn.models.vgg import VGG16
from i3d_gn.norm import make_norm, normalize_kernels

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 on success."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn train-imagenet", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("config", type=Path, help="YAML file, e.g. configs/imagenet/gn_32.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change config values")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config and stop"
    )
    args = parser.parse_intermixed_args(argv)
    config = load_imagenet_config(args.config, tuple(args.overrides))
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    with join_world() as world:
        train_imagenet(config, world)
    return 0


def build_image_model(config: ImagenetConfig) -> nn.Module:
    """The network of `config.model`, randomly initialised."""
    model, recipe = config.model, config.train
    norm = functools.partial(
        make_norm,
        model.norm,
        spatial_dims=2,
        num_groups=_num_groups(model),
        channels_per_group=model.channels_per_group,
        r_max=model.r_max,
        d_max=model.d_max,
        stats_batch_size=recipe.images_per_gpu if model.norm in ("bn", "brn") else None,
    )
    if model.name == "vgg16":
        network: nn.Module = VGG16(norm, model.num_classes)
    else:
        variants = {"resnet50": resnet50, "resnet101": resnet101, "resnet_tiny": resnet_tiny}
        network = variants[model.name](
            norm, model.num_classes, zero_init_last_norm=model.zero_init_last_norm
        )
    if model.kernel_norm is not None:
        normalize_kernels(network, model.kernel_norm)
    return network


def _num_groups(model: ImageModelConfig) -> int | None:
    if model.name == "resnet_tiny" and model.norm == "gn" and model.channels_per_group is None:
        return model.num_groups or 8  # its 16 channels do not split into 32 groups
    return model.num_groups


def train_imagenet(config: ImagenetConfig, world: World) -> None:
    """Train to `config.train.epochs`, from the newest checkpoint if there is one.

    An epoch is as many whole batches as the images fill; images are shuffled without end, so that
    those left over come first in the next.

    Raises:
        ConfigError: an earlier run under `output_dir` has another config.
        NonFiniteLossError: training diverged; the checkpoints written before it are good.
        ValueError: images or processes do not fit the config.
    """
    recipe = config.train
    output_dir = Path(config.output_dir)
    checkpoints = output_dir / "checkpoints"
    train_images = _load_images(config.data.train_folder, config)
    val_images = _load_images(config.data.val_folder, config)
    if train_images.class_names != val_images.class_names:
        differing = sorted({*train_images.class_names} ^ {*val_images.class_names})
        raise ValueError(
            f"{config.data.train_folder} and {config.data.val_folder} hold other classes: "
            f"{differing[0]!r} is in one of them alone; class ids are positions in the sorted names"
        )
    steps_per_epoch = len(train_images) // recipe.global_batch_size
    if not steps_per_epoch:
        raise ValueError(
            f"{config.data.train_folder}: {len(train_images)} images do not fill a batch of "
            f"{recipe.global_batch_size}; make train.images_per_gpu smaller"
        )
    steps = recipe.epochs * steps_per_epoch
    per_forward = _images_per_forward(config, world)
    resume_from = claim_output_dir(output_dir, config, world)

    # The network and where it stands.
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True  # shapes never change
    model = build_image_model(config).to(world.device)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_sgd(
        model,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        norm_weight_decay=recipe.norm_weight_decay,
        loss_scaling=recipe.precision == "fp16",
    )
    first_step, saved = 0, None
    if resume_from is not None:
        saved = load_checkpoint(resume_from)
        load_model_state(model, saved["model"], path=resume_from)
        load_sgd_state(optimizer, saved["optimizer"])
        first_step = saved["step"]
        logger.info("resuming after step %d from %s", first_step, resume_from)
    if recipe.compile:
        model.compile()
    to_device = DeviceImages(
        device=world.device,
        mean=config.data.mean,
        std=config.data.std,
        precision=recipe.precision,
    )
    trainer = Trainer(
        DistributedDataParallel(model) if world.size > 1 else model,
        optimizer,
        to_device=to_device,
        clips_per_gpu=per_forward,
        micro_batches=recipe.global_batch_size // (world.size * per_forward),
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        clip_grad_norm=None,
    )
    if saved is not None:
        trainer.load_state(saved["trainer"])

    # The steps.
    def lr_at(step: int) -> float:
        return learning_rate(
            step,
            steps=steps,
            lr=recipe.lr,
            lr_batch_size=recipe.lr_batch_size,
            global_batch_size=recipe.global_batch_size,
            schedule="step",
            milestones=[epoch * steps_per_epoch for epoch in recipe.milestones],
            warmup_steps=0,
        )

    def contents() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "config": to_dict(config),
            "input": {"mean": list(config.data.mean), "std": list(config.data.std)},
        }

    def validate_epoch(done: int) -> None:
        values, _ = validate(model, _validation_batches(val_images, config, world), to_device)
        epoch = done // steps_per_epoch
        if log is not None:
            log.write("val", done, {**values, "epoch": epoch, "error": 100 - values["top1"]})
            logger.info(
                "epoch %d/%d  validation error %.2f %%", epoch, recipe.epochs, 100 - values["top1"]
            )

    with contextlib.ExitStack() as stack:
        log = None
        if world.is_main:
            log = stack.enter_context(contextlib.closing(RunLog(output_dir, last_step=first_step)))
        batches = _training_batches(
            train_images,
            config,
            world,
            per_forward=per_forward,
            first_step=first_step,
            last_step=steps,
        )
        run_steps(
            trainer,
            iter(batches),
            steps=range(first_step, steps),
            lr_at=lr_at,
            validate=validate_epoch,
            contents=contents,
            checkpoints=checkpoints,
            world=world,
            log=log,
            log_every=recipe.log_every,
            validate_every=steps_per_epoch,
            checkpoint_every=recipe.checkpoint_every_epochs * steps_per_epoch,
            keep_checkpoints=recipe.keep_checkpoints,
            num_broken=0,
            max_broken=0,
        )
    if world.is_main:
        _write_results(output_dir, recipe.epochs_of_median)


def _load_images(folder: str, config: ImagenetConfig) -> LabelledImages:
    images = LabelledImages(folder)
    if len(images.class_names) != config.model.num_classes:
        raise ValueError(
            f"{folder} has {len(images.class_names)} classes, model.num_classes is "
            f"{config.model.num_classes}; set model.num_classes={len(images.class_names)}"
        )
    return images


def _images_per_forward(config: ImagenetConfig, world: World) -> int:
    """Images of a process at once, so that everything comes out whole.

    Raises:
        ValueError: it does not.
    """
    recipe = config.train
    if recipe.num_gpus % world.size:
        raise ValueError(
            f"{world.size} processes cannot share the work of train.num_gpus={recipe.num_gpus} "
            "evenly; start as many as divide it"
        )
    share = recipe.global_batch_size // world.size
    per_forward = recipe.images_per_forward or share
    if share % per_forward:
        raise ValueError(
            f"train.images_per_forward={per_forward} does not divide the {share} images that each "
            f"of {world.size} processes has in a step"
        )
    return per_forward


def _training_batches(
    images: LabelledImages,
    config: ImagenetConfig,
    world: World,
    *,
    per_forward: int,
    first_step: int,
    last_step: int,
) -> DataLoader[ClipBatch]:
    order = ShuffledMicroBatches(
        len(images),
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        clips_per_gpu=per_forward,
        rank=world.rank,
        world_size=world.size,
        first_step=first_step,
        last_step=last_step,
    )
    data = TrainingImages(
        images,
        crop_size=config.data.crop_size,
        area_min=config.data.area_min,
        seed=config.seed,
    )
    return clip_loader(data, order, **_loader_options(config, world))


def _validation_batches(
    images: LabelledImages, config: ImagenetConfig, world: World
) -> DataLoader[ClipBatch]:
    each_once = EachVideoOnce(
        len(images),
        clips_per_gpu=max(config.train.images_per_gpu, 64),  # statistics are fixed by now
        rank=world.rank,
        world_size=world.size,
    )
    data = CenterImages(
        images, short_side=config.data.val_short_side, crop_size=config.data.crop_size
    )
    return clip_loader(data, each_once, **_loader_options(config, world))


def _loader_options(config: ImagenetConfig, world: World) -> dict[str, Any]:
    workers = config.data.num_workers
    return {
        "num_workers": default_num_workers(world.size) if workers is None else workers,
        "pin_memory": world.device.type == "cuda",
    }


def _write_results(output_dir: Path, epochs_of_median: int) -> None:
    """The median of the last epochs is what [GN] section 4.1 reports."""
    errors = [line["error"] for line in read_log(output_dir / "log.jsonl") if line["kind"] == "val"]
    last = errors[-epochs_of_median:]
    results = {
        "median_error": statistics.median(last),
        "epochs_of_median": len(last),
        "last_error": errors[-1],
        "best_error": min(errors),
        "epochs": len(errors),
    }
    write_text_atomically(output_dir / "results.json", json.dumps(results, indent=1) + "\n")
    print(
        f"{len(errors)} epochs: validation error {results['median_error']:.2f} % "
        f"(median of the last {len(last)})"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
