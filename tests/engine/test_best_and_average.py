"""Averaged weights, the best checkpoint and early stopping, in the loop with a toy task."""

import importlib.util
from pathlib import Path

import pytest
import torch

from i3d_gn.engine.checkpoint import latest_checkpoint, load_checkpoint
from i3d_gn.engine.loop import TrainingLoop
from i3d_gn.engine.run_log import read_log

spec = importlib.util.spec_from_file_location("toy_loop", Path(__file__).with_name("test_loop.py"))
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)


def errors_of(folder):
    return [line["error"] for line in read_log(folder / "log.jsonl") if line["kind"] == "val"]


def test_average_is_that_of_the_weights_after_every_step(tmp_path):
    weights = []

    class Records(toy.ToyTask):
        def loss(self, network, batch):
            weights.append(network.linear.weight.detach()[0].clone())
            return super().loss(network, batch)

    loop = toy.train(tmp_path, Records(toy.recipe(ema_decay=0.8, steps=30)))
    after = [*weights[2::2], loop.model.linear.weight.detach()[0]]  # of steps 1 to 30
    average = after[0]
    for value in after[1:]:
        average = 0.8 * average + 0.2 * value
    torch.testing.assert_close(loop.average.model.linear.weight[0].detach(), average)
    assert not torch.equal(average, after[-1])
    saved = load_checkpoint(latest_checkpoint(tmp_path / "checkpoints"))
    torch.testing.assert_close(saved["model"]["linear.weight"][0], average)
    assert torch.equal(saved["average"]["model"]["linear.weight"][0], after[-1])
    # The average is what is validated.
    assert errors_of(tmp_path) == [pytest.approx(float((average - toy.TARGET).norm()), rel=1e-4)]


class Stops(toy.ToyTask):
    """Interrupted in step 54, after a checkpoint at 50."""

    def loss(self, network, batch):
        self.losses = getattr(self, "losses", 0) + 1
        if self.losses == 2 * 54:
            raise KeyboardInterrupt
        return super().loss(network, batch)


def test_average_and_best_resume_exactly(tmp_path):
    options = {"ema_decay": 0.9, "best_metric": "val/error", "validate_every": 10, "lr": 0.02}
    whole = toy.train(tmp_path / "whole", toy.ToyTask(toy.recipe(**options)))
    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path / "cut", Stops(toy.recipe(**options)))
    resumed = toy.train(tmp_path / "cut", toy.ToyTask(toy.recipe(**options)))
    assert resumed.first_step == 50
    for a, b in (
        (whole.model, resumed.model), (whole.average.model, resumed.average.model)
    ):  # fmt: skip
        assert torch.equal(a.linear.weight, b.linear.weight)
    assert whole.best.state() == resumed.best.state()
    best = [load_checkpoint(tmp_path / f / "checkpoints" / "best.pt") for f in ("whole", "cut")]
    assert torch.equal(*(saved["model"]["linear.weight"] for saved in best))
    assert errors_of(tmp_path / "whole") == errors_of(tmp_path / "cut")


class Scripted(toy.ToyTask):
    """Its validations have given results."""

    results = (3.0, 1.0, 2.0, 1.5, 1.0, 0.5)

    def validate(self, model, step, log):
        self.validated.append(step)
        log.write("val", step, {"error": self.results[step // 10 - 1], "top1": step // 10 % 4})


@pytest.mark.parametrize(("metric", "best"), [("val/error", 60), ("val/top1", 30)])
def test_best_checkpoint_is_that_of_the_named_metric(tmp_path, metric, best):
    recipe = toy.recipe(best_metric=metric, validate_every=10, keep_checkpoints=1)
    toy.train(tmp_path, Scripted(recipe))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.pt", "step_00000060.pt"]
    saved = load_checkpoint(tmp_path / "checkpoints" / "best.pt")
    assert (saved["step"], saved["best"]["step"]) == (best, best)


def test_run_stops_early_and_stays_stopped(tmp_path):
    recipe = toy.recipe(best_metric="val/error", patience=3, validate_every=10)
    task = Scripted(recipe)
    toy.train(tmp_path, task)
    assert task.validated == [10, 20, 30, 40, 50]  # best after 20; an equal result is not better
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step_00000050.pt"
    again = Scripted(recipe)
    toy.train(tmp_path, again)
    assert again.validated == []


def test_defaults_save_no_average_and_no_best(tmp_path):
    loop = TrainingLoop(
        toy.ToyTask(toy.recipe(steps=2)), toy.recipe(steps=2),
        config=toy.ToyConfig(toy.recipe(steps=2)), seed=0, output_dir=tmp_path,
    )  # fmt: skip
    assert loop.average is None
    loop.run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002.pt"]
