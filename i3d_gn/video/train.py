"""Train a network from one YAML file.

    python -m i3d_gn.video.train CONFIG [key=value ...] [--print-config]
    torchrun --nproc-per-node 8 -m i3d_gn.video.train CONFIG [key=value ...]

Writes under `output_dir`: `config.yaml` (resolved), `log.jsonl`, `tensorboard/`, `checkpoints/`.
Started again, it goes on after the newest checkpoint as if it had never stopped.
"""

import argparse
import contextlib
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from i3d_gn.data.batches import ClipBatch, Stream
from i3d_gn.data.samplers import EachVideoOnce, ShuffledMicroBatches, micro_batches_per_process
from i3d_gn.data.to_device import DeviceClips
from i3d_gn.engine.checkpoint import load_checkpoint, load_model_state
from i3d_gn.engine.command import run_command
from i3d_gn.engine.distributed import World, join_world, wait_for_all
from i3d_gn.engine.loop import run_steps
from i3d_gn.engine.optim import build_sgd, learning_rate, load_sgd_state
from i3d_gn.engine.run_dir import claim_output_dir
from i3d_gn.engine.run_log import RunLog
from i3d_gn.engine.trainer import (
    Trainer,
    batch_norm_layers,
    reestimate_bn_statistics,
    validate,
)
from i3d_gn.engine.typed_config import ConfigError, to_dict, to_yaml
from i3d_gn.models import I3D
from i3d_gn.video import build
from i3d_gn.video.config import Config, load_config
from i3d_gn.video.evaluate import evaluate_model
from i3d_gn.video_io.index import VideoIndex

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 on success."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn train", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("config", type=Path, help="YAML file, e.g. configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change config values")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved config and stop"
    )
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    with join_world() as world:
        train(config, world)
    return 0


def train(config: Config, world: World) -> None:
    """Train to `config.train.steps`, from the newest checkpoint under `output_dir` if there is one.

    Raises:
        ConfigError: the indexes or an earlier run under `output_dir` do not fit the config.
        NonFiniteLossError: training diverged; the checkpoints written before it are good.
        ValueError: too many clips could not be decoded.
    """
    recipe = config.train
    output_dir = Path(config.output_dir)
    checkpoints = output_dir / "checkpoints"
    train_index = build.load_index(config.data.train_index, config)
    val_index = build.load_index(config.data.val_index, config)
    if train_index.class_names != val_index.class_names:
        raise ConfigError(
            f"{config.data.train_index} and {config.data.val_index} number their classes "
            "differently; make the second with --label-map and the first"
        )
    resume_from = claim_output_dir(output_dir, config, world)

    # The network and where it stands.
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True  # shapes never change
    model = build.build_model(config)
    model.to(world.device)
    if build.uses_channels_last(world, config):
        model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    optimizer = build_sgd(
        model,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        norm_weight_decay=recipe.norm_weight_decay,
        loss_scaling=recipe.precision == "fp16",
    )
    micro_batches = micro_batches_per_process(
        global_batch_size=recipe.global_batch_size,
        clips_per_gpu=recipe.clips_per_gpu,
        world_size=world.size,
    )
    first_step, num_broken, saved = 0, 0, None
    if resume_from is None:
        mean, std = build.load_starting_weights(model, config)
    else:
        saved = load_checkpoint(resume_from)
        mean, std = tuple(saved["input"]["mean"]), tuple(saved["input"]["std"])
        load_model_state(model, saved["model"], path=resume_from)
        load_sgd_state(optimizer, saved["optimizer"])
        first_step, num_broken = saved["step"], saved["num_broken"]
        logger.info("resuming after step %d from %s", first_step, resume_from)
    to_device = build.device_clips(world, config, mean=mean, std=std)
    if recipe.compile:
        model.compile()
    network = DistributedDataParallel(model) if world.size > 1 else model
    trainer = Trainer(
        network,
        optimizer,
        to_device=to_device,
        clips_per_gpu=recipe.clips_per_gpu,
        micro_batches=micro_batches,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        clip_grad_norm=recipe.clip_grad_norm,
    )
    if saved is not None:
        trainer.load_state(saved["trainer"])

    # The steps.
    def lr_at(step: int) -> float:
        return learning_rate(
            step,
            steps=recipe.steps,
            lr=recipe.lr,
            lr_batch_size=recipe.lr_batch_size,
            global_batch_size=recipe.global_batch_size,
            schedule=recipe.schedule,
            milestones=recipe.milestones,
            warmup_steps=recipe.warmup_steps,
        )

    def contents() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "config": to_dict(config),
            "input": {"mean": list(mean), "std": list(std)},
            "class_names": list(train_index.class_names),
        }

    with contextlib.ExitStack() as stack:
        log = None
        if world.is_main:
            log = stack.enter_context(contextlib.closing(RunLog(output_dir, last_step=first_step)))
        run_steps(
            trainer,
            iter(_training_batches(train_index, config, world, first_step=first_step)),
            steps=range(first_step, recipe.steps),
            lr_at=lr_at,
            validate=lambda done: _validate(
                model, train_index, val_index, config, world, to_device, step=done, log=log
            ),
            contents=contents,
            checkpoints=checkpoints,
            world=world,
            log=log,
            log_every=recipe.log_every,
            validate_every=recipe.validate_every,
            checkpoint_every=recipe.checkpoint_every,
            keep_checkpoints=recipe.keep_checkpoints,
            num_broken=num_broken,
            max_broken=config.data.max_broken_clips,
        )


