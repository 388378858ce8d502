import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from i3d_gn.data.batches import Batch
from i3d_gn.data.to_device import ToDevice
from i3d_gn.engine.checkpoint import CheckpointError
from i3d_gn.engine.classification import ClassificationTask, saved_normalization, validate
from i3d_gn.engine.command import NonFiniteLossError
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.trainer import Trainer
from i3d_gn.models import i3d_tiny

TO_DEVICE = ToDevice(
    device=torch.device("cpu"), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), precision="fp32"
)


CPU = Process(0, 1, torch.device("cpu"))


def clip_batch(n: int, *, seed: int = 0, broken: tuple[str, ...] = ()) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randint(0, 256, (n, 8, 36, 36, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 6, (n,), generator=generator)
    return Batch(clips, labels, torch.ones(n), broken)


class OnlyLoss(ClassificationTask):
    """The part of a task that a trainer needs."""

    build_model = data = load_weights = load_state = training_batches = validate = None

    def __init__(self, to_device=TO_DEVICE, process=CPU):
        super().__init__(process, micro_batch_size=2)
        self.to_device = to_device


def trainer_for(model: nn.Module, *, task=None, micro_batches=1, clip_grad_norm=None):
    task = OnlyLoss() if task is None else task
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    return Trainer(
        model,
        optimizer,
        task.loss,
        micro_batches=micro_batches,
        process=task.process,
        seed=0,
        clip_grad_norm=clip_grad_norm,
    )


def small_model(norm="gn", dropout=0.0):
    torch.manual_seed(0)
    return i3d_tiny(norm=norm, num_classes=6, dropout=dropout)


def test_step_is_sgd_on_the_mean_loss_of_the_global_batch():
    model = small_model()
    reference = copy.deepcopy(model)
    batches = [clip_batch(2, seed=1), clip_batch(2, seed=2)]
    trainer_for(model, micro_batches=2).step(0, iter(batches))

    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    clips = torch.cat([b.inputs for b in batches]).permute(0, 4, 1, 2, 3).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1, 1) for v in (TO_DEVICE.mean, TO_DEVICE.std))
    logits = reference((clips - mean) / std)
    F.cross_entropy(logits, torch.cat([b.labels for b in batches])).backward()
    optimizer.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_gradients_are_reduced_once_per_step_after_the_last_micro_batch():
    model, drawn, reduced_after = nn.parallel.DistributedDataParallel(small_model()), [], []

    def reduce(_state, bucket):
        reduced_after.append(len(drawn))
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    def batches():
        while True:
            drawn.append(clip_batch(2, seed=len(drawn)))
            yield drawn[-1]

    model.register_comm_hook(None, reduce)
    trainer, stream = trainer_for(model, micro_batches=3), batches()
    for step in range(2):
        trainer.step(step, stream)
    assert set(reduced_after) == {3, 6}


