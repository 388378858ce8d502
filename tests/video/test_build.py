"""Every config key reaches the object that it describes."""

import dataclasses
import os
import shutil

import pytest
import torch
from torch import nn

from i3d_gn.data.batches import Batch, Sample, Stream
from i3d_gn.engine.loop import TrainingLoop
from i3d_gn.engine.typed_config import ConfigError
from i3d_gn.models.blocks import Bottleneck
from i3d_gn.video import build, evaluate
from i3d_gn.video.config import Config
from i3d_gn.video.train import VideoTraining
from i3d_gn.video_io.index import VideoIndex


class Built:
    """The objects that a config describes, made when asked for."""

    def __init__(self, config, process, tmp_path, monkeypatch):
        self.config, self.process, self.monkeypatch = config, process, monkeypatch
        self.tmp_path = tmp_path

    @property
    def model(self):
        with torch.device("meta"):
            return build.build_model(self.config, torch.device("meta"))

    def layers(self, kind):
        return [module for module in self.model.modules() if isinstance(module, kind)]

    @property
    def task(self):
        return VideoTraining(self.config, self.process)

    @property
    def loop(self):
        return TrainingLoop(
            self.task, self.config.train, config=self.config, seed=self.config.seed,
            output_dir=self.tmp_path / "run",
        )  # fmt: skip

    @property
    def clips(self):
        return self.task.training_batches(0).dataset

    @property
    def test_videos(self):
        return build.test_videos(VideoIndex.load(self.config.data.val_index), self.config)

    @property
    def scorer(self):
        """The scorer that `evaluate_model` uses."""
        used = []
        self.monkeypatch.setattr(
            evaluate, "score_videos", lambda scorer, *_, **__: used.append(scorer)
        )
        index = VideoIndex.load(self.config.data.val_index)
        evaluate.evaluate_model(
            self.model, index, self.config, None, self.process, folder=self.tmp_path, tag="t"
        )
        return used[0]


def groups_of(built):
    return {layer.num_groups for layer in built.layers(nn.GroupNorm)}


def sgd(built, group):
    return built.loop.optimizer.param_groups[group]


def micro_batches(built):
    return [len(samples) for samples in built.task.training_batches(0).sampler]


def precise_bn_batches(built, monkeypatch_target="i3d_gn.video.train.update_bn_stats"):
    counts = []
    built.monkeypatch.setattr(
        monkeypatch_target, lambda _, batches, __: counts.append(len(batches.sampler)) or []
    )
    task = built.task
    model = task.build_model()
    task.load_weights(model)
    task.validate(model, 1, NoLog())
    return counts


def alphas(mix):
    return mix and [kind.alpha for kind in mix.kinds]


class NoLog:
    def __init__(self):
        self.kinds = []

    def write(self, kind, *_):
        self.kinds.append(kind)


def validation_kinds(built):
    task, log = built.task, NoLog()
    model = task.build_model()
    task.load_weights(model)
    task.validate(model, 1, log)
    return log.kinds


def starting_input(built):
    task = built.task
    task.load_weights(built.model)
    return task.to_device.mean, task.to_device.std


