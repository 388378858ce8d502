import dataclasses
import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from i3d_gn import cli
from i3d_gn.engine.optim import learning_rate
from i3d_gn.engine.typed_config import (
    ConfigError,
    _key_fields,
    config_hash,
    differences,
    to_dict,
    to_yaml,
)
from i3d_gn.imagenet.config import load_imagenet_config
from i3d_gn.video import build
from i3d_gn.video.config import Config, config_of_checkpoint, load_config

REPOSITORY = Path(__file__).resolve().parents[2]
ALL = sorted(REPOSITORY.glob("configs/**/*.yaml"))
VIDEO = [path for path in ALL if path.parent.name not in {"imagenet", "coco"}]
TABLE_8 = sorted(REPOSITORY.glob("configs/kinetics400/*.yaml"))
MINIMAL = """
output_dir: out
data: {train_index: a.parquet, val_index: b.parquet}
train: {steps: 10, lr: 1e-4}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", VIDEO, ids=lambda path: path.stem)
def test_config_builds_on_meta(path):
    config = load_config(path)
    with torch.device("meta"):
        config = config.completed(num_classes=7, num_videos=100)
        model = build.build_model(config, torch.device("meta"))
        clip = config.clip
        shape = (1, 3, clip.num_frames, clip.crop_size, clip.crop_size)
        assert model(torch.empty(shape)).shape == (1, config.model.num_classes)


def test_short_side_smaller_than_the_training_crop_is_an_error_at_build():
    config = load_config(TABLE_8[0], ["test.short_side=112"])
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match="test.short_side 112 is too small .* at least 224"),
    ):
        build.build_model(config, torch.device("meta"))


def header_of(path):
    lines = path.read_text().splitlines()
    return "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))


def test_documented_fine_tuning_of_a_named_network_is_a_valid_config():
    page = (REPOSITORY / "docs" / "norms.md").read_text()
    (command,) = re.findall(r"i3d-gn train (configs/finetune.yaml .*?)\n\n", page, flags=re.S)
    path, *overrides = shlex.split(command.replace("\\\n", " "))
    assert load_config(REPOSITORY / path, overrides).model.name == "x3d_s"


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_config_header_has_command_expectation_and_cost(path):
    header = header_of(path)
    for word in ("command:", "expected:", "cost:"):
        assert word in header
    commands = re.findall(r"(?:i3d-gn|-m i3d_gn) (\S+) (\S+)", header)
    assert {command for command, _ in commands} <= set(cli.COMMANDS)
    config = f"configs/{path.relative_to(REPOSITORY / 'configs')}"
    assert config in {argument for _, argument in commands}
    assert "python -m" not in header


def test_table_8_configs_quote_the_papers_accuracies():
    reproduce = (REPOSITORY / "docs" / "reproduce.md").read_text()
    paper = {
        "bn_32x2_8clips": "73.3 / 90.7",
        "bn_32x2_4clips": "72.1 / 90.0",
        "bn_64x1_4clips": "73.3 / 90.8",
        "gn_32x2_8clips": "73.0 / 90.6",
        "gn_32x2_4clips": "72.8 / 90.6",
        "gn_64x1_4clips": "74.5 / 91.7",
    }
    assert [path.stem for path in TABLE_8] == sorted(paper)
    for path in TABLE_8:
        assert f"expected: {paper[path.stem]} % (top-1 / top-5" in header_of(path)
        assert f"| `{path.name}` | {paper[path.stem]} |" in reproduce


def test_table_8_configs_differ_only_where_the_table_does():
    configs = {path.stem: load_config(path) for path in TABLE_8}
    in_table = {"model.norm", "clip.num_frames", "clip.stride", "train.clips_per_gpu"}
    # These follow from the clips per GPU on 8 GPUs by the linear scaling rule, or from the norm.
    follows = {
        "train.global_batch_size", "train.steps", "train.milestones", "train.validate_every",
        "model.weights",
    }  # fmt: skip
    for a, b in itertools.combinations(configs.values(), 2):
        changed = {line.partition(":")[0] for line in differences(to_dict(a), to_dict(b), Config)}
        assert changed <= in_table | follows
    seen = {
        (c.model.norm, c.clip.num_frames, c.clip.stride, c.train.clips_per_gpu)
        for c in configs.values()
    }
    assert seen == {
        (norm, *clip) for norm in ("bn", "gn") for clip in ((32, 2, 8), (32, 2, 4), (64, 1, 4))
    }
    for name, config in configs.items():
        recipe = config.train
        norm, frames, clips = re.fullmatch(r"(\w+)_(\d+x\d)_(\d)clips", name).groups()
        assert config.output_dir == f"runs/kinetics400/{name}"
        assert (norm, int(clips)) == (config.model.norm, recipe.clips_per_gpu)
        assert frames == f"{config.clip.num_frames}x{config.clip.stride}"
        assert config.model.weights == f"weights/resnet50_{norm}.pth"
        assert recipe.steps * recipe.global_batch_size == 400_000 * 64
        assert recipe.global_batch_size == 8 * recipe.clips_per_gpu
        assert [m / recipe.steps for m in recipe.milestones] == [150 / 400, 300 / 400]


def test_defaults_are_the_baseline_of_table_8(tmp_path):
    """With the values that have no default, and what the network starts from."""
    path = REPOSITORY / "configs" / "kinetics400" / "gn_32x2_8clips.yaml"
    baseline = load_config(path)
    minimal = write(
        tmp_path,
        f"""
