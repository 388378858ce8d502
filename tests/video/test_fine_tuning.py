"""What fine-tuning needs besides the paper's recipe; each option changes what it says."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from i3d_gn.data.batches import Batch, Sample, Stream
from i3d_gn.data.to_device import ToDevice
from i3d_gn.data.transforms import rand_augment
from i3d_gn.engine.checkpoint import load_checkpoint
from i3d_gn.engine.classification import ClassificationTask, LossOptions
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.mixing import MixSamples
from i3d_gn.engine.precise_bn import get_bn_modules
from i3d_gn.engine.run_log import read_log
from i3d_gn.models import i3d_tiny
from i3d_gn.models.resnet2d import resnet_tiny
from i3d_gn.video import build
from i3d_gn.video.evaluate import evaluate
from i3d_gn.video.train import train
from i3d_gn.video_io.index import VideoIndex, VideoRecord, write_index
from tests.runs import interrupted_before

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


def test_mixup_mixes_clips_and_targets_in_one_ratio():
    torch.manual_seed(0)
    clips, labels = torch.rand(4, 3, 2, 5, 6), torch.tensor([0, 1, 2, 2])
    mixed, targets = MixSamples(3, mixup=1.0, cutmix=0.0)(clips.clone(), labels)
    ratio = targets[0, 0]
    assert 0 < ratio < 1
    expected = ratio * clips + (1 - ratio) * clips.roll(1, 0)
    torch.testing.assert_close(mixed, expected)
    one_hot = F.one_hot(labels, 3).float()
    torch.testing.assert_close(targets, ratio * one_hot + (1 - ratio) * one_hot.roll(1, 0))


def test_cutmix_replaces_one_window_of_all_frames():
    torch.manual_seed(3)
    clips, labels = torch.rand(2, 3, 4, 16, 16), torch.tensor([0, 1])
    mixed, targets = MixSamples(2, mixup=0.0, cutmix=1.0)(clips.clone(), labels)
    replaced = mixed != clips
    assert 0 < replaced.float().mean() < 1
    assert torch.equal(replaced, replaced[:1, :1, :1].expand_as(replaced))
    assert torch.equal(mixed[replaced], clips.roll(1, 0)[replaced])
    assert 1 - targets[0, 0] == pytest.approx(replaced.float().mean())


def test_mixed_clips_keep_their_memory_format():
    clips = torch.rand(2, 3, 2, 4, 4).contiguous(memory_format=torch.channels_last_3d)
    mixed, _ = MixSamples(2, mixup=1.0, cutmix=1.0)(clips, torch.tensor([0, 1]))
    assert mixed.is_contiguous(memory_format=torch.channels_last_3d)


def test_loss_of_mixed_clips_is_that_of_their_targets(batch):
    torch.manual_seed(1)
    loss = loss_of(batch, mix=MixSamples(3, mixup=1.0, cutmix=0.0))
    torch.manual_seed(1)
    inputs = Task(LossOptions()).to_device(batch.inputs)
    mixed, targets = MixSamples(3, mixup=1.0, cutmix=0.0)(inputs, batch.labels)
    torch.testing.assert_close(loss, F.cross_entropy(Logits()(mixed), targets))


def test_rand_augment_is_the_same_for_all_frames_and_a_function_of_the_seed():
    frame = np.random.default_rng(0).integers(0, 256, (1, 12, 14, 3), dtype=np.uint8)
    clips = []
    for seed in (*range(6), 0):
        clip = frame.repeat(3, axis=0)
        rand_augment(clip, magnitude=20, rng=np.random.default_rng(seed))
        assert (clip == clip[:1]).all()
        clips.append(clip)
    np.testing.assert_array_equal(clips[0], clips[-1])
    assert sum((clip != frame).any() for clip in clips[:-1]) >= 4
    before = torch.random.get_rng_state()
    rand_augment(clips[0], magnitude=20, rng=np.random.default_rng(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_augmented_clips_depend_on_the_position_alone(small_run, motion_set):
    index = VideoIndex.load(motion_set.train_index)
    config = small_run("clip.rand_augment=15")
    clips = build.random_clips(index, config, stream=Stream.TRAIN_CLIP)
    samples = [Sample(7, 0), Sample(8, 1), Sample(9, 0)]
    together = clips[samples].inputs
    alone = [clips[[sample]].inputs[0] for sample in samples]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    plain = build.random_clips(index, small_run(), stream=Stream.TRAIN_CLIP)[samples].inputs
    assert not torch.equal(together, plain)
    for stream in (Stream.VALIDATION_CLIP, Stream.PRECISE_BN_CLIP):
        assert build.random_clips(index, config, stream=stream).rand_augment == 0


def test_resume_with_every_option_is_bit_identical(small_run, tmp_path):
    """Stopped after step 3 of 4; resumed with two loader workers instead of none."""
    options = [
        "train.steps=4", "train.milestones=[]", "train.checkpoint_every=3",
        "train.optimizer=adamw", "train.lr=1e-3", "train.lr_multipliers=[0,1,1,1,1,10]",
        "train.label_smoothing=0.1", "train.mixup=0.3", "train.cutmix=1", "clip.rand_augment=9",
        "train.class_weights=balanced", "train.ema_decay=0.5", "train.best_metric=val/loss",
        "train.validate_every=4",
    ]  # fmt: skip
    train(small_run(*options, output_dir=tmp_path / "whole"), PROCESS)
    with interrupted_before(3):
        train(small_run(*options, output_dir=tmp_path / "cut"), PROCESS)
    train(small_run(*options, "data.num_workers=2", output_dir=tmp_path / "cut"), PROCESS)
    saved = [
        load_checkpoint(tmp_path / name / "checkpoints" / file)
        for name in ("whole", "cut")
        for file in ("step_00000004.pt", "best.pt")
    ]
    assert [s["step"] for s in saved] == [4] * 4
    for key, value in saved[0]["model"].items():
        assert all(torch.equal(value, other["model"][key]) for other in saved[1:]), key
    for key, value in saved[0]["average"]["model"].items():
        assert torch.equal(value, saved[2]["average"]["model"][key]), key
    lines = [
        [{k: v for k, v in line.items() if k != "timing"} for line in read_log(f / "log.jsonl")]
        for f in (tmp_path / "whole", tmp_path / "cut")
    ]
    assert lines[0] == lines[1]


def test_standardized_kernels_start_from_inflated_weights_and_are_trained(small_run, tmp_path):
    """Against the formula of Qiao et al., arXiv:1903.10520; a checkpoint of it can be tested."""
    torch.manual_seed(0)
    image = resnet_tiny("gn", 5)
    torch.save(image.state_dict(), tmp_path / "image.pth")
    options = ["model.kernel_norm=weight_standardization", "train.steps=2"]
    weights = [f"model.weights={tmp_path / 'image.pth'}", "data.mean=[0.4,0.4,0.4]",
               "data.std=[0.2,0.2,0.2]"]  # fmt: skip
    config = small_run(*options, *weights)
    model = build.build_model(config, PROCESS.device)
    build.load_starting_weights(model, config)
    kernel = image.res3[0].conv2.weight.detach().double()[:, :, None]
    mean = kernel.mean((1, 2, 3, 4), keepdim=True)
    variance = kernel.var((1, 2, 3, 4), correction=0, keepdim=True)
    expected = (kernel - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(model.res3[0].conv2.weight.double(), expected, rtol=1e-4, atol=1e-4)
    train(config, PROCESS)
    assert evaluate(config, None, PROCESS)["num_videos"] == 6
    with pytest.raises(ValueError, match="model.kernel_norm: weight_standardization -> None"):
        evaluate(small_run("train.steps=2"), None, PROCESS)
