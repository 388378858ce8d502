import pytest
import torch

from i3d_gn.data.batches import Batch
from i3d_gn.data.to_device import ToDevice
from i3d_gn.engine.precise_bn import get_bn_modules, update_bn_stats
from i3d_gn.models import i3d_tiny


def to_device(precision):
    return ToDevice(
        device=torch.device("cpu"), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), precision=precision
    )


TO_DEVICE = to_device("fp32")


def small_model(norm):
    torch.manual_seed(0)
    return i3d_tiny(norm=norm, num_classes=6, dropout=0.0)


def clip_batch(n: int, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    clips = torch.randint(0, 256, (n, 8, 36, 36, 3), dtype=torch.uint8, generator=generator)
    return Batch(clips, torch.zeros(n, dtype=torch.int64), torch.ones(n), ())


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_precise_bn_equals_population_statistics(precision, dtype):
    model = small_model("bn")
    batches = [clip_batch(2, seed=s) for s in range(4)]
    seen = []
    hook = model.norm1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    update_bn_stats(model, batches, to_device(precision))
    hook.remove()
    assert {x.dtype for x in seen} == {dtype}
    everything = torch.cat(seen).double().transpose(0, 1).flatten(1)
    mean, var = model.norm1.running_mean, model.norm1.running_var
    torch.testing.assert_close(mean.double(), everything.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), everything.var(1, correction=0), rtol=1e-5, atol=1e-6)


def test_layers_with_running_statistics():
    assert len(get_bn_modules(small_model("bn"))) == 17
    assert not get_bn_modules(small_model("gn"))
    assert not get_bn_modules(small_model("frozen_bn"))


def test_precise_bn_averages_over_ranks(monkeypatch):
    """Sums over two ranks with the same batches are twice those of one; their mean is the same."""

    def two_equal_ranks(tensor):
        return tensor.mul_(2)  # in place, like `torch.distributed.all_reduce`

    alone, one_of_two = small_model("bn"), small_model("bn")
    batches = [clip_batch(2, seed=s) for s in range(2)]
    update_bn_stats(alone, batches, TO_DEVICE)
    monkeypatch.setattr("i3d_gn.engine.precise_bn.all_reduce_sum", two_equal_ranks)
    update_bn_stats(one_of_two, batches, TO_DEVICE)
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(value, one_of_two.state_dict()[key], rtol=0, atol=0)


def test_precise_bn_uses_batch_statistics_after_a_validation():
    """A later layer's input depends on the mode of the earlier ones."""
    fresh, validated = small_model("bn"), small_model("bn").eval()
    for model in (fresh, validated):
        update_bn_stats(model, [clip_batch(2)], TO_DEVICE)
    for key, value in fresh.state_dict().items():
        torch.testing.assert_close(value, validated.state_dict()[key], rtol=0, atol=0)


def test_precise_bn_skips_batches_without_a_clip():
    blank = Batch(
        torch.zeros(1, 8, 36, 36, 3, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(1),
        ("a", "b"),
    )
    whole, gap = small_model("bn"), small_model("bn")
    assert update_bn_stats(whole, [clip_batch(2)], TO_DEVICE) == []
    broken = update_bn_stats(gap, [clip_batch(2), blank], TO_DEVICE)
    assert broken == ["a", "b"]
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(value, gap.state_dict()[key], rtol=0, atol=0)


def test_precise_bn_does_not_advance_the_schedule_of_batch_renorm():
    model = small_model("brn")
    model.train()(TO_DEVICE(clip_batch(2).inputs))
    update_bn_stats(model, [clip_batch(2, seed=s) for s in range(3)], TO_DEVICE)
    assert int(model.norm1.num_batches_tracked) == 1
