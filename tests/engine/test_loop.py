"""The loop with a task of its own kind: a network that returns its loss, as detectors do."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from i3d_gn.data.batches import Batch
from i3d_gn.engine.checkpoint import latest_checkpoint, load_checkpoint
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.loop import Task, TrainingLoop
from i3d_gn.engine.recipe import Recipe
from i3d_gn.engine.run_log import read_log

CPU = Process(0, 1, torch.device("cpu"))
TARGET = torch.tensor([1.0, -2.0, 3.0])


@dataclass(frozen=True)
class ToyConfig:
    """The whole config of a toy run."""

    train: Recipe = field(default_factory=Recipe)


class LossSum:
    """Sum of losses, without an accuracy."""

    def __init__(self):
        self.sums = [0.0, 0]

    def add(self, loss, samples):
        self.sums = [self.sums[0] + float(loss), self.sums[1] + samples]

    def read_and_reset(self):
        total, samples = self.sums
        self.sums = [0.0, 0]
        return {"loss": total, "samples": samples, "broken": 1}

    def state(self):
        return self.sums

    def load_state(self, state):
        self.sums = state


class Regression(nn.Module):
    """Returns its own loss in training."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1, bias=False)

    def forward(self, x, target):
        return (self.linear(x)[:, 0] - target).square().mean()


class ToyTask(Task):
    unit = "rows"
    process = CPU
    micro_batch_size = 4

    def __init__(self, recipe, max_broken=1000):
        self.recipe, self.max_broken = recipe, max_broken
        self.validated = []
        self.sums = LossSum()

    @property
    def metrics(self):
        return self.sums

    def build_model(self):
        return Regression()

    def load_weights(self, model):
        nn.init.zeros_(model.linear.weight)

    def load_state(self, saved):
        assert saved["note"] == "kept"

    def state(self):
        return {"note": "kept"}

    def training_batches(self, first_step):
        for i in range(2 * first_step, 2 * self.recipe.steps):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))
            yield Batch(x, x @ TARGET, torch.ones(4), ())

    def loss(self, network, batch):
        loss = network(batch.inputs, batch.labels)
        self.sums.add(loss.detach(), len(batch.inputs))
        return loss

    def summary(self, values):
        return f"loss {values['loss']:.3f}"

    def validate(self, model, step, log):
        self.validated.append(step)
        log.write("val", step, {"error": float((model.linear.weight.detach()[0] - TARGET).norm())})


def recipe(**changes):
    options = {
        "steps": 60, "global_batch_size": 8, "lr": 0.1, "lr_batch_size": 8, "weight_decay": 0.0,
        "log_every": 20, "validate_every": 30, "checkpoint_every": 25,
    }  # fmt: skip
    return Recipe(**{**options, **changes})


def train(folder, task):
    config = ToyConfig(task.recipe)
    loop = TrainingLoop(task, task.recipe, config=config, seed=0, output_dir=folder)
    loop.run()
    return loop


def test_network_that_returns_its_loss_is_trained(tmp_path, caplog):
    caplog.set_level("INFO")
    task = ToyTask(recipe())
    loop = train(tmp_path, task)
    torch.testing.assert_close(loop.model.linear.weight[0], TARGET, rtol=1e-3, atol=1e-3)
    log = read_log(tmp_path / "log.jsonl")
    assert [(line["kind"], line["step"]) for line in log] == [
        ("train", 20), ("val", 30), ("train", 40), ("train", 60), ("val", 60)
    ]  # fmt: skip
    assert task.validated == [30, 60]
    assert "rows/s" in caplog.text
    saved = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))
    assert (saved["step"], saved["note"], saved["num_broken"]) == (60, "kept", 3)
    assert saved["config"]["train"]["lr"] == 0.1


def test_resumed_task_equals_an_uninterrupted_one(tmp_path):
    whole = train(tmp_path / "whole", ToyTask(recipe()))

    class Stops(ToyTask):
        def loss(self, network, batch):
            self.losses = getattr(self, "losses", 0) + 1
            if self.losses == 2 * 54:  # log line at step 40, checkpoint at 50
                raise KeyboardInterrupt
            return super().loss(network, batch)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", Stops(recipe()))
    resumed = train(tmp_path / "cut", ToyTask(recipe()))
    assert resumed.first_step == 50
    assert torch.equal(whole.model.linear.weight, resumed.model.linear.weight)
    logs = [
        [
            {k: v for k, v in line.items() if k != "timing"}
            for line in read_log(folder / "log.jsonl")
        ]
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert logs[0] == logs[1]


def test_too_many_broken_samples_stop_the_run(tmp_path):
    with pytest.raises(ValueError, match="2 rows failed to decode, more than the 1 allowed"):
        train(tmp_path, ToyTask(recipe(), max_broken=1))
