import itertools
import json
from collections import Counter

import pytest
import torch

from i3d_gn import cli
from i3d_gn.engine.distributed import Process
from i3d_gn.models import I3D, i3d_resnet50
from i3d_gn.norm import make_norm
from i3d_gn.video import build, export
from i3d_gn.video.classifier import ClipClassifier
from i3d_gn.video.evaluate import video_scorer
from i3d_gn.video.load import load_network
from i3d_gn.video.trained import TrainedNetwork

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CPU = torch.device("cpu")


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def metadata_of(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.fixture(scope="module")
def exported(trained_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "network.onnx"
    assert cli.main(["export-model", str(trained_checkpoint), str(path)]) == 0
    return path


def test_scores_of_a_video_are_those_of_testing(exported, trained_checkpoint, trained_config):
    trained, config = load_network(trained_checkpoint, device=CPU)
    to_device = build.to_device(config, Process(0, 1, CPU), mean=trained.mean, std=trained.std)
    scorer = video_scorer(trained.model.eval(), config, to_device)
    index = build.load_index(trained_config.data.val_index, config)
    run = export.load_onnx(exported)
    for number in (0, 3):
        video = build.test_videos(index, config)[number]
        (crop,) = video.crops
        assert crop[2] != crop[3]  # a whole frame, of another shape than a training crop
        scores = run(video.frames[video.clips]).mean(0)
        torch.testing.assert_close(scores.double(), scorer(video), rtol=1e-4, atol=1e-6)
        assert scores.sum().item() == pytest.approx(1, abs=1e-5)


def test_any_number_and_size_of_clips(exported, trained_checkpoint):
    trained, config = load_network(trained_checkpoint, device=CPU)
    classifier = export.make_classifier(trained, config, "uint8")
    run = export.load_onnx(exported)
    for num_clips, height, width in ((1, 36, 36), (3, 41, 67), (2, 90, 40)):
        clips = torch.randint(0, 256, (num_clips, 8, height, width, 3), dtype=torch.uint8)
        torch.testing.assert_close(run(clips), classifier(clips), rtol=1e-4, atol=1e-6)


def test_group_normalization_is_one_node(exported):
    model = onnx.load(exported)
    assert operators(exported)["GroupNormalization"] == 17
    assert "InstanceNormalization" not in operators(exported)
    (opset,) = [entry.version for entry in model.opset_import if entry.domain == ""]
    assert opset >= 21
    groups = {
        attribute.i
        for node in model.graph.node
        if node.op_type == "GroupNormalization"
        for attribute in node.attribute
        if attribute.name == "num_groups"
    }
    assert groups == {8}


def test_metadata_says_how_to_use_the_network(exported, trained_checkpoint, trained_config):
    facts = metadata_of(exported)
    index = build.load_index(trained_config.data.val_index, trained_config)
    assert json.loads(facts["class_names"]) == list(index.class_names)
    assert json.loads(facts["mean"]) == [0.4, 0.5, 0.6]
    assert json.loads(facts["num_frames"]) == 8
    assert json.loads(facts["frame_stride"]) == 2
    assert json.loads(facts["short_side"]) == 40
    assert facts["input"].startswith("uint8")
    assert facts["output"] == "probabilities"
    assert facts["source"] == str(trained_checkpoint)
    assert "name: i3d_tiny" in facts["config"]


def test_torch_export_of_normalized_clips(trained_checkpoint, motion_set, tmp_path, capsys):
    path = tmp_path / "network.pt2"
    video = next((motion_set.folder / "videos" / "val").rglob("*.mp4"))
    arguments = ["--input", "float", "--videos", str(video)]
    assert cli.main(["export-model", str(trained_checkpoint), str(path), *arguments]) == 0
    assert f"(clips of {video})" in capsys.readouterr().out
    trained, config = load_network(trained_checkpoint, device=CPU)
    clips = torch.randn(3, 3, 8, 50, 45)
    expected = trained.model.eval()(clips, window=(1, 1)).softmax(1).mean((2, 3, 4))
    files = {"metadata.json": ""}
    program = torch.export.load(str(path), extra_files=files)
    torch.testing.assert_close(program.module()(clips), expected)
    facts = json.loads(files["metadata.json"])
    assert facts["input"].startswith("float32")
    assert facts["num_frames"] == config.clip.num_frames


def test_other_norms_are_exported_too(tmp_path):
    kinds = itertools.cycle(("bn", "frozen_bn", "ln", "in"))
    norms = []

    def next_norm(num_channels):
        norms.append(next(kinds))
        return make_norm(norms[-1], num_channels)

    network = I3D((1, 1, 1, 1), norm=next_norm, num_classes=6, width=8)
    for values in (*network.parameters(), *network.buffers()):
        if values.dim() == 1:  # of norm layers: not the identity, and variances are positive
            values.data = torch.rand(values.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)
    classifier = ClipClassifier(network, mean=mean, std=std, window=(1, 1), average="logits")
    classifier.eval().requires_grad_(False)
    first, second = torch.randint(0, 256, (2, 2, 8, 36, 36, 3), dtype=torch.uint8)
    path = tmp_path / "network.onnx"
    export.write_onnx(export.trace(classifier, first, any_size=False), path, {})
    trained = TrainedNetwork(network, mean, std, class_names=None, config=None, step=None)
    run = export.load_onnx(path)
    difference, largest = export.compare(classifier, run, iter([second]), trained)
    assert difference < 1e-4 * largest
    normalized = [n for n in onnx.load(path).graph.node if n.op_type == "GroupNormalization"]
    assert len(norms) == 17
    assert len(normalized) == norms.count("ln") + norms.count("in")
    one_group = [n for n in normalized if ("num_groups", 1) in [(a.name, a.i) for a in n.attribute]]
    assert len(one_group) == norms.count("ln")


@pytest.mark.slow
def test_resnet50_has_53_group_normalizations(tmp_path):
    network = i3d_resnet50("gn", num_classes=3).eval()
    classifier = ClipClassifier(
        network, mean=(0.5,) * 3, std=(0.2,) * 3, window=(1, 1), average="softmax"
    ).requires_grad_(False)
    clips = torch.randint(0, 256, (2, 8, 32, 32, 3), dtype=torch.uint8)
    program = export.trace(classifier, clips, any_size=False)
    export.write_onnx(program, tmp_path / "r50.onnx", {})
    assert operators(tmp_path / "r50.onnx")["GroupNormalization"] == 53
    difference = export.load_onnx(tmp_path / "r50.onnx")(clips) - classifier(clips)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_program_that_differs_is_not_kept(error, trained_checkpoint, tmp_path, monkeypatch, capsys):
    def load_wrong(path):
        assert path.stat().st_size > 0
        return lambda clips: torch.full((len(clips), 6), 1 / 6 + error)

    monkeypatch.setattr(export, "load_pt2", load_wrong)
    monkeypatch.setattr(export, "trace", lambda *_, **__: None)
    monkeypatch.setattr(export, "write_pt2", lambda _, path, __: path.write_bytes(b"program"))
    path = tmp_path / "out" / "network.pt2"
    assert cli.main(["export-model", str(trained_checkpoint), str(path)]) == 2
    printed = capsys.readouterr().err
    assert "network.pt2 not written: scores of the exported program differ by" in printed
    assert not list(path.parent.iterdir())


def test_errors_of_export_are_one_line(trained_checkpoint, tmp_path, monkeypatch, capsys):
    checkpoint, out = str(trained_checkpoint), str(tmp_path / "network.onnx")
    (tmp_path / "file").touch()
    for arguments, error in (
        ((checkpoint, str(tmp_path / "network.trt")), "network.trt: a network is exported to a"),
        ((str(tmp_path / "no.pt"), out), "checkpoint not found: "),
    ):
        assert cli.main(["export-model", *arguments]) == 2
        printed = capsys.readouterr().err
        assert error in printed
        assert printed.count("\n") == 1
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    assert cli.main(["export-model", checkpoint, out]) == 2
    assert "ONNX needs onnxscript, which cannot be imported; pip install" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
