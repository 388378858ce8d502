"""What fine-tuning needs besides the paper's recipe; each option changes what it says."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from i3d_gn.data.batches import Batch
from i3d_gn.data.to_device import ToDevice
from i3d_gn.engine.classification import ClassificationTask, LossOptions
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.precise_bn import get_bn_modules
from i3d_gn.models import i3d_tiny
from i3d_gn.video import build
from i3d_gn.video_io.index import VideoIndex, VideoRecord, write_index

PROCESS = Process(0, 1, torch.device("cpu"))


def test_frozen_stages_stay_as_they_are():
    torch.manual_seed(0)
    model = i3d_tiny("bn", num_classes=3, dropout=0.0, zero_init_last_norm=False)
    model.freeze(2)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.rand(2, 3, 8, 32, 32)).square().sum().backward()
    optimizer.step()
    changed = {
        key.partition(".")[0]
        for key, value in model.state_dict().items()
        if not torch.equal(value, before[key])
    }
    assert changed == {"res3", "res4", "res5", "head"}
    assert all(p.grad is None for p in [*model.conv1.parameters(), *model.res2.parameters()])
    frozen = {*model.norm1.modules(), *model.res2.modules()}
    assert not frozen & {*get_bn_modules(model)}
    assert len(get_bn_modules(model)) == 12


def test_gradients_of_trained_stages_do_not_depend_on_freezing_the_others():
    torch.manual_seed(0)
    model = i3d_tiny("gn", num_classes=3, dropout=0.0, zero_init_last_norm=False)
    clips, gradients = torch.rand(2, 3, 8, 32, 32), []
    for num_frozen in (0, 3):
        model.freeze(num_frozen)
        model.zero_grad()
        model(clips).square().sum().backward()
        gradients.append([p.grad for p in model.res5.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Task(ClassificationTask):
    """Only its loss is used."""

    build_model = data = load_weights = load_state = training_batches = validate = None

    def __init__(self, options):
        super().__init__(PROCESS, micro_batch_size=4)
        self.loss_options = options
        self.to_device = ToDevice(
            device=PROCESS.device, mean=(0.5,) * 3, std=(0.5,) * 3, precision="fp32"
        )


@pytest.fixture
def batch():
    clips = torch.randint(0, 256, (4, 2, 8, 8, 3), dtype=torch.uint8)
    return Batch(clips, torch.tensor([0, 1, 1, 2]), torch.ones(4), ())


class Logits(nn.Module):
    """Means of the channels as logits."""

    def forward(self, x):
        return 3 * x.mean((2, 3, 4))


def loss_of(batch, **options):
    return Task(LossOptions(**options)).loss(Logits(), batch)


def log_probabilities(batch):
    inputs = Task(LossOptions()).to_device(batch.inputs)
    return Logits()(inputs).log_softmax(1)


def test_label_smoothing_spreads_the_target(batch):
    targets = 0.7 * F.one_hot(batch.labels, 3) + 0.3 / 3
    expected = -(targets * log_probabilities(batch)).sum(1).mean()
    torch.testing.assert_close(loss_of(batch, label_smoothing=0.3), expected)


def test_class_weights_weigh_samples_by_their_class(batch):
    weights = torch.tensor([4.0, 0.5, 2.0])
    losses = -log_probabilities(batch)[range(4), batch.labels]
    expected = (losses * torch.tensor([4.0, 0.5, 0.5, 2.0])).mean()
    torch.testing.assert_close(loss_of(batch, class_weights=weights), expected)


def test_balanced_weights_give_every_class_the_same_share(tmp_path):
    labels = [0] * 6 + [1] * 3 + [3]
    records = [
        VideoRecord(path=f"{i}.mp4", label=label, num_frames=9, fps=25.0, duration_seconds=1.0,
                    width=8, height=8)
        for i, label in enumerate(labels)
    ]  # fmt: skip
    write_index(tmp_path / "i.parquet", records, class_names=list("abcd"), root=tmp_path)
    weights = build.class_weights(VideoIndex.load(tmp_path / "i.parquet")).numpy()
    shares = np.bincount(labels, weights=weights[labels])
    np.testing.assert_allclose(shares, [10 / 3, 10 / 3, 0, 10 / 3], rtol=1e-6)
