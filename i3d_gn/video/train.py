"""Train a video network: what is built, and how it is validated. The loop is `i3d_gn.engine.loop`.

Writes under `output_dir`: `config.yaml` (resolved), `environment.json`, `log.jsonl`,
`tensorboard/`, `training_clips/` (the first clips as the network sees them) and `checkpoints/`.
"""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from i3d_gn.data.batches import Batch, Stream
from i3d_gn.data.samplers import EachItemOnce, ShuffledMicroBatches
from i3d_gn.engine.classification import (
    ClassificationTask,
    LossOptions,
    saved_normalization,
    validate,
)
from i3d_gn.engine.distributed import Process, barrier
from i3d_gn.engine.mixing import MixSamples
from i3d_gn.engine.precise_bn import get_bn_modules, update_bn_stats
from i3d_gn.engine.run_log import RunLog
from i3d_gn.engine.training import train_task
from i3d_gn.models import VideoNetwork
from i3d_gn.video import build
from i3d_gn.video.config import LR_STAGES, Config
from i3d_gn.video.evaluate import evaluate_model
from i3d_gn.video_io.strips import Strip, frame_strip

logger = logging.getLogger(__name__)


def train(config: Config, process: Process) -> None:
    """Train to the end of the recipe, from the newest checkpoint in `output_dir` if there is one.

    Raises:
        ConfigError: The indexes, or an earlier run under `output_dir`, do not match the config.
        NonFiniteLossError: Training diverged; checkpoints saved before that are good.
        ValueError: Too many clips failed to decode.
    """
    task = VideoTraining(config, process)
    train_task(task, task.config.train, task.config)