# key -> (overrides, what to look at, expected). The defaults of `small_run` differ from `expected`.
KEYS = {
    "seed": (["seed=7"], lambda b: (b.clips.seed, b.loop.trainer.seed), (7, 7)),
    "output_dir": (["output_dir=o"], lambda b: b.config.output_dir, "o"),
    "model.name": (
        ["model.name=i3d_resnet50", "model.num_groups=8"], lambda b: len(b.layers(Bottleneck)), 16
    ),
    "model.num_classes": (["model.num_classes=9"], lambda b: b.model.head.linear.out_features, 9),
    "model.norm": (["model.norm=bn"], lambda b: len(b.layers(nn.BatchNorm3d)), 17),
    "model.num_groups": (["model.num_groups=4"], groups_of, {4}),
    "model.channels_per_group": (
        ["model.channels_per_group=4"], groups_of, {4, 8, 16, 32, 64, 128}
    ),
    "model.kernel_norm": (
        ["model.kernel_norm=weight_standardization"],
        lambda b: [type(p).__name__ for p in getattr(
            b.model.conv1, "parametrizations", {"weight": ()})["weight"]],
        ["WeightStandardization"],
    ),
    "model.norm_over": (
        ["model.norm_over=hw"],
        lambda b: {layer.over for layer in b.layers(nn.GroupNorm)},
        {"hw"},
    ),
    "model.stem": (["model.stem=8x8"], lambda b: b.model.conv1.stride, (1, 2, 2)),
    "model.inflate": (["model.inflate=false"], lambda b: b.model.conv1.kernel_size, (1, 7, 7)),
    "model.pool_padding": (["model.pool_padding=1"], lambda b: b.model.pool1.padding, (0, 1, 1)),
    "model.stride_in": (
        ["model.stride_in=1x1"], lambda b: b.model.res3[0].conv1.stride, (1, 2, 2)
    ),
    "model.dropout": (["model.dropout=0.3"], lambda b: b.model.head.dropout.p, 0.3),
    "model.zero_init_last_norm": (
        ["model.zero_init_last_norm=false"],
        lambda b: b.loop.model.res2[0].norm3.weight.unique().tolist(), [1.0],
    ),
    "model.checkpoint_stages": (
        ["model.checkpoint_stages=[res3]"], lambda b: b.model.checkpoint_stages, {"res3"}
    ),
    "data.decoder": (
        ["data.decoder=decord"], lambda b: (b.clips.backend, b.test_videos.backend), ("decord",) * 2
    ),
    "data.num_workers": (
        ["data.num_workers=1"], lambda b: b.task.training_batches(0).num_workers, 1
    ),
    "data.mean": (["data.mean=[0.1,0.2,0.3]"], lambda b: starting_input(b)[0], (0.1, 0.2, 0.3)),
    "data.std": (["data.std=[0.4,0.5,0.6]"], lambda b: starting_input(b)[1], (0.4, 0.5, 0.6)),
    "data.max_broken_clips": (["data.max_broken_clips=5"], lambda b: b.loop.task.max_broken, 5),
    "data.timeout_seconds": (
        ["data.timeout_seconds=7"], lambda b: b.task.training_batches(0).timeout_seconds, 7.0
    ),
    "data.max_broken_share": (
        ["data.max_broken_share=0.5"], lambda b: b.loop.task.max_broken_share, 0.5
    ),
    "train.rank_timeout_minutes": (
        ["train.rank_timeout_minutes=3"], lambda b: b.loop.recipe.rank_timeout_minutes, 3.0
    ),
    "clip.num_frames": (
        ["clip.num_frames=4"], lambda b: (b.clips.num_frames, b.test_videos.num_frames), (4, 4)
    ),
    "clip.stride": (["clip.stride=1"], lambda b: (b.clips.stride, b.test_videos.stride), (1, 1)),
    "clip.short_side_min": (["clip.short_side_min=37"], lambda b: b.clips.short_side[0], 37),
    "clip.short_side_max": (["clip.short_side_max=49"], lambda b: b.clips.short_side[1], 49),
    "clip.crop_size": (
        ["clip.crop_size=34"], lambda b: (b.clips.crop_size, b.test_videos.crop_size), (34, 34)
    ),
    "clip.flip_probability": (
        ["clip.flip_probability=0.25"], lambda b: b.clips.flip_probability, 0.25
    ),
    "train.global_batch_size": (
        ["train.global_batch_size=8"], lambda b: b.loop.trainer.micro_batches, 4
    ),
    "train.clips_per_gpu": (["train.clips_per_gpu=1"], micro_batches, [1] * 24),
    "train.steps": (["train.steps=3"], micro_batches, [2] * 6),
    "train.optimizer": (
        ["train.optimizer=adamw"], lambda b: isinstance(b.loop.optimizer, torch.optim.AdamW), True
    ),
    "train.label_smoothing": (
        ["train.label_smoothing=0.1"], lambda b: b.task.loss_options.label_smoothing, 0.1
    ),
    "train.mixup": (["train.mixup=0.2"], lambda b: alphas(b.task.loss_options.mix), [0.2]),
    "train.cutmix": (["train.cutmix=0.3"], lambda b: alphas(b.task.loss_options.mix), [0.3]),
    "clip.rand_augment": (["clip.rand_augment=5"], lambda b: b.clips.rand_augment, 5),
    "train.class_weights": (
        ["train.class_weights=balanced"],
        lambda b: (w := b.task.loss_options.class_weights) is not None and w.tolist(), [1.0] * 6,
    ),
    "train.lr_multipliers": (
        ["train.lr_multipliers=[0,0,1,1,1,10]"],
        lambda b: (b.loop.model.num_frozen, [g.get("lr_multiplier") for g in
                                             b.loop.optimizer.param_groups]),
        (2, [None, None, 10.0]),
    ),
    "train.momentum": (["train.momentum=0.8"], lambda b: sgd(b, 0)["momentum"], 0.8),
    "train.nesterov": (["train.nesterov=false"], lambda b: sgd(b, 0)["nesterov"], False),
    "train.weight_decay": (["train.weight_decay=0.5"], lambda b: sgd(b, 0)["weight_decay"], 0.5),
    "train.norm_weight_decay": (
        ["train.norm_weight_decay=0.5"], lambda b: sgd(b, 1)["weight_decay"], 0.5
    ),
    "train.clip_grad_norm": (
        ["train.clip_grad_norm=2"], lambda b: b.loop.trainer.clip_grad_norm, 2.0
    ),
    "train.precision": (
        ["train.precision=fp16"],
        lambda b: (b.loop.trainer.scaler.is_enabled(), b.loop.task.to_device.precision),
        (True, "fp16"),
    ),
    "train.channels_last": (
        ["train.channels_last=true"],
        lambda b: (
            b.loop.task.to_device.channels_last,
            b.loop.model.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d),
        ),
        (True, True),
    ),
    "train.log_activations": (
        ["train.log_activations=[conv1]"], lambda b: b.loop.activations.layers, ("conv1",)
    ),
    "train.compile": (
        ["train.compile=true"], lambda b: b.loop.model._compiled_call_impl is not None, True
    ),
    "train.cuda_graphs": (["train.cuda_graphs=false"], lambda b: b.loop.recipe.cuda_graphs, False),
    "train.validate_multi_clip": (
        ["train.validate_multi_clip=true"], validation_kinds, ["val", "test"]
    ),
    "train.precise_bn_iterations": (
        ["train.precise_bn_iterations=5", "model.norm=bn"], precise_bn_batches, [10]
    ),
    "test.num_clips": (["test.num_clips=5"], lambda b: len(b.test_videos[0].clips), 5),
    "test.spacing": (["test.spacing=uniform"], lambda b: b.test_videos.spacing, "uniform"),
    "test.align_starts": (["test.align_starts=true"], lambda b: b.test_videos.align_starts, True),
    "test.spatial": (["test.spatial=three_crop"], lambda b: len(b.test_videos[0].crops), 3),
    "test.short_side": (
        ["test.short_side=44"], lambda b: min(b.test_videos[0].frames.shape[1:3]), 44
    ),
    "test.average": (["test.average=logits"], lambda b: b.scorer.average, "logits"),
    "test.clips_per_forward": (
        ["test.clips_per_forward=7"], lambda b: b.scorer.clips_per_forward, 7
    ),
}  # fmt: skip

