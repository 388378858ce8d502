"""A training run from its task, its recipe and its config."""

from pathlib import Path
from typing import Any

from i3d_gn.engine.command import NonFiniteLossError
from i3d_gn.engine.cores import limit_compute_threads, num_workers
from i3d_gn.engine.loop import TrainingLoop
from i3d_gn.engine.recipe import Recipe
from i3d_gn.engine.task import Task
from i3d_gn.engine.typed_config import to_flat_dict


def train_task(task: Task[Any], recipe: Recipe, config: Any) -> None:
    """Train to the end of the recipe, from the newest checkpoint in `output_dir` if there is one.

    Args:
        task: What is trained.
        recipe: How.
        config: The run's whole config, with `output_dir`, `seed` and `data.num_workers`.

    Raises:
        ConfigError: The data, the number of ranks, or an earlier run do not match the config.
        NonFiniteLossError: Training diverged; checkpoints saved before that are good.
        ValueError: Too many samples cannot be read.
    """
    limit_compute_threads(task.process, num_workers(config, task.process))
    loop = TrainingLoop(
        task, recipe, config=config, seed=config.seed, output_dir=Path(config.output_dir)
    )
    try:
        loop.run()
    except NonFiniteLossError as error:
        keys = {"train.warmup_steps", "train.clip_grad_norm"} & to_flat_dict(config).keys()
        remedies = " or ".join(["a lower train.lr", *sorted(keys, reverse=True)])
        raise NonFiniteLossError(f"{error}; try {remedies}") from error
