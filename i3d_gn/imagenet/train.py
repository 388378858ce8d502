"""Train an image network as [GN] section 4.1 does on ImageNet; the loop is `i3d_gn.engine.loop`.

Any number of GPUs that divides `train.num_gpus` runs the same experiment: batch norm sees
`train.images_per_gpu` images at a time. Writes `config.yaml`, `log.jsonl`, `tensorboard/`,
`checkpoints/` and at the end `results.json` under `output_dir`. A checkpoint can be the
`model.weights` of a video run.
"""

import logging
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from i3d_gn.data.batches import Batch
from i3d_gn.data.images import CenterImages, TrainingImages
from i3d_gn.data.samplers import EachItemOnce, ShuffledMicroBatches
from i3d_gn.engine.classification import ClassificationTask, validate
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.run_log import RunLog, read_log
from i3d_gn.engine.training import train_task
from i3d_gn.engine.typed_config import ConfigError
from i3d_gn.files import write_json
from i3d_gn.imagenet import build
from i3d_gn.imagenet.config import ImagenetConfig

logger = logging.getLogger(__name__)


def train_imagenet(config: ImagenetConfig, process: Process) -> None:
    """Train to `config.train.epochs`, from the newest checkpoint if there is one.

    Raises:
        ConfigError: The images, the number of ranks, or an earlier run do not match the config.
        NonFiniteLossError: Training diverged; checkpoints saved before that are good.
        ValueError: An image cannot be read.
    """
    task = ImageTraining(config, process)
    train_task(task, task.recipe, config)
    if process.is_main:
        _write_results(Path(config.output_dir), config.train.epochs_of_median)


class ImageTraining(ClassificationTask):
    """Augmented images, validated on center crops after every epoch.

    An epoch is as many whole batches as the images fill. Images are reshuffled endlessly, so that
    the remainder of an epoch comes first in the next one.
    """

    unit = "images"

    def __init__(self, config: ImagenetConfig, process: Process) -> None:
        super().__init__(process, micro_batch_size=build.images_per_forward(config, process))
        self.config = config
        self.train_images = build.load_images(config.data.train_folder, config)
        self.val_images = build.load_images(config.data.val_folder, config)
        if self.train_images.class_names != self.val_images.class_names:
            names = {*self.train_images.class_names} ^ {*self.val_images.class_names}
            raise ConfigError(
                f"{config.data.train_folder} and {config.data.val_folder} have different classes: "
                f"only one of them has {min(names)!r}; class ids are positions in the sorted names"
            )
        batch = config.train.global_batch_size
        self.steps_per_epoch = len(self.train_images) // batch
        if not self.steps_per_epoch:
            raise ConfigError(
                f"{config.data.train_folder}: {len(self.train_images)} images are fewer than one "
                f"batch of {batch}; lower train.images_per_gpu"
            )
        self.recipe = build.recipe(config, self.steps_per_epoch)

    def build_model(self) -> nn.Module:
        """The network of the config."""
        return build.build_model(self.config, self.process.device)

    def data(self) -> dict[str, str]:
        """Paths and labels of both folders."""
        folders = self.config.data
        return {
            "training images": build.describe_images(self.train_images, folders.train_folder),
            "validation images": build.describe_images(self.val_images, folders.val_folder),
        }

    def load_weights(self, model: nn.Module) -> None:
        """Nothing to load: training starts from scratch."""
        self.to_device = build.to_device(self.config, self.process)

    def load_state(self, saved: dict[str, Any]) -> None:
        """Mean and std are the config's."""
        self.to_device = build.to_device(self.config, self.process)

    def training_batches(self, first_step: int) -> Iterable[Batch]:
        """Augmented crops of the shuffled training images."""
        config = self.config
        order = ShuffledMicroBatches(
            len(self.train_images),
            seed=config.seed,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            rank=self.process.rank,
            world_size=self.process.world_size,
            first_step=first_step,
            last_step=self.recipe.steps,
        )
        images = TrainingImages(
            self.train_images,
            crop_size=config.data.crop_size,
            area_min=config.data.area_min,
            seed=config.seed,
        )
        return build.image_loader(images, order, config, self.process)

    def validate(self, model: nn.Module, step: int, log: RunLog) -> None:
        """Error on center crops."""
        config = self.config
        each_once = EachItemOnce(
            len(self.val_images),
            batch_size=max(config.train.images_per_gpu, 64),  # statistics are fixed in validation
            rank=self.process.rank,
            world_size=self.process.world_size,
        )
        images = CenterImages(
            self.val_images,
            short_side=config.data.val_short_side,
            crop_size=config.data.crop_size,
        )
        batches = build.image_loader(images, each_once, config, self.process)
        values, _ = validate(model, batches, self.to_device)
        epoch, error = step // self.steps_per_epoch, 100 - values["top1"]
        log.write("val", step, {**values, "epoch": epoch, "error": error})
        logger.info("epoch %d/%d  validation error %.2f %%", epoch, config.train.epochs, error)


def _write_results(output_dir: Path, epochs_of_median: int) -> None:
    """Report the median error of the last epochs, as [GN] section 4.1 does."""
    errors = [line["error"] for line in read_log(output_dir / "log.jsonl") if line["kind"] == "val"]
    last = errors[-epochs_of_median:]
    results = {
        "median_error": statistics.median(last),
        "epochs_of_median": len(last),
        "last_error": errors[-1],
        "best_error": min(errors),
        "epochs": len(errors),
    }
    write_json(output_dir / "results.json", results)
    print(
        f"{len(errors)} epochs: validation error {results['median_error']:.2f} % "
        f"(median of the last {len(last)})"
    )
