"""The recipe of a training run: what any task needs to know about optimization and bookkeeping."""

from dataclasses import dataclass
from typing import Any, Literal

from i3d_gn.engine.typed_config import ConfigError, added_key, check_numbers, machine_key


@dataclass(frozen=True)
class Recipe:
    """How a run is optimized, and when it logs, validates and saves.

    Lengths are in optimizer steps. A task extends it to its own `train` section of the config, or
    makes one from it.
    """

    steps: int = 0  # optimizer steps of the whole run; 0: given otherwise
    global_batch_size: int = 64  # samples per optimizer step, over all ranks
    lr: float = 0.01  # at a global batch of lr_batch_size; scaled linearly from there
    lr_batch_size: int = 64  # see lr
    schedule: Literal["step", "cosine"] = "step"  # of lr: drops at milestones, or decay to 0
    milestones: tuple[int, ...] = ()  # steps after which lr is multiplied by 0.1
    warmup_steps: int = 0  # lr rises linearly over so many steps
    warmup_from: float = added_key(0.0)  # fraction of lr at which the warm-up starts
    optimizer: Literal["sgd", "adamw"] = added_key("sgd")  # AdamW: try lr 1e-4, weight_decay 0.05
    momentum: float = 0.9  # of SGD
    nesterov: bool = True  # Nesterov momentum
    weight_decay: float = 1e-4  # of all parameters but gamma and beta
    norm_weight_decay: float = 0.0  # of gamma and beta
    clip_grad_norm: float | None = None  # largest norm of the gradient; None: not clipped
    ema_decay: float = added_key(0.0)  # test a moving average of the weights, e.g. 0.99; 0: none
    best_metric: str | None = added_key(None)  # keep best.pt by it, e.g. val/top1 or test/top1
    patience: int | None = added_key(None)  # stop after so many validations without a better one
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the network's arithmetic
    compile: bool = False  # use torch.compile
    log_every: int = machine_key(20)  # steps from one log line to the next
    log_activations: tuple[str, ...] = machine_key(())  # layers; percentiles of their outputs
    validate_every: int = 10_000  # steps from one validation to the next; the last step validates
    checkpoint_every: int = machine_key(5_000)  # steps from one checkpoint to the next
    keep_checkpoints: int = machine_key(3)  # the newest that are kept
    rank_timeout_minutes: float = machine_key(10.0)  # how long ranks wait for one another


def check_optimizer_values(train: Any, where: str) -> None:
    """Check what a recipe, or the section of a config that becomes one, says about the optimizer.

    `where` stands before the key in messages.

    Raises:
        ConfigError: A value is out of range, or does not go with the others.
    """
    check_numbers(
        train,
        where,
        at_least_1=("lr_batch_size", "milestones"),
        not_negative=("lr", "weight_decay", "norm_weight_decay"),
    )
    if not 0 <= getattr(train, "ema_decay", 0) < 1:
        raise ConfigError(f"{where}ema_decay is {train.ema_decay}; it must lie in [0, 1)")
    if not 0 <= getattr(train, "warmup_from", 0) <= 1:
        raise ConfigError(f"{where}warmup_from is {train.warmup_from}; it must lie in [0, 1]")
    if not 0 <= train.momentum < 1:
        raise ConfigError(f"{where}momentum is {train.momentum}; it must lie in [0, 1)")
    if train.nesterov and not train.momentum:
        raise ConfigError(
            f"{where}nesterov needs momentum, which is 0; set nesterov to false, or a momentum"
        )
    if train.log_activations and train.compile:
        raise ConfigError(
            f"{where}log_activations needs layers that are not compiled; set {where}compile=false"
        )
    if list(train.milestones) != sorted(set(train.milestones)):
        raise ConfigError(f"{where}milestones {list(train.milestones)} must increase")
