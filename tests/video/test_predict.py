import csv
import dataclasses
import http.server
import json
import re
import shutil
import threading
from multiprocessing.util import get_temp_dir
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from i3d_gn import cli
from i3d_gn.engine.checkpoint import load_checkpoint
from i3d_gn.engine.distributed import Process
from i3d_gn.video import Recognizer
from i3d_gn.video.config import load_config
from i3d_gn.video.evaluate import evaluate
from i3d_gn.video.load import load_network
from i3d_gn.video_io.index import VideoIndex

CPU = torch.device("cpu")
DEMO_NETWORK = Path(__file__).parents[2] / "docs" / "results" / "demo_gn.safetensors"


@pytest.fixture
def index(motion_set):
    return VideoIndex.load(motion_set.val_index)


@pytest.fixture
def copied(trained_checkpoint, tmp_path):
    """The checkpoint alone, without the run's config and index beside it."""
    return Path(shutil.copy(trained_checkpoint, tmp_path / "network.pt"))


def run(*arguments):
    return cli.main(["predict", *map(str, arguments)])


def evaluated(config, checkpoint, output_dir):
    """Path below the index's root -> the scores that `i3d-gn evaluate` writes."""
    config = dataclasses.replace(config, output_dir=str(output_dir))
    evaluate(config, checkpoint, Process(0, 1, CPU))
    (path,) = output_dir.glob("test_*/scores.parquet")
    table = pq.read_table(path).to_pydict()
    return dict(zip(table["path"], np.array(table["scores"], np.float32), strict=True))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("test.spatial=three_crop", "test.num_clips=2", "test.spacing=uniform"),
        ("test.average=logits",),
    ],
)
def test_scores_are_those_of_evaluate(
    trained_config, trained_checkpoint, index, overrides, tmp_path
):
    path = tmp_path / "config.yaml"
    path.write_text((Path(trained_config.output_dir) / "config.yaml").read_text())
    expected = evaluated(load_config(path, overrides), trained_checkpoint, tmp_path / "test")
    recognizer = Recognizer.from_checkpoint(trained_checkpoint, overrides=overrides, device="cpu")
    for name, prediction in zip(index.paths, recognizer.predict(index), strict=True):
        np.testing.assert_array_equal(prediction.scores, expected[name])
        shifted = np.exp(expected[name].astype(np.float64))
        softmax = shifted / shifted.sum()
        wanted = softmax if "test.average=logits" in overrides else expected[name]
        np.testing.assert_allclose(prediction.probabilities, wanted, rtol=1e-5)
        best = int(np.argmax(wanted))
        assert prediction.top(1)[0][0] == index.class_names[best]
    assert np.ptp(np.array(list(expected.values())), axis=0).max() > 1e-4  # videos differ


