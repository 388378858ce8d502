"""The loop with a task of its own kind: a network that returns its loss, as detectors do."""

import json
import os
import signal
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from i3d_gn.data.batches import Batch
from i3d_gn.engine import loop
from i3d_gn.engine.checkpoint import latest_checkpoint, load_checkpoint
from i3d_gn.engine.command import NonFiniteLossError
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.loop import TrainingLoop
from i3d_gn.engine.recipe import Recipe, check_shared_recipe
from i3d_gn.engine.run_log import read_log
from i3d_gn.engine.stop_signals import Stopped
from i3d_gn.engine.task import Task
from i3d_gn.engine.typed_config import ConfigError

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

    def data(self):
        return {"rows": "endless"}

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
    with pytest.raises(
        ValueError, match="2 of 322 rows failed to decode, more than the 1 or 100 % allowed"
    ):
        train(tmp_path, ToyTask(recipe(), max_broken=1))


def test_too_large_a_share_of_broken_samples_stops_the_run(tmp_path):
    class Breaks(ToyTask):
        max_broken_share = 0.2

        @property
        def metrics(self):
            sums = self.sums
            sums.read_and_reset = lambda: {"loss": 0.0, "samples": 30, "broken": 11}
            return sums

    with pytest.raises(ValueError, match="11 of 41 rows failed to decode, more than .* 20 %"):
        train(tmp_path, Breaks(recipe()))


def test_an_interval_without_a_sample_stops_the_run(tmp_path):
    class Gone(ToyTask):
        @property
        def metrics(self):
            sums = self.sums
            sums.read_and_reset = lambda: {"loss": 0.0, "samples": 0, "broken": 3}
            return sums

    with pytest.raises(ValueError, match="no rows could be decoded since the last log line"):
        train(tmp_path, Gone(recipe()))
    assert (tmp_path / "log.jsonl").read_text() == ""
    assert latest_checkpoint(tmp_path / "checkpoints") is None


class Signaled(ToyTask):
    """Sends a signal to this process in one of the steps or validations."""

    def __init__(self, recipe, number, *, step=None, validation=None):
        super().__init__(recipe)
        self.number, self.step, self.validation, self.losses = number, step, validation, 0

    def loss(self, network, batch):
        self.losses += 1
        if self.losses == 2 * (self.step or -1):
            os.kill(os.getpid(), self.number)
        return super().loss(network, batch)

    def validate(self, model, step, log):
        if step == self.validation:
            os.kill(os.getpid(), self.number)
            pytest.fail("a signal stops a validation at once")
        super().validate(model, step, log)


def assert_same_run(whole, folder):
    saved = [load_checkpoint(latest_checkpoint(f / "checkpoints")) for f in (whole, folder)]
    assert torch.equal(*(c["model"]["linear.weight"] for c in saved))
    momenta = [c["optimizer"]["state"][0]["momentum_buffer"] for c in saved]
    assert torch.equal(*momenta)
    logs = [
        [{k: v for k, v in line.items() if k != "timing"} for line in read_log(f / "log.jsonl")]
        for f in (whole, folder)
    ]
    assert logs[0] == logs[1]
    assert not list((folder / "checkpoints").glob("before*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("step", [13, 30, 40])  # between events, before a validation, at a log line
def test_signal_finishes_the_step_and_saves_a_checkpoint(tmp_path, number, step):
    signal.signal(number, signal.SIG_DFL)  # nohup ignores SIGHUP
    train(tmp_path / "whole", ToyTask(recipe()))
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"{number.name} after step {step}, with a checkpoint"):
        train(tmp_path / "cut", Signaled(recipe(), number, step=step))
    assert signal.getsignal(number) == before
    task = ToyTask(recipe())
    assert train(tmp_path / "cut", task).first_step == step
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert task.validated == ([30, 60] if step <= 30 else [60])


@pytest.mark.parametrize("step", [30, 60])
def test_signal_in_a_validation_resumes_there(tmp_path, step):
    train(tmp_path / "whole", ToyTask(recipe()))
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        train(tmp_path / "cut", Signaled(recipe(), signal.SIGTERM, validation=step))
    task = ToyTask(recipe())
    assert train(tmp_path / "cut", task).first_step == step
    assert task.validated == [*range(step, 61, 30)]
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_second_signal_stops_at_once(tmp_path):
    class Twice(Signaled):
        def loss(self, network, batch):
            loss = super().loss(network, batch)
            if self.losses == 26:
                os.kill(os.getpid(), signal.SIGTERM)
                pytest.fail("the second signal stops at once")
            return loss

    with pytest.raises(Stopped, match="stopped by SIGTERM$"):
        train(tmp_path, Twice(recipe(), signal.SIGUSR1, step=13))
    assert latest_checkpoint(tmp_path / "checkpoints") is None


def test_ctrl_c_saves_a_checkpoint_too(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Signaled(recipe(), signal.SIGINT, step=13))
    assert load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))["step"] == 13


