"""The recipe of a training run: what any task needs to know about optimization and bookkeeping."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from i3d_gn.engine.typed_config import ConfigError, added_key, check_numbers, machine_key


@dataclass(frozen=True)
class SharedRecipe:
    """What the `train` section of every task's config has, whether it counts steps or epochs."""

    lr: float = 0.01  # at a global batch of lr_batch_size; scaled linearly from there
    lr_batch_size: int = 64  # see lr
    milestones: tuple[int, ...] = ()  # steps after which lr is multiplied by 0.1
    momentum: float = 0.9  # of SGD
    nesterov: bool = True  # Nesterov momentum
    weight_decay: float = 1e-4  # of all parameters but gamma and beta
    norm_weight_decay: float = 0.0  # of gamma and beta
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the network's arithmetic
    compile: bool = False  # use torch.compile
    cuda_graphs: bool = machine_key(True)  # on a GPU; not with compile, log_activations, sync_bn
    log_every: int = machine_key(20)  # steps from one log line to the next
    log_activations: tuple[str, ...] = machine_key(())  # layers; percentiles of their outputs
    keep_checkpoints: int = machine_key(3)  # the newest that are kept
    rank_timeout_minutes: float = machine_key(10.0)  # how long ranks wait for one another


@dataclass(frozen=True)
class Recipe(SharedRecipe):
    """How a run is optimized, and when it logs, validates and saves.

    Lengths are in optimizer steps. A task extends it to its own `train` section of the config, or
    makes one from it.
    """

    steps: int = 0  # optimizer steps of the whole run; 0: given otherwise
    global_batch_size: int = 64  # samples per optimizer step, over all ranks
    schedule: Literal["step", "cosine"] = "step"  # of lr: drops at milestones, or decay to 0
    warmup_steps: int = 0  # lr rises linearly over so many steps
    warmup_from: float = added_key(0.0)  # fraction of lr at which the warm-up starts
    optimizer: Literal["sgd", "adamw"] = added_key("sgd")  # AdamW: try lr 1e-4, weight_decay 0.05
    clip_grad_norm: float | None = None  # largest norm of the gradient; None: not clipped
    ema_decay: float = added_key(0.0)  # test a moving average of the weights, e.g. 0.99; 0: none
    best_metric: str | None = added_key(None)  # keep best.pt by it, e.g. val/top1 or test/top1
    patience: int | None = added_key(None)  # stop after so many validations without a better one
    validate_every: int = 10_000  # steps from one validation to the next; the last step validates
    checkpoint_every: int = machine_key(5_000)  # steps from one checkpoint to the next


def check_shared_recipe(train: SharedRecipe, where: str) -> None:
    """Check what the types of a `train` section do not express.

    `where` stands before its keys in messages, and ends with `train.`.

    Raises:
        ConfigError: A value is out of range, or does not go with the others.
    """
    check_numbers(
        train,
        where,
        at_least_1=("lr_batch_size", "milestones", "log_every", "keep_checkpoints"),
        positive=("rank_timeout_minutes",),
        not_negative=("lr", "weight_decay", "norm_weight_decay"),
    )
    if not 0 <= train.momentum < 1:
        raise ConfigError(f"{where}momentum is {train.momentum}; it must lie in [0, 1)")
    if train.nesterov and not train.momentum:
        raise ConfigError(
            f"{where}nesterov needs momentum, which is 0; set nesterov to false, or a momentum"
        )
    if train.log_activations and train.compile:
        raise ConfigError(
            f"{where}log_activations needs layers that are not compiled; set train.compile=false"
        )
    if list(train.milestones) != sorted(set(train.milestones)):
        raise ConfigError(f"{where}milestones {list(train.milestones)} must increase")


def check_recipe(
    train: Recipe, where: str, *, per_gpu: str, metrics: Sequence[str], hint: str = ""
) -> None:
    """`check_shared_recipe`, and the keys that count in steps.

    Args:
        train: The section.
        where: Stands before its keys in messages, and ends with `train.`.
        per_gpu: The key of the samples per forward pass.
        metrics: What `best_metric` may be.
        hint: Follows them in the message about another one.

    Raises:
        ConfigError: A value is out of range, or does not go with the others.
    """
    check_numbers(
        train,
        where,
        at_least_1=("global_batch_size", per_gpu, "validate_every", "checkpoint_every", "patience"),
        positive=("clip_grad_norm",),
        not_negative=("steps", "warmup_steps"),
        up_to_1=("warmup_from",),
    )
    check_shared_recipe(train, where)
    if not 0 <= train.ema_decay < 1:
        raise ConfigError(f"{where}ema_decay is {train.ema_decay}; it must lie in [0, 1)")
    if train.global_batch_size % getattr(train, per_gpu):
        raise ConfigError(
            f"{where}global_batch_size {train.global_batch_size} is not a multiple of "
            f"train.{per_gpu} {getattr(train, per_gpu)}"
        )
    if train.schedule == "cosine" and train.milestones:
        raise ConfigError(
            f"{where}milestones have no effect with train.schedule=cosine; remove them"
        )
    if train.patience is not None and train.best_metric is None:
        raise ConfigError(f"{where}patience needs train.best_metric, e.g. {metrics[0]}")
    if train.best_metric not in (None, *metrics):
        raise ConfigError(
            f"{where}best_metric is {train.best_metric!r}; it must be one of {', '.join(metrics)}"
            f"{hint}"
        )