output_dir: {baseline.output_dir}
model: {{num_classes: 400, weights: {baseline.model.weights}}}
data:
  train_index: {baseline.data.train_index}
  val_index: {baseline.data.val_index}
  mean: {list(baseline.data.mean)}
  std: {list(baseline.data.std)}
train: {{steps: {baseline.train.steps}, milestones: {list(baseline.train.milestones)}}}
""",
    )
    assert load_config(minimal) == baseline


def test_numbers_in_scientific_notation_are_floats(tmp_path):
    assert load_config(write(tmp_path, MINIMAL)).train.lr == 1e-4


def test_overrides_win_and_resolved_config_round_trips(tmp_path):
    path = write(tmp_path, MINIMAL)
    config = load_config(path, ["train.lr=0.5", "train.milestones=[3,6]", "model.norm=bn"])
    assert (config.train.lr, config.train.milestones, config.model.norm) == (0.5, (3, 6), "bn")
    assert load_config(write(tmp_path, to_yaml(config))) == config


def test_hash_ignores_keys_that_do_not_change_results(tmp_path):
    path = write(tmp_path, MINIMAL)
    base = config_hash(load_config(path))
    assert base == config_hash(load_config(path, ["data.num_workers=7", "output_dir=elsewhere"]))
    assert base != config_hash(load_config(path, ["seed=1"]))


def test_hash_and_resume_of_earlier_runs_stay_valid():
    """Keys that were added later count only if they are set; hashes are those of such results."""
    config = load_config(REPOSITORY / "configs" / "kinetics400" / "gn_32x2_8clips.yaml")
    hashes = {
        config_hash(config): "1d3ab240ac3cb7d78103bb951b15e74724a28e6cf8e27be0744e837f218a1686",
        config_hash(load_imagenet_config(REPOSITORY / "configs" / "imagenet" / "gn.yaml")): (
            "f48acc03f9095c636cea88279d680e5491dc8afa769d8e4e179ae4910c1babbe"
        ),
    }
    assert all(now == before for now, before in hashes.items())
    earlier = to_dict(config)
    added = [key for key, field in _key_fields(Config).items() if "added" in field.metadata]
    assert "train.epochs" in added
    for key in added:
        section, _, name = key.partition(".")
        del earlier[section][name]
    assert differences(earlier, to_dict(config), Config) == []
    train = dataclasses.replace(config.train, epochs=2.0)
    changed = dataclasses.replace(config, train=train)
    assert differences(earlier, to_dict(changed), Config) == ["train.epochs: None -> 2.0"]
    assert config_hash(changed) != config_hash(config)


@pytest.mark.parametrize(
    ("epochs", "num_videos", "batch", "steps"),
    [(1, 12, 4, 3), (2.5, 10, 4, 6), (1, 3, 64, 1), (10, 7, 4, 18)],
)
def test_epochs_are_passes_over_the_training_videos(tmp_path, epochs, num_videos, batch, steps):
    text = MINIMAL.replace("steps: 10", f"epochs: {epochs}, validate_every_epochs: {epochs / 2}")
    options = [f"train.global_batch_size={batch}", "train.clips_per_gpu=1"]
    config = load_config(write(tmp_path, text), options)
    train = config.completed(num_classes=3, num_videos=num_videos).train
    assert (train.steps, train.epochs, train.validate_every_epochs) == (steps, None, None)
    assert train.validate_every == max(1, round(epochs / 2 * num_videos / batch))


def test_completed_config_keeps_what_is_given(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["model.num_classes=5"])
    assert config.completed(num_classes=3, num_videos=7) == config


def test_table_8_learning_rates_follow_the_linear_scaling_rule():
    expected = {8: [0.01, 0.001, 0.0001], 4: [0.005, 0.0005, 0.00005]}
    for path in TABLE_8:
        recipe = load_config(path).train
        drops = (0, *recipe.milestones)
        rates = [learning_rate(step, recipe) for step in drops]
        assert rates == pytest.approx(expected[recipe.clips_per_gpu])
        assert (recipe.weight_decay, recipe.norm_weight_decay) == (1e-4, 0)
        assert (recipe.momentum, recipe.nesterov) == (0.9, True)


def test_table_8_augmentation_and_testing_are_those_of_nonlocal_net():
    for path in TABLE_8:
        config = load_config(path)
        clip, test = config.clip, config.test
        assert (config.model.num_classes, config.model.dropout) == (400, 0.5)
        assert config.train.precise_bn_iterations == 200
        assert (clip.short_side_min, clip.short_side_max, clip.crop_size) == (256, 320, 224)
        assert clip.flip_probability == 0.5
        assert (test.num_clips, test.spacing, test.average) == (10, "nonlocal", "softmax")
        assert (test.spatial, test.short_side) == ("full", 256)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MINIMAL + "modle: {norm: gn}",
            r"config.yaml:5: unknown key 'modle'; did you mean 'model'",
        ),
        (
            MINIMAL + "model:\n  nrom: gn",
            r"config.yaml:6: unknown key 'model.nrom'; did you mean 'model.norm'",
        ),
        (MINIMAL + "clip:\n  stride: two", r"config.yaml:6: clip.stride: .*'two'.* Integer"),
        (MINIMAL + "model:\n  norm: gm", r"config.yaml:6: model.norm: .*'gm'.*'gn'"),
        (MINIMAL + "lr: 0.1", r"unknown key 'lr'; did you mean 'train.lr'"),
        (
            "output_dir: out\ntrain: {steps: 3}",
            r"missing value for data.train_index, data.val_index",
        ),
        ("- a\n- b", r"expected `key: value`"),
        ("a: [", r"not YAML"),
        (MINIMAL + "clip: {crop_size: 300}", r"crop_size 300.*must not decrease"),
        (MINIMAL + "model: {num_groups: 8, channels_per_group: 8}", r"not both"),
        (MINIMAL + "train.epochs: 3", r"config.yaml: set train.steps or train.epochs, not both"),
        (MINIMAL.replace("steps: 10", "steps: 0"), r"yaml: set train.steps or train.epochs$"),
        (MINIMAL.replace("steps: 10", "epochs: 0"), r"train.epochs is 0.0; it must be positive"),
        (MINIMAL + "clip: {num_frames: 0}", r"clip.num_frames is 0; it must be at least 1"),
        (MINIMAL + "model: {dropout: 1.5}", r"model.dropout is 1.5; it must lie in \[0, 1\]"),
        (MINIMAL + "seed: -1", r"config.yaml: seed is -1; it must not be negative"),
        (MINIMAL + "model: bn", r"config.yaml:5: model is 'bn'; it is a section; set model.<key>"),
        (MINIMAL + "model:", r"config.yaml:5: model is None; it is a section"),
        (MINIMAL + "data.mean: [1, 2, x]", r"config.yaml:5: data.mean: .*could not be.* to Float"),
        (MINIMAL + "train.lr: 3", r"config.yaml:5: train.lr was already set in line 4"),
        (MINIMAL + "seed: ${nowhere}", r"config.yaml: seed: Interpolation key 'nowhere' not found"),
        (
            MINIMAL + "test: {zzz: 1}",
            r"config.yaml:5: unknown key 'test.zzz'; valid keys are test\.",
        ),
        (
            MINIMAL + "zzz: 1",
            r"unknown key 'zzz'; valid keys are clip, data, model, output_dir, seed",
        ),
    ],
)
def test_invalid_config_is_a_one_line_error(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_global_batch_not_a_multiple_of_clips_per_gpu_is_an_error(tmp_path):
    path = write(tmp_path, MINIMAL)
    with pytest.raises(ConfigError, match="global_batch_size 64 is not a multiple of .* 7"):
        load_config(path, ["train.clips_per_gpu=7"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.lr_multipliers=[0,1]",
            r"lr_multipliers \[0.0, 1.0\]: expected 6 numbers",
        ),
        ("train.lr_multipliers=[1,0,1,1,1,1]", "only the first stages can be frozen"),
        ("train.lr_multipliers=[0,0,0,0,0,0]", "nor all of them"),
        ("train.label_smoothing=2", r"train.label_smoothing is 2.0; it must lie in \[0, 1\]"),
        ("train.ema_decay=1", r"train.ema_decay is 1.0; it must lie in \[0, 1\)"),
        ("train.patience=2", "train.patience needs .*train.best_metric"),
        ("train.best_metric=top1", "best_metric is 'top1'; it must be one of val/top1,"),
        ("train.best_metric=test/top1", "and with validate_multi_clip those of test/"),
        ("clip.rand_augment=31", "clip.rand_augment is 31; it must be up to 30"),
        ("train={mixup: 1, clips_per_gpu: 1}", "mix the clips of a GPU, but .*clips_per_gpu is 1"),
        ("train.lr", "expected key=value"),
        ("train.lrr=1", "did you mean 'train.lr'"),
        ("train.lr=fast", "override 'train.lr=fast': train.lr: .*Float"),
        ("train.lr=[", r"override 'train.lr=\[': not YAML"),
        ("train.milestones={a: 1}", "unknown key 'train.milestones.a'; did you mean 'train.mile"),
        ("model={nrom: bn}", "unknown key 'model.nrom'; did you mean 'model.norm'"),
        ("data=5", "override 'data=5': data is 5; it is a section; set data.<key> instead"),
        ("train.lr=.nan", "train.lr is nan; it must be finite"),
        ("train.lr=.inf", "train.lr is inf; it must be finite"),
        ("train.lr=-.inf", "train.lr is -inf; it must be finite"),
        ("data.timeout_seconds=.inf", "data.timeout_seconds is inf; it must be finite"),
        ("seed=9223372036854775808", r"seed is 9223372036854775808; it must be less than 2\*\*63"),
        ("train.momentum=1", r"train.momentum is 1.0; it must lie in \[0, 1\)"),
        (
            "train.momentum=0",
            "train.nesterov needs momentum, which is 0; set nesterov",
        ),
        ("train.clip_grad_norm=-1", "train.clip_grad_norm is -1.0; it must be positive"),
        ("train.milestones=[-3,5]", "train.milestones is -3; it must be at least 1"),
        ("model.num_groups=0", "model.num_groups is 0; it must be at least 1"),
        ("data.num_workers=-1", "data.num_workers is -1; it must not be negative"),
        ("data.std=[1,0,1]", "data.std is 0.0; it must be positive"),
        ("data.mean=[123,117,104]", r"data.mean is 123.0; it must lie in \[0, 1\]"),
        ("data.mean=[0.5]", r"data.mean is \[0.5\]; expected three numbers"),
    ],
)
def test_invalid_override_is_a_one_line_error(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, MINIMAL), [override])
    assert "\n" not in str(caught.value)


def test_binary_config_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="config.yaml: not YAML: .*utf-8"):
        load_config(path)


def test_missing_config_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ConfigError, match=r"config file not found: .*nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_to_yaml_writes_plain_yaml(tmp_path):
    text = to_yaml(load_config(write(tmp_path, MINIMAL)))
    assert yaml.safe_load(text)["train"]["steps"] == 10


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.batch_size", "did you mean 'train.lr_batch_size' or 'train.global_batch_size'"),
        ("model.frozen_stages", "valid keys are model"),
        ("clip.lr", "did you mean 'train.lr'"),
    ],
)
def test_unknown_keys_name_the_similar_ones_only(tmp_path, key, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, MINIMAL), [f"{key}=1"])


def test_file_that_is_no_config_is_refused_quickly(tmp_path):
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_config(write(tmp_path, "a: " + "[" * 10_000))
    with pytest.raises(ConfigError, match="over 100 kB"):
        load_config(write(tmp_path, "# comment\n" * 1_000_000))


def test_config_of_a_checkpoint_is_the_one_that_trained_it(small_run, tmp_path):
    config = small_run("model.norm=bn", "data.mean=[0.1,0.2,0.3]", "train.milestones=[1,2]")
    saved = {"config": to_dict(config)}
    assert config_of_checkpoint(saved, tmp_path / "x.pt") == config


def test_config_of_an_older_checkpoint_takes_defaults(small_run, tmp_path):
    saved = {"config": to_dict(small_run())}
    del saved["config"]["model"]["stride_in"]
    assert config_of_checkpoint(saved, tmp_path / "x.pt").model.stride_in == "3x3"


def test_config_of_another_checkpoint_is_an_error(small_run, tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(ConfigError, match=r"x\.pt is not of a video network"):
        config_of_checkpoint({"config": {"model": {}}}, path)
    saved = {"config": to_dict(small_run())}
    saved["config"]["model"]["of_the_future"] = 1
    with pytest.raises(ConfigError, match=r"x\.pt: unknown key 'model\.of_the_future'"):
        config_of_checkpoint(saved, path)


def test_interval_of_validation_is_in_steps_or_in_epochs(tmp_path):
    path = write(tmp_path, MINIMAL)
    overrides = ["train.validate_every_epochs=0.5", "train.validate_every=7"]
    with pytest.raises(ConfigError, match="train.validate_every 7 has no effect, since .* is 0.5"):
        load_config(path, overrides)
    train = load_config(path, [*overrides, "train.validate_every_epochs=null"]).train
    assert (train.validate_every, train.validate_every_epochs) == (7, None)
    train = load_config(path, overrides[::-1]).train  # the last one counts
    assert train.validate_every_epochs == 0.5
