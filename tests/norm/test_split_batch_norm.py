import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from i3d_gn.models.resnet2d import ResNet2d
from i3d_gn.norm import SplitBatchNorm, make_norm

WORKERS, SAMPLES, STEPS = 8, 2, 3


def network(stats_batch_size):
    torch.manual_seed(0)
    return ResNet2d(
        (1, 1, 1, 1),
        norm=lambda c: make_norm("bn", c, spatial_dims=2, stats_batch_size=stats_batch_size),
        num_classes=5,
        width=4,
        zero_init_last_norm=False,
    ).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.randn(WORKERS * SAMPLES, 3, 40, 40, generator=generator).double()
        yield images * 3 + 1, torch.randint(0, 5, (WORKERS * SAMPLES,), generator=generator)


def train(model, module, mine):
    """Train on the samples `mine`; losses and the state after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, states = [], []
    for images, labels in batches():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[mine]), labels[mine])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        states.append({k: v.clone() for k, v in module.state_dict().items()})
    return torch.stack(losses), states


def train_rank(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORKERS
    )
    module = network(None)
    mine = slice(rank * SAMPLES, (rank + 1) * SAMPLES)
    losses, states = train(DistributedDataParallel(module), module, mine)
    dist.all_reduce(losses)
    if rank == 0:
        torch.save((losses / WORKERS, states), f"{folder}/eight.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_one_process_equals_eight_data_parallel_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["i3d_gn.models.resnet2d", "torch.nn.parallel"])
    mp.start_processes(train_rank, (port, str(tmp_path)), nprocs=WORKERS, start_method="forkserver")
    losses, states = torch.load(tmp_path / "eight.pt")
    module = network(SAMPLES)
    ours, our_states = train(module, module, slice(None))
    torch.testing.assert_close(ours, losses, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(our_states, states, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-7, atol=1e-9, msg=key)
    # Statistics over the whole batch give another result.
    whole = network(None)
    assert (train(whole, whole, slice(None))[0] - losses).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (6, 5, 2, 4, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_each_part_equals_a_separate_batch_norm(shape, channels_last):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 1
    if channels_last:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        x = x.to(memory_format=formats[x.dim()])
    for n in (1, 2):
        layer = SplitBatchNorm(5, n, eps=0.1, momentum=0.3)
        worker0 = (nn.BatchNorm2d if x.dim() == 4 else nn.BatchNorm3d)(5, eps=0.1, momentum=0.3)
        others = [F.batch_norm(p, None, None, training=True, eps=0.1) for p in x[n:].split(n)]
        torch.testing.assert_close(
            layer(x), torch.cat([worker0(x[:n]), *others]), rtol=0, atol=1e-6
        )
        assert all(torch.equal(v, layer.state_dict()[k]) for k, v in worker0.state_dict().items())
    layer.eval(), worker0.eval()
    assert torch.equal(layer(x), worker0(x))
    assert torch.equal(layer(x[:1]), worker0(x[:1]))


def test_options_and_defaults():
    layer = make_norm("bn", 5, eps=0.1, stats_batch_size=2)
    assert (layer.num_features, layer.stats_batch_size, layer.eps) == (5, 2, 0.1)
    default, batch_norm = SplitBatchNorm(5, 2), nn.BatchNorm2d(5)
    assert (default.eps, default.momentum) == (batch_norm.eps, batch_norm.momentum)


def test_errors():
    layer = SplitBatchNorm(5, 4)
    for shape in ((4, 6, 2, 2), (8,)):
        for training in (False, True):
            with pytest.raises(ValueError, match="C = 5"):
                layer.train(training)(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"6 samples is not a multiple of stats_batch_size=4"):
        layer(torch.zeros(6, 5, 2, 2))
    for name in ("gn", "sync_bn", "none"):
        with pytest.raises(ValueError, match=r"stats_batch_size=4 is for norms 'bn' and 'brn'"):
            make_norm(name, 32, stats_batch_size=4)
    with pytest.raises(ValueError, match="at least 1"):
        make_norm("bn", 32, stats_batch_size=0)
    with pytest.raises(ValueError, match="stats_batch_size=-2.*at least 1"):
        SplitBatchNorm(32, -2)
