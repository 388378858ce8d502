"""What the commands make of networks of other libraries, from a checkpoint that training wrote."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from i3d_gn import cli
from i3d_gn.data.transforms import evaluation_crops, normalize_clips
from i3d_gn.engine.checkpoint import CheckpointError, latest_checkpoint
from i3d_gn.engine.distributed import Process
from i3d_gn.models.network import AdaptedNetwork
from i3d_gn.video import Recognizer, build, export
from i3d_gn.video.config import Config, load_config
from i3d_gn.video.evaluate import evaluate, video_scorer
from i3d_gn.video.explain import evidence_of, grad_cam
from i3d_gn.video.info import layers
from i3d_gn.video.load import load_network, load_weights
from i3d_gn.video.named_networks import network_of_published
from i3d_gn.video.train import train
from i3d_gn.video_io.decode import decode_frames
from i3d_gn.video_io.index import VideoIndex
from i3d_gn.video_io.video_files import VideoFiles
from tests.video.test_named_networks import NAMES, small

CPU = torch.device("cpu")


def each(*names: str) -> pytest.MarkDecorator:
    """Parametrize `run` over networks; all but one are slow."""
    return pytest.mark.parametrize(
        "run",
        [pytest.param(n, marks=() if n == "x3d_xs" else pytest.mark.slow) for n in names],
        indirect=True,
    )


all_networks = each(*NAMES)
# One of each structure that the commands distinguish: the classifier before or after the pooling,
# layers between the last stage and the classifier, two pathways, and torchvision's and
# pytorchvideo's names.
one_of_each_kind = each("r3d_18", "s3d", "slow_r50", "x3d_xs", "slowfast_r50")


@dataclass(frozen=True)
class Run:
    """A network that was trained for two steps and tested."""

    name: str
    config: Config
    checkpoint: Path
    scores: dict[str, np.ndarray]  # by path below the index's root
    results: dict[str, Any]
    index: VideoIndex


@pytest.fixture(scope="module")
def trained(motion_set, tmp_path_factory) -> Callable[[str], Run]:
    """Trains a network when it is first asked for."""
    return functools.cache(lambda name: train_and_test(name, motion_set, tmp_path_factory))


@pytest.fixture
def run(request, trained) -> Run:
    return trained(request.param)


def train_and_test(name, motion_set, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp(name)
    path = folder / "config.yaml"
    path.write_text(
        f"output_dir: {folder / 'run'}\n"
        f"data: {{train_index: {motion_set.train_index}, val_index: {motion_set.val_index}, "
        "num_workers: 0}\nmodel: {num_classes: 6}\ntest: {num_clips: 2}\n"
        "train: {steps: 2, global_batch_size: 2, clips_per_gpu: 2, lr: 0.001, validate_every: 2, "
        "momentum: 0, nesterov: false}\n"  # smaller checkpoints
    )
    *sizes, test_side = small(name)
    larger = int(test_side.partition("=")[2]) + 4  # three crops that differ
    config = load_config(path, [*sizes, f"test.short_side={larger}"])
    process = Process(0, 1, CPU)
    train(config, process)
    results = evaluate(config, None, process)
    assert results is not None
    (scores,) = (folder / "run").glob("test_*/scores.parquet")
    table = pq.read_table(scores).to_pydict()
    checkpoint = latest_checkpoint(folder / "run" / "checkpoints")
    assert checkpoint is not None
    return Run(
        name,
        config,
        checkpoint,
        dict(zip(table["path"], np.array(table["scores"], np.float32), strict=True)),
        results,
        VideoIndex.load(motion_set.val_index),
    )


@all_networks
def test_train_evaluate_and_predict(run):
    assert run.results["num_videos"] == 6
    assert run.results["step"] == 2
    assert run.results["spatial"] == "three_crop"
    assert all(np.isfinite(s).all() for s in run.scores.values())
    recognizer = Recognizer.from_checkpoint(run.checkpoint, device="cpu")
    assert isinstance(recognizer.network.model, AdaptedNetwork)
    assert recognizer.network.mean == pytest.approx(run.config.data.mean)
    for prediction in recognizer.predict(run.index):
        np.testing.assert_array_equal(prediction.scores, run.scores[prediction.video])


@each("r3d_18", "x3d_xs")
def test_further_training_starts_from_the_checkpoint(run):
    network, _ = load_network(run.checkpoint, device=CPU)
    again = build.build_model(run.config, CPU)
    build.load_weights(again, str(run.checkpoint))
    for (key, a), b in zip(
        again.state_dict().items(), network.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), key


@one_of_each_kind
def test_features_are_those_of_each_clip_alone(run, tmp_path, capsys):
    clip, out = run.config.clip, tmp_path / "out"
    video = run.index.path_of(1)
    command = ["features", str(video), str(out), "--checkpoint", str(run.checkpoint)]
    assert cli.main([*command, "--every", "7"]) == 0
    network, _ = load_network(run.checkpoint, device=CPU)
    plan, crops = evaluation_crops(
        int(run.index.heights[1]), int(run.index.widths[1]), mode="three_crop",
        short_side=run.config.test.short_side, crop_size=clip.crop_size,
    )  # fmt: skip
    model, seen = network.model.eval(), []
    model.classifier().register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    found = np.load(out / f"{video.stem}.npy")
    assert len(found) == (20 - clip.num_frames) // 7 + 1
    for k, row in enumerate(found):
        frames = decode_frames(video, 7 * k + np.arange(clip.num_frames), plan=plan)
        seen.clear()
        for top, left, height, width in crops:
            crop = frames[:, top : top + height, left : left + width].copy()
            clips = torch.from_numpy(crop)[None].permute(0, 4, 1, 2, 3)
            with torch.no_grad():
                model(normalize_clips(clips, network.mean, network.std))
        # Channels are last before a linear layer, and first before S3D's convolution.
        channels = 1 if run.name == "s3d" else -1
        rows = [x.movedim(channels, 1).flatten(2).mean(2) if x.dim() > 2 else x for x in seen]
        # At 32 pixels the last maps of S3D are 1x1x1, and its groups have 1 to 12 values. Their
        # small variances enlarge rounding errors, which depend on the number of clips in a batch:
        # features of 1 and of 6 clips both differ from float64 by up to 3e-4.
        scale = 10 if run.name == "s3d" else 1
        np.testing.assert_allclose(
            row, torch.cat(rows).mean(0).numpy(), rtol=scale * 1e-4, atol=scale * 1e-5
        )
    if run.name in ("s3d", "slowfast_r50"):
        capsys.readouterr()
        assert cli.main([*command[:2], str(tmp_path / "short"), *command[3:], "--length", "1"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(
            "error: a clip of 1 frames" if run.name == "s3d" else "error: clips have 1 frames"
        )


@one_of_each_kind
def test_explain_is_class_activation_mapping(run, tmp_path):
    """Grad-CAM of a stage before a global average and a linear layer is CAM (Zhou et al. 2016)."""
    recognizer = Recognizer.from_checkpoint(run.checkpoint, device="cpu")
    model = recognizer.network.model
    stage, path = model.stage_names[-1], run.index.path_of(2)
    nn.init.normal_(model.classifier().weight)
    if not run.name.startswith("x3d"):  # there are layers between
        maps = []
        handle = model.get_submodule(stage).register_forward_hook(lambda *a: maps.append(a[-1]))
        size = 2 * run.config.clip.crop_size if run.name != "s3d" else 64  # S3D averages windows
        clips = torch.randn(1, 3, 8, size, size)
        with torch.no_grad():
            model(clips)
        handle.remove()
        # Of the channels, the slow pathway's come first.
        weights = model.classifier().weight.flatten(1)[:, : maps[0].shape[1]]
        by_class = torch.einsum("kc,cthw->kthw", weights / maps[0][0, 0].numel(), maps[0][0])
        target = int(by_class.amax((1, 2, 3)).argmax())
        found = grad_cam(model, clips, target, stage)
        assert found.max() > 0
        torch.testing.assert_close(found[0], by_class[target].relu(), rtol=1e-3, atol=1e-6)
    evidence = evidence_of(recognizer, VideoFiles([str(path)]), 3, stage)
    assert sum(evidence.num_frames) == 20
    assert all(m.dim() == 3 and (m >= 0).all() for m in evidence.maps)
    out = tmp_path / "e.png"
    command = ["explain", str(path), "--checkpoint", str(run.checkpoint), "--out", str(out)]
    name = run.index.class_names[int(run.scores[run.index.paths[2]].argmax())]
    status = cli.main(command)
    assert (status, out.is_file()) in ((0, True), (2, False)), name  # 2: nothing speaks for it


@one_of_each_kind
def test_info_counts_all_of_the_network(run):
    rows = layers(run.config)
    model = build.build_model(run.config, CPU)
    assert sum(row.num_parameters for row in rows) == sum(p.numel() for p in model.parameters())
    counted = 0

    def count(module, _inputs, output):
        nonlocal counted
        counted += output[0].numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv3d, nn.Linear)):
            module.register_forward_hook(count)
    clip = run.config.clip
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, clip.num_frames, clip.crop_size, clip.crop_size))
    assert sum(row.multiply_adds for row in rows) == counted
    assert len(rows) > 6


@one_of_each_kind
def test_exported_program_gives_the_scores_of_testing(run, tmp_path):
    out = tmp_path / "network.pt2"
    export.export_model(run.checkpoint, out)
    program = export.load_pt2(out)
    trained, config = load_network(run.checkpoint, device=CPU)
    to_device = build.to_device(config, Process(0, 1, CPU), mean=trained.mean, std=trained.std)
    scorer = video_scorer(trained.model.eval(), config, to_device)
    video = build.test_videos(run.index, config)[3]
    scores = [
        program(video.frames[:, top : top + h, left : left + w][video.clips].contiguous()).mean(0)
        for top, left, h, w in video.crops
    ]
    actual = torch.stack(scores).mean(0).double()
    torch.testing.assert_close(actual, scorer(video), rtol=1e-4, atol=1e-6)


@each("r3d_18", "x3d_xs", "i3d_r50")
def test_weight_files_need_the_name_of_the_network(run, tmp_path):
    """The library's own state dict, in its own names, says neither network nor clip."""
    trained, config = load_network(run.checkpoint, device=CPU)
    path = tmp_path / "weights.pth"
    torch.save({"model_state": trained.model.net.state_dict()}, path)
    clip, test = config.clip, config.test
    settings = [
        f"model.name={run.name}", f"clip.num_frames={clip.num_frames}", "clip.stride=1",
        f"clip.crop_size={clip.crop_size}", f"test.short_side={test.short_side}",
        f"test.num_clips={test.num_clips}", f"clip.short_side_min={clip.crop_size}",
    ]  # fmt: skip
    recognizer = Recognizer.from_checkpoint(path, overrides=settings, device="cpu")
    prediction = recognizer(run.index.path_of(4))
    np.testing.assert_array_equal(prediction.scores, run.scores[run.index.paths[4]])
    assert prediction.class_names[5] == "class 5"
    _, with_defaults = load_weights(str(path), overrides=settings[:1], device=CPU)
    assert with_defaults.test.spatial == "three_crop"
    if run.name not in ("i3d_r50", "c2d_r50"):  # files of these are read as I3D
        with pytest.raises(CheckpointError, match=r"unknown.*set model.name, such as"):
            load_network(path, device=CPU)
    other = "model.name=x3d_s" if run.name == "r3d_18" else "model.name=r3d_18"
    with pytest.raises(ValueError, match="do not fit the network|has shape"):
        load_network(path, overrides=[*settings, other], device=CPU)