def test_index_folder_and_files_give_the_same(copied, index, motion_set, tmp_path, capsys):
    outputs = {}
    for kind, inputs in {
        "index.csv": [motion_set.val_index],
        "folder.json": [index.root],
        "files.parquet": [index.path_of(video) for video in range(len(index))],
    }.items():
        out = tmp_path / kind
        assert run(*inputs, "--checkpoint", copied, "--top-k", 3, "--out", out) == 0
        outputs[kind] = out
    printed = capsys.readouterr().out
    with outputs["index.csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["video"] for row in rows[::3]] == index.paths
    assert [row["rank"] for row in rows[:3]] == ["1", "2", "3"]
    others = [json.loads(outputs["folder.json"].read_text())]
    others.append(pq.read_table(outputs["files.parquet"]).to_pylist())
    for other in others:
        assert [Path(row["video"]) for row in other] == [Path(index.root, r["video"]) for r in rows]
        assert [row["class"] for row in other] == [row["class"] for row in rows]
        np.testing.assert_array_equal(
            [row["probability"] for row in other], [float(row["probability"]) for row in rows]
        )
    first = rows[0]
    line = [first["video"], first["class"], f"{float(first['probability']):.3f}"]
    assert re.search(r" +\| ".join(map(re.escape, line)), printed)


def test_broken_videos_are_listed(copied, index, tmp_path, capsys):
    good = shutil.copy(index.path_of(0), tmp_path / "good.mp4")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(Path(good).read_bytes()[:-400])
    (tmp_path / "empty.mp4").touch()
    out = tmp_path / "out" / "table.json"
    assert run(tmp_path, "--checkpoint", copied, "--out", out, "--top-k", 1) == 0
    captured = capsys.readouterr()
    assert "2 videos failed to decode" in captured.err
    assert str(cut) in captured.err
    rows = {Path(row["video"]).name: row for row in json.loads(out.read_text())}
    assert rows["good.mp4"]["error"] is None
    assert "Invalid data" in rows["empty.mp4"]["error"]
    assert rows["cut.mp4"]["class"] is None

    out.unlink()
    assert run(cut, tmp_path / "empty.mp4", "--checkpoint", copied, "--out", out) == 2
    error = capsys.readouterr().err
    assert f"error: none of 2 videos could be decoded: {cut}" in error
    assert not out.exists()


def test_video_that_crashes_the_decoder_is_listed(copied, index, tmp_path, break_decoder, capsys):
    for video, name in enumerate(["good.mp4", "bad.mp4"]):
        shutil.copy(index.path_of(video), tmp_path / name)
    break_decoder("bad.mp4")
    assert run(tmp_path, "--checkpoint", copied) == 0
    captured = capsys.readouterr()
    assert "good.mp4" in captured.out
    assert f"{tmp_path / 'bad.mp4'}: a loader worker died (SIGSEGV)" in captured.err


def test_single_video_that_crashes_the_decoder_is_one_line(
    copied, index, tmp_path, break_decoder, capsys
):
    bad = Path(shutil.copy(index.path_of(0), tmp_path / "bad.mp4"))
    break_decoder("bad.mp4")
    out = tmp_path / "table.csv"
    assert run(bad, "--checkpoint", copied, "--out", out) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert line.startswith(f"error: {bad}: a loader worker died (SIGSEGV)")
    assert not out.exists()


@pytest.fixture
def server(index):
    """Serves the first video as /good.mp4 and cut short as /cut.mp4; everything else is missing."""
    content = index.path_of(0).read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.partition("?")[0] not in ("/good.mp4", "/cut.mp4"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: -100 if "cut" in self.path else None])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
        thread.join()


def test_url_gives_the_same_as_the_file(copied, index, server):
    recognizer = Recognizer.from_checkpoint(copied, device="cpu")
    np.testing.assert_array_equal(
        recognizer(f"{server}/good.mp4?token=1").scores, recognizer(index.path_of(0)).scores
    )


def test_url_that_cannot_be_downloaded_is_one_line(copied, server, capsys):
    for url, reason in {
        f"{server}/missing.mp4": "HTTP status 404",
        f"{server}/cut.mp4": r"received \d+ of \d+ bytes",
        "http://127.0.0.1:9/x.mp4": "[Cc]onnection refused",
    }.items():
        assert run(url, "--checkpoint", copied) == 2
        line = rf"error: {url}: could not be downloaded \(.*{reason}.*\)\n"
        assert re.fullmatch(line, capsys.readouterr().err)


def test_download_of_a_killed_worker_is_removed(
    copied, server, break_decoder, temporary_folder, capsys
):
    break_decoder("good.mp4")
    assert run(f"{server}/good.mp4", "--checkpoint", copied) == 2
    assert "a loader worker died (SIGSEGV)" in capsys.readouterr().err
    left = {path.parent.parent for path in temporary_folder.rglob("good.mp4")}
    assert left == {Path(get_temp_dir())}  # which this process removes at its end


