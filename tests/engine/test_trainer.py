import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from i3d_gn.data.batches import ClipBatch
from i3d_gn.data.to_device import DeviceClips
from i3d_gn.engine.metrics import RunningMetrics
from i3d_gn.engine.trainer import (
    NonFiniteLossError,
    Trainer,
    batch_norm_layers,
    reestimate_bn_statistics,
    validate,
)
from i3d_gn.models import i3d_tiny

TO_DEVICE = DeviceClips(
    device=torch.device("cpu"), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), precision="fp32"
)


def clip_batch(n: int, *, seed: int = 0, broken: tuple[str, ...] = ()) -> ClipBatch:
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randint(0, 256, (n, 8, 36, 36, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 6, (n,), generator=generator)
    return ClipBatch(clips, labels, torch.ones(n), broken)


def trainer_for(model: nn.Module, *, clips_per_gpu=2, micro_batches=1, clip_grad_norm=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    return Trainer(
        model,
        optimizer,
        to_device=TO_DEVICE,
        clips_per_gpu=clips_per_gpu,
        micro_batches=micro_batches,
        rank=0,
        world_size=1,
        seed=0,
        clip_grad_norm=clip_grad_norm,
    )


def small_model(norm="gn", dropout=0.0):
    torch.manual_seed(0)
    return i3d_tiny(norm=norm, num_classes=6, dropout=dropout)


def test_a_step_is_sgd_on_the_mean_loss_of_the_global_batch():
    model = small_model()
    reference = copy.deepcopy(model)
    batches = [clip_batch(2, seed=1), clip_batch(2, seed=2)]
    trainer_for(model, micro_batches=2).step(0, iter(batches))

    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    clips = torch.cat([b.clips for b in batches]).permute(0, 4, 1, 2, 3).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in (TO_DEVICE.mean, TO_DEVICE.std))
    logits = reference((clips - mean) / std)
    F.cross_entropy(logits, torch.cat([b.labels for b in batches])).backward()
    optimizer.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_clip_left_out_contributes_no_gradient_and_changes_no_other():
    with_gap, scaled = small_model(), small_model()
    batch = clip_batch(1)
    trainer = trainer_for(with_gap, clips_per_gpu=2)
    assert trainer.step(0, iter([batch._replace(broken=("gone",))])) == ["gone"]
    assert trainer.metrics.read_and_reset()["broken"] == 1
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    (F.cross_entropy(scaled(TO_DEVICE(batch.clips)), batch.labels) / 2).backward()
    optimizer.step()
    for ours, theirs in zip(with_gap.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_micro_batch_with_no_clip_at_all_leaves_the_network_alone():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    blank = ClipBatch(
        torch.zeros(1, 8, 36, 36, 3, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1),
        ("a", "b"),
    )
    trainer_for(model).step(0, iter([blank]))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_dropout_depends_on_seed_step_and_micro_batch_alone():
    results = []
    for noise in (1, 2):
        model = small_model(dropout=0.5)
        trainer = trainer_for(model)
        torch.manual_seed(noise)
        trainer.step(3, iter([clip_batch(2)]))
        results.append(model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=0, atol=0)
    other_step = small_model(dropout=0.5)
    trainer_for(other_step).step(4, iter([clip_batch(2)]))
    assert not torch.equal(other_step.head.linear.weight, results[0]["head.linear.weight"])


def test_gradient_clipping_bounds_the_step():
    model = small_model()
    before = copy.deepcopy(model)
    trainer_for(model, clip_grad_norm=1e-3).step(0, iter([clip_batch(2)]))
    moved = [
        (a - b).detach().norm()
        for a, b in zip(model.parameters(), before.parameters(), strict=True)
    ]
    # Nesterov's first step is lr * (1 + momentum) * gradient.
    assert float(torch.stack(moved).norm()) == pytest.approx(0.1 * 1.9 * 1e-3, rel=1e-3)


def test_a_loss_that_is_not_finite_is_reported_with_its_step():
    model = small_model()
    trainer = trainer_for(model)
    trainer.step(0, iter([clip_batch(2)]))
    trainer.check_finite(parameters=True)
    with torch.no_grad():
        model.head.linear.bias[0] = float("inf")
    with pytest.raises(NonFiniteLossError, match="a parameter is not finite"):
        trainer.check_finite(parameters=True)
    trainer.step(1, iter([clip_batch(2)]))
    trainer.step(2, iter([clip_batch(2)]))
    with pytest.raises(NonFiniteLossError, match="not finite at step 2"):
        trainer.check_finite()


def test_precise_bn_is_the_population_of_all_batches():
    model = small_model("bn")
    batches = [clip_batch(2, seed=s) for s in range(4)]
    seen = []
    hook = model.norm1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    reestimate_bn_statistics(model, batches, TO_DEVICE)
    hook.remove()
    everything = torch.cat(seen).double().transpose(0, 1).flatten(1)
    mean, var = model.norm1.running_mean, model.norm1.running_var
    torch.testing.assert_close(mean.double(), everything.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), everything.var(1, correction=0), rtol=1e-5, atol=1e-6)
    assert len(batch_norm_layers(model)) == 17
    assert not batch_norm_layers(small_model("gn"))
    assert not batch_norm_layers(small_model("frozen_bn"))


def test_precise_bn_leaves_out_what_could_not_be_decoded(tmp_path):
    blank = ClipBatch(
        torch.zeros(1, 8, 36, 36, 3, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1),
        ("a", "b"),
    )
    whole, gap = small_model("bn"), small_model("bn")
    assert reestimate_bn_statistics(whole, [clip_batch(2)], TO_DEVICE) == []
    broken = reestimate_bn_statistics(gap, [clip_batch(2), blank], TO_DEVICE)
    assert broken == ["a", "b"]
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(value, gap.state_dict()[key], rtol=0, atol=0)


def test_precise_bn_is_no_training_batch_to_the_schedule_of_batch_renorm():
    model = small_model("brn")
    trainer_for(model).step(0, iter([clip_batch(2)]))
    reestimate_bn_statistics(model, [clip_batch(2, seed=s) for s in range(3)], TO_DEVICE)
    assert int(model.norm1.num_batches_tracked) == 1


def test_validation_counts_every_clip_and_touches_nothing():
    model = small_model("bn")
    before = copy.deepcopy(model.state_dict())
    batches = [clip_batch(2, seed=1), clip_batch(1, seed=2, broken=("gone",))]
    values, broken = validate(model, batches, TO_DEVICE)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(TO_DEVICE(b.clips)) for b in batches])
    labels = torch.cat([b.labels for b in batches])
    assert values["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert (values["clips"], values["broken"], broken) == (3, 1, ["gone"])
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_close_to_fp32(precision):
    reduced = DeviceClips(
        device=torch.device("cpu"), mean=TO_DEVICE.mean, std=TO_DEVICE.std, precision=precision
    )
    losses = []
    for to_device in (TO_DEVICE, reduced):
        model = small_model()
        trainer = trainer_for(model)
        trainer.to_device = to_device
        for step in range(3):
            trainer.step(step, iter([clip_batch(2)]))
        losses.append(trainer.metrics.read_and_reset()["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_a_gpu_never_waits_for_it(precision):
    device = torch.device("cuda")
    to_device = DeviceClips(
        device=device, mean=TO_DEVICE.mean, std=TO_DEVICE.std, precision=precision
    )
    losses = {}
    for place in ("cpu", "cuda"):
        model = small_model().to(place, memory_format=torch.channels_last_3d)
        trainer = trainer_for(model)
        trainer.to_device = to_device if place == "cuda" else TO_DEVICE
        trainer.metrics = RunningMetrics(trainer.to_device.device)
        trainer._first_bad_step = trainer._first_bad_step.to(place)
        batches = [clip_batch(2, seed=s) for s in range(4)]
        if place == "cuda":
            batches = [
                b._replace(
                    clips=b.clips.pin_memory(),
                    labels=b.labels.pin_memory(),
                    weights=b.weights.pin_memory(),
                )
                for b in batches
            ]
        trainer.step(0, iter(batches[:1]))  # allocations and algorithm choices may wait
        torch.cuda.set_sync_debug_mode("error" if place == "cuda" else "default")
        try:
            for step, batch in enumerate(batches[1:], start=1):
                trainer.step(step, iter([batch]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses[place] = trainer.metrics.read_and_reset()["loss"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)
