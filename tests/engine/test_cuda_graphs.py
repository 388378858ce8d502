"""Training as CUDA graphs is training without them."""

import copy

import pytest
import torch
from torch import nn

from i3d_gn.data.to_device import ToDevice
from i3d_gn.engine.cuda_graphs import can_capture, launch_as_graphs
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.trainer import Trainer
from i3d_gn.models import i3d_tiny
from tests.engine.test_trainer import TO_DEVICE, OnlyLoss, clip_batch

GPU = torch.device("cuda")


def batch_on_gpu(seed):
    batch = clip_batch(2, seed=seed)
    return batch._replace(
        inputs=batch.inputs.to(GPU), labels=batch.labels.to(GPU), weights=batch.weights.to(GPU)
    )


def trainer_for(model, *, graphs, precision="fp32", micro_batches=1):
    to_device = ToDevice(device=GPU, mean=TO_DEVICE.mean, std=TO_DEVICE.std, precision=precision)
    task = OnlyLoss(to_device, Process(0, 1, GPU))
    if graphs:
        launch_as_graphs(model)
    return Trainer(
        model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9), task.loss,
        micro_batches=micro_batches, process=task.process, seed=0,
        gradients_are_overwritten=graphs,
    )  # fmt: skip


def network(norm):
    torch.manual_seed(0)
    model = i3d_tiny(norm, num_classes=6, dropout=0.5)
    return model.to(GPU, memory_format=torch.channels_last_3d)


def flat(tensors):
    return torch.cat([t.detach().float().flatten() for t in tensors])


def assert_close(actual, expected, rtol):
    assert (actual - expected).norm() < rtol * expected.norm()


def test_only_networks_on_a_gpu_are_captured():
    assert not can_capture(i3d_tiny(num_classes=2))


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("norm", ["gn", "bn", "brn"])
    @pytest.mark.parametrize("micro_batches", [1, 3])
    @pytest.mark.parametrize(("precision", "rtol"), [("fp32", 1e-3), ("bf16", 0.1)])
    def test_every_step_is_the_same(self, norm, micro_batches, precision, rtol, monkeypatch):
        """Each from the same state: batch norm of two clips soon amplifies rounding errors."""
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        eager, graphed = network(norm), network(norm)
        options = {"micro_batches": micro_batches, "precision": precision}
        trainers = [
            trainer_for(model, graphs=model is graphed, **options) for model in (eager, graphed)
        ]
        for step in range(3):
            graphed.load_state_dict(eager.state_dict())
            for trainer in trainers:
                first = step * micro_batches
                trainer.step(step, iter([batch_on_gpu(first + i) for i in range(micro_batches)]))
            assert_close(flat(p.grad for p in graphed.parameters()),
                         flat(p.grad for p in eager.parameters()), rtol)  # fmt: skip
            if norm != "gn":
                assert_close(flat(graphed.buffers()), flat(eager.buffers()), rtol)

    def test_other_inputs_and_evaluation_run_without_graphs(self):
        torch.manual_seed(0)
        model = i3d_tiny(num_classes=6, dropout=0.0).to(GPU)
        reference = copy.deepcopy(model)
        launch_as_graphs(model)
        clips = torch.randn(2, 3, 8, 36, 36, device=GPU)
        model(clips).sum().backward()
        for other in (clips[:1], torch.randn(2, 3, 8, 48, 48, device=GPU)):
            torch.testing.assert_close(model(other), reference(other), rtol=1e-3, atol=1e-4)
        model.eval(), reference.eval()
        torch.testing.assert_close(model(clips), reference(clips), rtol=1e-3, atol=1e-4)
        assert can_capture(model)
        assert not can_capture(nn.Sequential(model, nn.SyncBatchNorm(2).to(GPU)))


@pytest.mark.gpu
def test_two_ranks_with_graphs_train_as_without(tmp_path):
    """Both ranks share the GPU, which NCCL does not allow; gloo reduces tensors of a GPU too."""
    results = {}
    for graphs in (False, True):
        path = tmp_path / f"{graphs}.pt"
        store = tmp_path / f"store-{graphs}"
        torch.multiprocessing.spawn(_train_rank, args=(graphs, str(store), str(path)), nprocs=2)
        results[graphs] = torch.load(path)
    for name, value in results[True].items():
        torch.testing.assert_close(value, results[False][name], rtol=1e-2, atol=2e-4, msg=name)


def _train_rank(rank: int, graphs: bool, store: str, path: str) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, 2), rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = i3d_tiny("gn", num_classes=6, dropout=0.5).to(GPU)
    if graphs:
        launch_as_graphs(model)
    task = OnlyLoss(
        ToDevice(device=GPU, mean=TO_DEVICE.mean, std=TO_DEVICE.std, precision="fp32"),
        Process(rank, 2, GPU),
    )
    trainer = Trainer(
        nn.parallel.DistributedDataParallel(model),
        torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
        task.loss, micro_batches=2, process=task.process, seed=0,
        gradients_are_overwritten=graphs,
    )  # fmt: skip
    for step in range(3):
        trainer.step(step, iter([batch_on_gpu(4 * step + 2 * i + rank) for i in range(2)]))
    if rank == 0:
        torch.save({name: value.cpu() for name, value in model.state_dict().items()}, path)
    torch.distributed.destroy_process_group()