def test_run_folder_means_its_best_or_newest_checkpoint(trained_checkpoint, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copy(trained_checkpoint, checkpoints)
    assert load_network(tmp_path / "run", device=CPU)[0].step == 2
    best = load_checkpoint(trained_checkpoint)
    best["step"] = 1
    torch.save(best, checkpoints / "best.pt")
    assert load_network(tmp_path / "run", device=CPU)[0].step == 1
    with pytest.raises(ValueError, match="no checkpoint in .*; give the output_dir of a training"):
        load_network(tmp_path, device=CPU)


def test_converted_weights_give_the_same(trained_checkpoint, index, tmp_path):
    weights = tmp_path / "network.safetensors"
    assert cli.main(["convert", str(trained_checkpoint), str(weights)]) == 0
    ours = Recognizer.from_checkpoint(weights, device="cpu")
    theirs = Recognizer.from_checkpoint(trained_checkpoint, device="cpu")
    video = index.path_of(3)
    np.testing.assert_array_equal(ours(video).scores, theirs(video).scores)
    assert ours(video).top(3) == theirs(video).top(3)
    assert ours.class_names == index.class_names


def test_network_of_the_demo_knows_the_motions(index):
    """On clips that it has not been trained on, of the same kind but shorter."""
    assert DEMO_NETWORK.stat().st_size < 2e6
    recognizer = Recognizer.from_checkpoint(DEMO_NETWORK, device="cpu")
    assert recognizer.class_names == index.class_names
    right = [
        prediction.top(1)[0][0] == index.class_names[label]
        for prediction, label in zip(recognizer.predict(index), index.labels, strict=True)
    ]
    assert len(right) == 6
    assert all(right)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere.mp4"], "nowhere.mp4: no such file; give a video, a folder of videos"),
        (["{folder}/empty"], "{folder}/empty: no videos in this folder"),
        (["{video}", "--checkpoint", "none.pt"], "checkpoint not found: none.pt"),
        (["{video}", "--checkpoint", "{video}"], "{video}: cannot be read as a checkpoint"),
        (["{video}", "--out", "{folder}/x.txt"], "{folder}/x.txt: its name must end in .csv, .js"),
        (["{video}", "--out", "{video}/x.csv"], "{video}/x.csv cannot be written: {video} is not"),
        (["{video}", "--out", "/proc/x.csv"], "/proc/x.csv cannot be written: /proc is not a wri"),
        (["{folder}/\udcff.mp4"], "a file name is not UTF-8, rename it: "),
        (["{video}", "--set", "test.clips=3"], "override 'test.clips=3': unknown key"),
        (["{video}", "--set", "model.norm=bn"], "{checkpoint}: does not match the model"),
    ],
)
def test_bad_input_is_one_line(copied, index, arguments, line, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"folder": tmp_path, "video": index.path_of(0), "checkpoint": copied}
    arguments = [argument.format(**places) for argument in arguments]
    if "--checkpoint" not in arguments:
        arguments += ["--checkpoint", copied]
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line.format(**places)}")
    assert error.count("\n") == 1


def test_network_of_images_is_refused(trained_checkpoint, index, tmp_path, capsys):
    saved = load_checkpoint(trained_checkpoint)
    del saved["config"]["clip"]
    path = tmp_path / "image.pt"
    torch.save(saved, path)
    assert run(index.path_of(0), "--checkpoint", path) == 2
    assert "is not of a video network" in capsys.readouterr().err


def test_output_never_replaces_an_input(trained_checkpoint, motion_set, tmp_path, capsys):
    index = VideoIndex.load(motion_set.val_index)
    video, table = tmp_path / "video.mp4", motion_set.folder / "copy.parquet"
    shutil.copy(index.path_of(0), video)
    shutil.copy(motion_set.val_index, table)
    (tmp_path / "link.mp4").symlink_to(video)
    before = {path: path.read_bytes() for path in (video, table)}
    network = ["--checkpoint", str(trained_checkpoint)]
    for command in (
        ["predict", table, "--out", table],
        ["predict", video, "--window", "1", "--render", tmp_path / "link.mp4"],
        ["predict", tmp_path, "--window", "1", "--render", video],
        ["explain", video, "--out", tmp_path / "e.png", "--render", video],
    ):
        assert cli.main([*map(str, command), *network]) == 2
        assert "cannot be written: it is also an input" in capsys.readouterr().err
    checkpoint = tmp_path / "x.onnx"
    shutil.copy(trained_checkpoint, checkpoint)
    assert cli.main(["export-model", str(checkpoint), str(checkpoint)]) == 2
    assert "cannot be written: it is also an input" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert cli.main(["predict", str(video), *network, "--out", str(tmp_path / "x.csv")]) == 0
    assert cli.main(["predict", str(video), *network, "--out", str(tmp_path / "x.csv")]) == 0


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("--top-k", "few", "'few' is not a whole number of at least 1"),
        ("--top-k", "0", "'0' is not a whole number of at least 1"),
        ("--window", "long", "'long' is not a positive number"),
        ("--every", "nan", "'nan' is not a positive number"),
    ],
)
def test_numbers_of_options_say_what_they_must_be(option, value, line, capsys):
    with pytest.raises(SystemExit):
        run("video.mp4", "--checkpoint", "x.pt", option, value)
    assert f"argument {option}: {line}" in capsys.readouterr().err


def test_weights_with_another_classifier_are_refused(trained_checkpoint, index, tmp_path, capsys):
    weights = tmp_path / "w.safetensors"
    assert cli.main(["convert", str(trained_checkpoint), str(weights)]) == 0
    options = ["--checkpoint", weights, "--set", "model.num_classes=7"]
    assert run(index.path_of(0), *options) == 2
    line = "it has no head.linear.weight, head.linear.bias for 7 classes; use weights with this"
    assert line in capsys.readouterr().err