def test_broken_clip_contributes_no_gradient():
    with_gap, scaled = small_model(), small_model()
    batch = clip_batch(1)
    task = OnlyLoss()
    trainer = trainer_for(with_gap, task=task)
    assert trainer.step(0, iter([batch._replace(broken=("gone",))])) == ["gone"]
    assert task.metrics.read_and_reset()["broken"] == 1
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    (F.cross_entropy(scaled(TO_DEVICE(batch.inputs)), batch.labels) / 2).backward()
    optimizer.step()
    for ours, theirs in zip(with_gap.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_micro_batch_without_a_clip_changes_nothing():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    blank = Batch(
        torch.zeros(1, 8, 36, 36, 3, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1),
        ("a", "b"),
    )
    trainer_for(model).step(0, iter([blank]))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_dropout_depends_only_on_seed_step_and_micro_batch():
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


def test_gradient_clipping_limits_the_step():
    model = small_model()
    before = copy.deepcopy(model)
    trainer_for(model, clip_grad_norm=1e-3).step(0, iter([clip_batch(2)]))
    moved = [
        (a - b).detach().norm()
        for a, b in zip(model.parameters(), before.parameters(), strict=True)
    ]
    # Nesterov's first step is lr * (1 + momentum) * gradient.
    assert float(torch.stack(moved).norm()) == pytest.approx(0.1 * 1.9 * 1e-3, rel=1e-3)


def test_non_finite_loss_is_reported_with_its_step():
    model = small_model()
    trainer = trainer_for(model)
    trainer.step(0, iter([clip_batch(2)]))
    trainer.check_finite(everything=True)
    with torch.no_grad():
        model.head.linear.bias[0] = float("inf")
    with pytest.raises(NonFiniteLossError, match=r"parameter head\.linear\.bias is not finite"):
        trainer.check_finite(everything=True)
    trainer.step(1, iter([clip_batch(2)]))
    trainer.step(2, iter([clip_batch(2)]))
    with pytest.raises(NonFiniteLossError, match="not finite at step 2$"):
        trainer.check_finite()
    diverged_at_once = trainer_for(model)
    for step in range(2):
        diverged_at_once.step(step, iter([clip_batch(2)]))
    with pytest.raises(NonFiniteLossError, match="not finite at step 1$"):
        diverged_at_once.check_finite()


def test_everything_that_a_checkpoint_saves_is_checked():
    model = small_model("bn")
    trainer = trainer_for(model)
    trainer.step(0, iter([clip_batch(2)]))
    momentum = trainer.optimizer.state[model.head.linear.bias]["momentum_buffer"]
    for what, tensor in (
        ("buffer norm1.running_var", model.norm1.running_var),
        ("momentum_buffer of head.linear.bias", momentum),
    ):
        before = tensor[0].item()
        tensor[0] = float("nan")
        trainer.check_finite()
        with pytest.raises(NonFiniteLossError, match=what):
            trainer.check_finite(everything=True)
        tensor[0] = before
    trainer.check_finite(everything=True)


def test_validation_counts_every_clip_and_changes_nothing():
    model = small_model("bn")
    before = copy.deepcopy(model.state_dict())
    batches = [clip_batch(2, seed=1), clip_batch(1, seed=2, broken=("gone",))]
    values, broken = validate(model, batches, TO_DEVICE)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(TO_DEVICE(b.inputs)) for b in batches])
    labels = torch.cat([b.labels for b in batches])
    assert values["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert (values["samples"], values["broken"], broken) == (3, 1, ["gone"])
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_validation_without_a_sample_is_an_error():
    blank = clip_batch(1, broken=("a: damaged",))._replace(weights=torch.zeros(1))
    with pytest.raises(ValueError, match="no sample of the validation.*: a: damaged"):
        validate(small_model(), [blank], TO_DEVICE)


def test_normalization_is_saved_with_the_weights():
    assert saved_normalization(OnlyLoss().state()) == (TO_DEVICE.mean, TO_DEVICE.std)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({}, "mean is None"),
        ({"input": [0.5, 0.2]}, "mean is None"),
        ({"input": {"mean": [0.5] * 3, "std": [0.2] * 2}}, r"std is \[0.2, 0.2\]"),
        ({"input": {"mean": [0.5] * 3, "std": 0.2}}, "std is 0.2"),
        ({"input": {"mean": ["a"] * 3, "std": [0.2] * 3}}, "mean is .*'a'"),
    ],
)
def test_damaged_normalization_is_an_error(saved, message):
    with pytest.raises(CheckpointError, match=message):
        saved_normalization(saved)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_network_runs_in_its_precision_and_the_loss_in_float32(precision, dtype):
    to_device = ToDevice(
        device=torch.device("cpu"), mean=TO_DEVICE.mean, std=TO_DEVICE.std, precision=precision
    )
    logits = []
    model = small_model().eval()
    model.register_forward_hook(lambda *args: logits.append(args[2]))
    batch = clip_batch(2)
    loss = OnlyLoss(to_device).loss(model, batch)
    assert (logits[0].dtype, loss.dtype) == (dtype, torch.float32)
    assert torch.equal(loss, F.cross_entropy(logits[0].float(), batch.labels))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_close_to_fp32(precision):
    reduced = ToDevice(
        device=torch.device("cpu"), mean=TO_DEVICE.mean, std=TO_DEVICE.std, precision=precision
    )
    losses = []
    for to_device in (TO_DEVICE, reduced):
        task = OnlyLoss(to_device)
        trainer = trainer_for(small_model(), task=task)
        for step in range(3):
            trainer.step(step, iter([clip_batch(2)]))
        losses.append(task.metrics.read_and_reset()["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_on_a_gpu_never_synchronizes(precision):
    device = torch.device("cuda")
    to_device = ToDevice(device=device, mean=TO_DEVICE.mean, std=TO_DEVICE.std, precision=precision)
    losses = {}
    for place in ("cpu", "cuda"):
        model = small_model().to(place, memory_format=torch.channels_last_3d)
        task = OnlyLoss(to_device, Process(0, 1, device)) if place == "cuda" else OnlyLoss()
        trainer = trainer_for(model, task=task)
        batches = [clip_batch(2, seed=s) for s in range(4)]
        if place == "cuda":
            batches = [
                b._replace(
                    inputs=b.inputs.pin_memory(),
                    labels=b.labels.pin_memory(),
                    weights=b.weights.pin_memory(),
                )
                for b in batches
            ]
        trainer.step(0, iter(batches[:1]))  # allocations and algorithm selection may synchronize
        torch.cuda.set_sync_debug_mode("error" if place == "cuda" else "default")
        try:
            for step, batch in enumerate(batches[1:], start=1):
                trainer.step(step, iter([batch]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses[place] = task.metrics.read_and_reset()["loss"]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)


@pytest.mark.parametrize("clip_grad_norm", [None, 1e-3])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_gradient_norm_is_that_of_the_mean_loss_before_clipping(clip_grad_norm, scale):
    model = small_model()
    reference = copy.deepcopy(model)
    batch = clip_batch(2)
    F.cross_entropy(reference(TO_DEVICE(batch.inputs)), batch.labels).backward()
    expected = sum((p.grad.double() ** 2).sum() for p in reference.parameters()).sqrt()
    trainer = trainer_for(model, clip_grad_norm=clip_grad_norm)
    if scale is not None:
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.measure_gradient = True
    trainer.step(0, iter([batch]))
    assert float(trainer.gradient_norm) == pytest.approx(float(expected), rel=1e-4)


def test_gradient_norm_is_not_measured_unless_asked_for():
    trainer = trainer_for(small_model())
    trainer.step(0, iter([clip_batch(2)]))
    assert trainer.gradient_norm is None