def test_two_runs_in_one_directory_are_refused(tmp_path):
    task = ToyTask(recipe())
    first = TrainingLoop(task, recipe(), config=ToyConfig(recipe()), seed=0, output_dir=tmp_path)
    with pytest.raises(ConfigError, match=rf"in use by another process \(process {os.getpid()} on"):
        train(tmp_path, ToyTask(recipe()))
    first.run()
    train(tmp_path, ToyTask(recipe()))  # the lock ended with the run


def test_other_data_are_refused(tmp_path):
    train(tmp_path, ToyTask(recipe()))

    class Other(ToyTask):
        def data(self):
            return {"rows": "fewer"}

    with pytest.raises(ConfigError, match=r"data have changed .*\(rows: endless -> fewer\)"):
        train(tmp_path, Other(recipe()))


def test_config_of_the_checkpoint_counts_if_config_yaml_is_gone(tmp_path):
    train(tmp_path, ToyTask(recipe()))
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"another config \(train.lr: 0.1 -> 0.2\)"):
        train(tmp_path, ToyTask(recipe(lr=0.2)))


@pytest.mark.parametrize("text", ["", "- a", "a: ["])
def test_damaged_config_yaml_of_a_started_run_is_an_error(tmp_path, text):
    task = ToyTask(recipe(checkpoint_every=1000))
    train(tmp_path, task)
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config.yaml is damaged"):
        train(tmp_path, ToyTask(recipe(checkpoint_every=1000)))


def test_momentum_that_is_not_finite_is_not_saved(tmp_path):
    class Diverges(ToyTask):
        def validate(self, model, step, log):
            self.loop.optimizer.state[model.linear.weight]["momentum_buffer"][0, 1] = float("nan")

    task = Diverges(recipe(steps=30))
    task.loop = loop = TrainingLoop(
        task, task.recipe, config=ToyConfig(task.recipe), seed=0, output_dir=tmp_path
    )
    with pytest.raises(NonFiniteLossError, match="momentum_buffer of linear.weight is not finite"):
        loop.run()
    assert load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))["step"] == 25


def test_stale_temporary_files_are_deleted(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    stale = [tmp_path / ".config.yaml.host-1.part", tmp_path / "checkpoints" / ".step_1.pt.a.part"]
    for path in stale:
        path.touch()
    train(tmp_path, ToyTask(recipe(steps=2)))
    assert not any(path.exists() for path in stale)


def test_logging_activations_changes_no_result(tmp_path):
    logs, weights = [], []
    for name, layers in (("with", ("linear",)), ("without", ())):
        loop = train(tmp_path / name, ToyTask(recipe(log_activations=layers)))
        logs.append(read_log(tmp_path / name / "log.jsonl"))
        weights.append(loop.model.linear.weight)
    assert torch.equal(*weights)
    for line, other in zip(*logs, strict=True):
        if line["kind"] == "train":
            assert len(line.pop("activations")["linear"]) == 4
            assert line["grad_norm"] > 0
            assert line.pop("timing")["memory_gib"] > 0.05
            del other["timing"]
        assert line == other


def test_layers_of_a_compiled_network_are_refused():
    with pytest.raises(ConfigError, match=r"train\.log_activations .*train\.compile=false"):
        check_shared_recipe(recipe(log_activations=("linear",), compile=True), "train.")


def test_environment_names_versions_and_device(tmp_path):
    train(tmp_path, ToyTask(recipe()))
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["ranks"] == 1
    assert "cores" in found["device"]


@pytest.mark.parametrize(
    ("options", "on_gpu", "fixed_shapes", "expected"),
    [
        ({}, True, True, True),
        ({}, False, True, False),
        ({}, True, False, False),
        ({"cuda_graphs": False}, True, True, False),
        ({"compile": True}, True, True, False),
        ({"log_activations": ("linear",)}, True, True, False),
    ],
)
def test_training_is_launched_as_cuda_graphs(
    tmp_path, monkeypatch, options, on_gpu, fixed_shapes, expected
):
    launched = []
    monkeypatch.setattr(loop, "can_capture", lambda model: on_gpu)
    monkeypatch.setattr(loop, "launch_as_graphs", launched.append)
    recipe = Recipe(steps=1, global_batch_size=4, **options)
    task = ToyTask(recipe)
    task.fixed_shapes = fixed_shapes
    training = TrainingLoop(task, recipe, config=ToyConfig(recipe), seed=0, output_dir=tmp_path)
    assert launched == ([training.model] if expected else [])
    assert training.trainer.gradients_are_overwritten == expected