# Keys whose effect other tests assert.
ELSEWHERE = {
    "model.weights": "test_weights_of_the_config_are_loaded",
    "model.weights_convolutions_only": "test_weights_of_the_config_are_loaded",
    "data.train_index": "test_indexes_of_the_config_are_loaded",
    "data.val_index": "test_indexes_of_the_config_are_loaded",
    "train.epochs": "test_classes_and_epochs_come_from_the_index",
    "train.validate_every_epochs": "test_classes_and_epochs_come_from_the_index",
    **dict.fromkeys(
        ("train.ema_decay", "train.best_metric", "train.patience"),
        "tests/engine/test_best_and_average.py",
    ),
    "data.root": "test_root_of_the_videos_can_be_changed",
    "data.allowed_hosts": "tests/data_tools/test_pack_shards.py, test_config_must_name_the_host",
    **dict.fromkeys(
        ("train.lr", "train.lr_batch_size", "train.schedule", "train.milestones",
         "train.warmup_steps", "train.warmup_from", "train.log_every", "train.validate_every",
         "train.checkpoint_every", "train.keep_checkpoints"),
        "tests/engine/test_optim.py, test_run_writes_config_log_and_checkpoints",
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_key_reaches_its_object(key, small_run, one_process, tmp_path, monkeypatch):
    overrides, observe, expected = KEYS[key]
    default = Built(small_run(), one_process, tmp_path / "default", monkeypatch)
    assert observe(default) != expected
    changed = Built(small_run(*overrides), one_process, tmp_path / "changed", monkeypatch)
    assert observe(changed) == expected


def test_without_precise_bn_the_moving_averages_stay(small_run, one_process, tmp_path, monkeypatch):
    config = small_run("train.precise_bn_iterations=0", "model.norm=bn")
    assert precise_bn_batches(Built(config, one_process, tmp_path, monkeypatch)) == []


def test_every_key_is_covered():
    keys = set()
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            keys |= {f"{field.name}.{inner.name}" for inner in dataclasses.fields(field.type)}
        else:
            keys.add(field.name)
    assert keys == KEYS.keys() | ELSEWHERE.keys()


def test_random_numbers_of_training_validation_and_precise_bn_differ(
    small_run, one_process, monkeypatch
):
    """Streams, and the step as salt: no two validations draw the same clips."""
    drawn = []

    def record(index, config, *, stream, salt=0):
        drawn.append((stream, salt))
        return random_clips(index, config, stream=stream, salt=salt)

    random_clips = build.random_clips
    monkeypatch.setattr(build, "random_clips", record)
    task = VideoTraining(small_run("model.norm=bn"), one_process)
    model = task.build_model()
    task.load_weights(model)
    task.training_batches(0)
    task.validate(model, 3, NoLog())
    task.validate(model, 6, NoLog())
    assert drawn == [
        (Stream.TRAIN_CLIP, 0),
        (Stream.PRECISE_BN_CLIP, 3), (Stream.VALIDATION_CLIP, 3),
        (Stream.PRECISE_BN_CLIP, 6), (Stream.VALIDATION_CLIP, 6),
    ]  # fmt: skip


def test_indexes_of_the_config_are_loaded(small_run, one_process, motion_set):
    swapped = [
        f"data.train_index={motion_set.val_index}",
        f"data.val_index={motion_set.train_index}",
    ]
    task = VideoTraining(small_run(*swapped), one_process)
    assert (len(task.train_index), len(task.val_index)) == (6, 12)


def test_root_of_the_videos_can_be_changed(small_run, motion_set, one_process, tmp_path):
    (tmp_path / "elsewhere").symlink_to(motion_set.folder / "videos" / "train")
    config = small_run(f"data.root={tmp_path / 'elsewhere'}")
    batch = build.random_clips(
        build.load_index(config.data.train_index, config), config, stream=Stream.TRAIN_CLIP
    )[[Sample(0, 0)]]
    assert isinstance(batch, Batch)
    assert batch.broken == ()
    with pytest.raises(
        ConfigError, match=r"be in .*nowhere, .*; set data.root to the folder where"
    ):
        VideoTraining(small_run("data.root=nowhere"), one_process)


def test_weights_of_the_config_are_loaded(small_run, one_process, tmp_path):
    torch.manual_seed(1)
    source = build.build_model(small_run("model.norm=bn"), torch.device("cpu"))
    torch.save(source.state_dict(), tmp_path / "bn.pth")
    weights = f"model.weights={tmp_path / 'bn.pth'}"
    same = VideoTraining(small_run(weights, "model.norm=bn"), one_process)
    model = same.build_model()
    same.load_weights(model)
    assert torch.equal(model.res3[0].norm1.running_var, source.res3[0].norm1.running_var)
    assert torch.equal(model.res3[0].conv1.weight, source.res3[0].conv1.weight)
    other = VideoTraining(small_run(weights), one_process)
    with pytest.raises(ValueError, match="model.weights_convolutions_only"):
        other.load_weights(other.build_model())
    convolutions = VideoTraining(
        small_run(weights, "model.weights_convolutions_only=true"), one_process
    )
    model = convolutions.build_model()
    convolutions.load_weights(model)
    assert torch.equal(model.res3[0].conv1.weight, source.res3[0].conv1.weight)


def test_videos_with_another_time_are_named(small_run, motion_set, tmp_path, caplog):
    """But a copy that did not keep any of the times is as good as the original."""
    folder = tmp_path / "motion"
    shutil.copytree(motion_set.folder, folder)  # keeps times
    path, config = str(folder / "train.parquet"), small_run()
    index = build.load_index(path, config)
    assert not caplog.messages
    changed = index.path_of(3)
    os.utime(changed, (1_500_000_000, 1_500_000_000))
    build.load_index(path, config)
    (message,) = caplog.messages
    assert (
        f"1 videos were modified after they were indexed, unlike the others ({index.paths[3]}"
        in message
    )
    with index.file_of(3) as file:  # it may be the same
        assert file == changed
    caplog.clear()
    for i in range(len(index)):
        os.utime(index.path_of(i), (1_500_000_000, 1_500_000_000))
    build.load_index(path, config)
    assert not caplog.messages
    # One of another size shows that they are no copies; it is an error when it is read.
    index.path_of(5).write_bytes(b"replaced")
    assert index.paths[5] not in index.modified()