def _training_batches(
    index: VideoIndex, config: Config, world: World, *, first_step: int
) -> DataLoader[ClipBatch]:
    order = ShuffledMicroBatches(
        len(index),
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        clips_per_gpu=config.train.clips_per_gpu,
        rank=world.rank,
        world_size=world.size,
        first_step=first_step,
        last_step=config.train.steps,
    )
    clips = build.random_clips(index, config, stream=Stream.TRAIN_CLIP)
    return build.clip_loader(clips, order, world, config)


def _validate(
    model: I3D,
    train_index: VideoIndex,
    val_index: VideoIndex,
    config: Config,
    world: World,
    to_device: DeviceClips,
    *,
    step: int,
    log: RunLog | None,
) -> None:
    """Re-estimate BN's statistics if there are any, then score the validation videos."""
    recipe = config.train
    if batch_norm_layers(model):
        order = ShuffledMicroBatches(
            len(train_index),
            seed=config.seed,
            global_batch_size=recipe.global_batch_size,
            clips_per_gpu=recipe.clips_per_gpu,
            rank=world.rank,
            world_size=world.size,
            first_step=0,
            last_step=recipe.precise_bn_iterations,
        )
        clips = build.random_clips(train_index, config, stream=Stream.PRECISE_BN_CLIP, salt=step)
        batches = build.clip_loader(clips, order, world, config)
        for line in reestimate_bn_statistics(model, batches, to_device):
            logger.warning("left out of BN's statistics: %s", line)
    each_video = EachVideoOnce(
        len(val_index), clips_per_gpu=recipe.clips_per_gpu, rank=world.rank, world_size=world.size
    )
    clips = build.random_clips(val_index, config, stream=Stream.VALIDATION_CLIP, salt=step)
    values, broken = validate(model, build.clip_loader(clips, each_video, world, config), to_device)
    for line in broken:
        logger.warning("left out of validation: %s", line)
    if log is not None:
        log.write("val", step, values)
        logger.info(
            "step %d/%d  validation, one clip a video: loss %.4f  top-1 %.1f %%  top-5 %.1f %%",
            step, recipe.steps, values["loss"], values["top1"], values["top5"],
        )  # fmt: skip
    if recipe.validate_multi_clip:
        folder = Path(config.output_dir) / f"val_step_{step:08d}"
        if world.is_main:  # scores of a run that was stopped in here are of other weights
            shutil.rmtree(folder, ignore_errors=True)
        wait_for_all()
        outcome = evaluate_model(
            model,
            val_index,
            config,
            world,
            folder=folder,
            tag=f"step_{step:08d}",
            mean=to_device.mean,
            std=to_device.std,
        )
        if log is not None and outcome is not None:
            metrics = outcome.metrics
            log.write(
                "test",
                step,
                {
                    "top1": metrics.top1,
                    "top5": metrics.top5,
                    "mean_class_accuracy": metrics.mean_class_accuracy,
                    "num_videos": metrics.num_videos,
                    "num_skipped": len(outcome.skipped),
                },
            )
            logger.info(
                "step %d/%d  validation, %d clips a video: top-1 %.1f %%  top-5 %.1f %%",
                step, recipe.steps, config.test.num_clips, metrics.top1, metrics.top5,
            )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main))