class VideoTraining(ClassificationTask):
    """Random clips of the training videos; validation on one clip per video, or several.

    Its `config` is complete: with the number of classes and of steps.
    """

    unit = "clips"

    def __init__(self, config: Config, process: Process) -> None:
        super().__init__(process, micro_batch_size=config.train.clips_per_gpu)
        self.max_broken = config.data.max_broken_clips
        self.max_broken_share = config.data.max_broken_share
        self.train_index = build.load_index(config.data.train_index, config)
        self.val_index = build.load_index(config.data.val_index, config)
        build.check_classes(self.train_index, self.val_index)
        self.config = config.completed(
            num_classes=len(self.train_index.class_names), num_videos=len(self.train_index)
        )
        recipe = self.config.train
        self.loss_options = LossOptions(
            label_smoothing=recipe.label_smoothing,
            mix=(
                MixSamples(
                    len(self.train_index.class_names), mixup=recipe.mixup, cutmix=recipe.cutmix
                )
                if recipe.mixup or recipe.cutmix
                else None
            ),
            class_weights=(
                build.class_weights(self.train_index).to(process.device)
                if recipe.class_weights == "balanced"
                else None
            ),
        )
        build.warn_of_shared_videos(self.train_index, self.val_index)

    def build_model(self) -> VideoNetwork:
        """The network of the config."""
        return build.build_model(self.config, self.process.device)

    def lr_multiplier(self, parameter: str) -> float:
        """The config's, for the stage of the parameter.

        Rates that differ by layer are those of Howard & Ruder, arXiv:1801.06146.
        """
        stage = parameter.partition(".")[0].replace("norm1", "conv1")
        multipliers = self.config.train.lr_multipliers
        return multipliers[LR_STAGES.index(stage)] if multipliers else 1.0

    def data(self) -> dict[str, str]:
        """The rows and classes of both indexes."""
        return {
            "training index": build.describe_index(self.train_index),
            "validation index": build.describe_index(self.val_index),
        }

    def load_weights(self, model: nn.Module) -> None:
        """Inflate or load the weights that the config names."""
        assert isinstance(model, VideoNetwork)
        mean, std = build.load_starting_weights(model, self.config)
        self.to_device = build.to_device(self.config, self.process, mean=mean, std=std)

    def load_state(self, saved: dict[str, Any]) -> None:
        """Normalize clips as before."""
        mean, std = saved_normalization(saved)
        self.to_device = build.to_device(self.config, self.process, mean=mean, std=std)

    def state(self) -> dict[str, Any]:
        """Mean, std and class names."""
        return {**super().state(), "class_names": list(self.train_index.class_names)}

    def training_batches(self, first_step: int) -> Iterable[Batch]:
        """Random clips of the shuffled training videos."""
        return self._shuffled(Stream.TRAIN_CLIP, range(first_step, self.config.train.steps))

    def strips(self, batch: Batch) -> list[Strip]:
        """Frames of each clip, before normalization."""
        clips = batch.inputs[batch.weights > 0].cpu().numpy()
        labels = batch.labels[batch.weights > 0].tolist()
        return [
            Strip(
                self.train_index.class_names[label],
                frame_strip(clip, num_frames=8, max_height=112),
            )
            for clip, label in zip(clips, labels, strict=True)
        ]

    def validate(self, model: nn.Module, step: int, log: RunLog) -> None:
        """Update BN's statistics if there are any, then score the validation videos."""
        config, recipe = self.config, self.config.train
        if recipe.precise_bn_iterations and get_bn_modules(model):
            batches = self._shuffled(
                Stream.PRECISE_BN_CLIP, range(recipe.precise_bn_iterations), salt=step
            )
            for line in update_bn_stats(model, batches, self.to_device):
                logger.warning("skipped in precise BN: %s", line)
        each_video = EachItemOnce(
            len(self.val_index),
            batch_size=recipe.clips_per_gpu,
            rank=self.process.rank,
            world_size=self.process.world_size,
        )
        clips = build.random_clips(self.val_index, config, stream=Stream.VALIDATION_CLIP, salt=step)
        batches = build.clip_loader(clips, each_video, config, self.process)
        values, broken = validate(model, batches, self.to_device)
        for line in broken:
            logger.warning("skipped in validation: %s", line)
        log.write("val", step, values)
        logger.info(
            "step %d/%d  validation, one clip per video: loss %.4f  top-1 %.1f %%  top-5 %.1f %%",
            step, recipe.steps, values["loss"], values["top1"], values["top5"],
        )  # fmt: skip
        if recipe.validate_multi_clip:
            assert isinstance(model, VideoNetwork)
            self._validate_multi_clip(model, step, log)

    def _validate_multi_clip(self, model: VideoNetwork, step: int, log: RunLog) -> None:
        folder = Path(self.config.output_dir) / f"val_step_{step:08d}"
        if self.process.is_main:  # a run that stopped here left scores of other weights
            shutil.rmtree(folder, ignore_errors=True)
        barrier()
        outcome = evaluate_model(
            model, self.val_index, self.config, self.to_device, self.process,
            folder=folder, tag=f"step_{step:08d}",
        )  # fmt: skip
        if outcome is None or outcome.metrics is None:
            return
        log.write("test", step, outcome.summary())
        logger.info(
            "step %d/%d  validation, %d clips per video: top-1 %.1f %%  top-5 %.1f %%",
            step, self.config.train.steps, self.config.test.num_clips,
            outcome.metrics.top1, outcome.metrics.top5,
        )  # fmt: skip

    def _shuffled(self, stream: Stream, steps: range, *, salt: int = 0) -> Iterable[Batch]:
        order = ShuffledMicroBatches(
            len(self.train_index),
            seed=self.config.seed,
            global_batch_size=self.config.train.global_batch_size,
            micro_batch_size=self.config.train.clips_per_gpu,
            rank=self.process.rank,
            world_size=self.process.world_size,
            first_step=steps.start,
            last_step=steps.stop,
        )
        clips = build.random_clips(self.train_index, self.config, stream=stream, salt=salt)
        return build.clip_loader(clips, order, self.config, self.process)