@each("x3d_xs")
def test_report_and_hub(run, tmp_path, capsys):
    out, page = tmp_path / "c.png", tmp_path / "r.html"
    folder = run.config.output_dir
    assert cli.main(["report", folder, "--out", str(out), "--html", str(page)]) == 0
    assert "x3d_xs" in page.read_text()
    pytest.importorskip("huggingface_hub")
    from i3d_gn.video.hub import PretrainedClassifier

    classifier = PretrainedClassifier.from_checkpoint(run.checkpoint)
    assert run.config.data.mean is not None
    assert run.config.data.std is not None
    video = build.test_videos(run.index, run.config)[0]
    top, left, height, width = video.crops[0]
    clips = video.frames[:, top : top + height, left : left + width][video.clips]
    with torch.no_grad():
        scores = classifier(clips)
        logits = load_network(run.checkpoint, device=CPU)[0].model.eval()(
            normalize_clips(clips.permute(0, 4, 1, 2, 3), run.config.data.mean, run.config.data.std)
        )
    torch.testing.assert_close(scores, logits.softmax(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("R3D_18_Weights.KINETICS400_V1", "r3d_18"),
        ("R2Plus1D_18_Weights.DEFAULT", "r2plus1d_18"),
        ("S3D_Weights.KINETICS400_V1", "s3d"),
        ("pytorchvideo/slowfast_r50", "slowfast_r50"),
        ("pytorchvideo/i3d_r50", None),  # read as I3D
        ("ResNet50_Weights.IMAGENET1K_V1", None),
        ("r3d_18.pth", None),
    ],
)
def test_published_weights_name_their_network(source, name):
    assert network_of_published(source) == name
