import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from i3d_gn import cli
from i3d_gn.engine.typed_config import to_dict, to_yaml
from i3d_gn.files import write_text
from i3d_gn.video.config import load_config
from i3d_gn.video.evaluate import evaluate
from i3d_gn.video.report import table, table8
from i3d_gn.video.report.charts import Line, line_chart, thin
from i3d_gn.video.report.classes import (
    class_accuracy,
    confused_classes,
    confusion_counts,
    most_confused,
)
from i3d_gn.video.report.examples import TestFrames, best_hits, confident_mistakes
from i3d_gn.video.report.figure import plot
from i3d_gn.video.report.page import page_context, write_page
from i3d_gn.video.report.runs import Run, Test, read_run, read_runs
from i3d_gn.video.train import train
from i3d_gn.video_io.decode import decode_frames
from i3d_gn.video_io.index import VideoIndex, write_index
from tests.runs import records_of

VOID = {"meta", "img", "br", "link", "input", "hr", "path", "use", "wbr"}


class Page(HTMLParser):
    """What a page consists of; fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(" ".join(data.split()))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def run(small_run, one_process, tmp_path):
    config = small_run("train.steps=4")
    train(config, one_process)
    return config, tmp_path / "run"


def row_of(folder):
    (row,) = table.rows([read_run(folder)])
    return dict(zip(table.HEADER, row, strict=True))


def test_table_has_the_results_of_the_run(run, one_process):
    config, folder = run
    before = row_of(folder)
    assert [name for name, cell in before.items() if cell == "not run"] == [
        "multi-clip top-1", "top-5",
    ]  # fmt: skip
    results = evaluate(config, None, one_process)
    assert results is not None
    values = row_of(folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if line["kind"] == "train"]
    assert values["train loss"] == f"{losses[-1]:.3f}"
    assert values["multi-clip top-1"] == f"{results['top1']:.1f} (3 clips)"
    assert values["videos"] == "6"
    assert values["steps"] == "4"


def test_only_tests_with_the_settings_of_the_run_count(run, one_process, small_run, caplog):
    config, folder = run
    results = evaluate(config, None, one_process)
    evaluate(small_run("train.steps=4", "test.num_clips=2"), None, one_process)
    evaluate(small_run("train.steps=4", "clip.stride=1"), None, one_process)
    (damaged := folder / "test_damaged").mkdir()
    (damaged / "results.json").write_text("{")
    caplog.clear()
    assert read_run(folder).test.results == results
    assert "num_clips: 2 -> 3" in caplog.text
    assert "stride: 1 -> 2" in caplog.text
    assert "test_damaged (damaged)" in caplog.text


def test_newest_tested_checkpoint_counts_and_its_step_is_named(run, one_process):
    config, folder = run
    old = folder / "checkpoints" / "step_00000002.pt"
    new = evaluate(config, None, one_process)
    evaluate(config, old, one_process)  # later, but of an older checkpoint
    assert read_run(folder).test.results == new
    for path in folder.glob("test_step_00000004*/results.json"):
        path.unlink()
    assert row_of(folder)["multi-clip top-1"].endswith("(3 clips, step 2)")


def test_test_of_todays_index_counts_then_the_last(run, one_process, motion_set, caplog, tmp_path):
    config, folder = run
    index = tmp_path / "val.parquet"
    config = replace(config, data=replace(config.data, val_index=str(index)))
    write_text(folder / "config.yaml", to_yaml(config))
    whole = VideoIndex.load(motion_set.val_index)
    results, versions = {}, {}
    for count in (6, 4, 5):
        write_index(
            index, records_of(whole)[:count], class_names=whole.class_names, root=whole.root
        )
        results[count] = evaluate(config, None, one_process)
        versions[count] = index.read_bytes()
    caplog.clear()
    for count in (6, 4, 5):
        index.write_bytes(versions[count])
        assert read_run(folder).test.results == results[count]
    assert caplog.text == ""
    index.write_bytes(b"")
    assert read_run(folder).test.results == results[5]
    assert "val.parquet has changed since; evaluate again" in caplog.text


def test_runs_of_a_grid_that_failed_at_once_are_left_out(run, caplog, tmp_path):
    _, folder = run
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "grid.log").write_text("error: unknown key")
    assert [run.name for run in read_runs([folder, tmp_path / "failed"])] == ["run"]
    assert "failed is left out: it has not begun" in caplog.text
    with pytest.raises(ValueError, match="none of 1 runs of the grid has begun"):
        read_runs([tmp_path / "failed"])


def test_page_shows_a_trained_run_and_needs_nothing_else(run, one_process, tmp_path, motion_set):
    config, folder = run
    results = evaluate(config, None, one_process)
    path = tmp_path / "report.html"
    read = read_run(folder)
    write_page([read], path)
    page = Page(path.read_text())
    text = " ".join(page.texts)
    assert f"{results['top1']:.1f}" in page.texts
    assert results["checkpoint_sha256"] in page.texts
    assert "What the network sees" in text
    assert len(page.all("svg")) >= 8
    pictures = page.all("img")
    assert len(pictures) == 8 + len(read.test.paths)  # training clips; every test video once
    for picture in pictures:
        assert picture["alt"]
        assert int(picture["width"]) > 0 < int(picture["height"])
        assert picture["src"].startswith("data:image/webp;base64,")
    assert not page.all("script")
    assert not page.all("link")
    references = re.findall(r"(?:src|href)=[\"']?(\S{8})", path.read_text())
    assert {reference[:5] for reference in references if reference[0] != "#"} == {"data:"}
    assert "url(http" not in path.read_text()
    assert len({a["id"] for _, a in page.tags if "id" in a}) == sum("id" in a for _, a in page.tags)


def test_frames_of_examples_are_those_of_the_video(run, one_process, motion_set):
    config, folder = run
    evaluate(config, None, one_process)
    read = read_run(folder)
    index = VideoIndex.load(motion_set.val_index)
    number = 4
    strip = TestFrames().strip(read, index.paths[number])
    length = int(index.num_frames[number])
    frames = decode_frames(index.path_of(number), [0, length - 1])
    height, width = frames.shape[1:3]
    assert strip.shape[0] == height  # of less than 96 pixels
    np.testing.assert_array_equal(strip[:, :width], frames[0])
    np.testing.assert_array_equal(strip[:, -width:], frames[1])
    assert "not in" in TestFrames().strip(read, "gone.mp4")


def scored(scores, labels, class_names=None, **results):
    scores = np.array(scores, dtype=float)
    names = class_names or [f"class {i}" for i in range(scores.shape[1])]
    paths = [f"{i}.mp4" for i in range(len(scores))]
    return Test({"step": 1, **results}, names, paths, np.array(labels), scores)


SIX_VIDEOS = scored(
    [[0.9, 0.1, 0], [0.2, 0.8, 0], [0.4, 0.6, 0], [0.3, 0.7, 0], [0, 0, 1], [0.1, 0.2, 0.7]],
    [0, 0, 0, 1, 1, 1],
)


def test_class_accuracy_and_confusions():
    counts = confusion_counts(SIX_VIDEOS)
    assert counts.tolist() == [[1, 2, 0], [0, 1, 2], [0, 0, 0]]
    np.testing.assert_allclose(class_accuracy(counts), [1 / 3, 1 / 3, np.nan])
    first, second = most_confused(counts, 5)
    assert (first.true, first.predicted, first.count, first.share) == (0, 1, 2, 2 / 3)
    assert (second.true, second.predicted) == (1, 2)


def test_classes_that_are_shown_are_those_confused_most_often():
    counts = np.eye(400, dtype=np.int64) * 50
    counts[7, 300], counts[300, 7], counts[20, 21], counts[1, 2] = 9, 8, 7, 1
    assert confused_classes(counts, 4) == [7, 20, 21, 300]
    assert confused_classes(counts, 3) == [7, 300]  # no class without its partner
    assert confused_classes(counts[:3, :3], 4) == [0, 1, 2]


def test_confident_mistakes_and_best_hits():
    mistakes = confident_mistakes(SIX_VIDEOS, 5)  # one for each pair of classes
    assert [(m.path, m.true, m.predicted) for m in mistakes] == [
        ("4.mp4", "class 1", "class 2"), ("1.mp4", "class 0", "class 1"),
    ]  # fmt: skip
    assert [m.confidence for m in mistakes] == [1.0, 0.8]
    assert [hit.path for hit in best_hits(SIX_VIDEOS, 5)] == ["0.mp4", "3.mp4"]
    assert [hit.path for hit in best_hits(SIX_VIDEOS, 1)] == ["0.mp4"]


def kinetics_run(name="gn_32x2_8clips", top1=72.0, *, overrides=(), num_videos=800, log=()):
    config = load_config(f"configs/kinetics400/{name}.yaml", overrides)
    generator = np.random.default_rng(0)
    names = [f"class {i} <b>&" for i in range(400)]
    scores = generator.dirichlet(np.full(400, 0.01), num_videos)
    labels = np.where(
        generator.random(num_videos) < 0.7, scores.argmax(1), generator.integers(0, 400, num_videos)
    )
    results = {
        "top1": top1, "top5": 90.0, "mean_class_accuracy": 71.0, "num_videos": num_videos,
        "num_clips": 10, "num_skipped": 1, "skipped": {"a<b>.mp4": "no video stream"},
    }  # fmt: skip
    test = scored(scores, labels, names, **results)
    return Run(name, config, list(log), test, [], {})


def test_page_of_400_classes_is_small_and_escapes_names(tmp_path):
    steps = range(400, 400_001, 400)
    log = [
        {"kind": "train", "step": s, "loss": 1.0, "top1": 60.0, "timing": {"memory_gib": 1.0}}
        for s in steps
    ]
    path = tmp_path / "report.html"
    write_page([kinetics_run(log=log)], path)
    assert path.stat().st_size < 1_000_000
    page = Page(path.read_text())
    assert not page.all("b")
    assert "class 0 <b>&" in page.texts
    assert len(page.all("td")) < 2500  # and not 160,000
    assert "The videos are not at hand" not in page.texts
    assert any("index not found" in text for text in page.texts)


def test_table8_has_the_runs_that_reproduce_it():
    runs = [
        kinetics_run(),
        kinetics_run("bn_64x1_4clips", 73.0),
        kinetics_run(overrides=["test.num_clips=5"]),
        kinetics_run(overrides=["model.name=i3d_resnet101"]),
        kinetics_run(overrides=["model.num_groups=16"]),
    ]
    found = table8.cells(runs)
    assert {key: [cell.top1 for cell in cells] for key, cells in found.items()} == {
        ("gn", "32x2 (8)"): [72.0], ("bn", "64x1 (4)"): [73.0],
    }  # fmt: skip
    rows = page_context(runs)["table8"]["rows"]
    assert rows[1]["paper"] == [(73.0, 90.6), (72.8, 90.6), (74.5, 91.7)]


def test_long_curves_are_averaged_over_neighbors():
    x, y = thin(range(30_000), [0.0, 1.0] * 15_000)
    assert len(x) == len(y) <= 300
    np.testing.assert_allclose(y, 0.5)
    assert thin([1, 2], [5.0, 6.0])[1].tolist() == [5.0, 6.0]


def test_chart_is_drawn_in_the_colors_of_the_page():
    chart = line_chart("x", [Line([0, 1], [2.0, 3.0], 1, dashed=True)], description="of x")
    (curve,) = re.findall(r'<path d="[^"]*"[^>]*stroke-dasharray[^>]*var\(--series-1\)', chart.svg)
    assert curve
    assert not re.findall(r"#[0-9a-f]{6}\b", chart.svg)


def test_logits_are_shown_as_probabilities(untrained):
    folder = untrained
    config = load_config(folder / "config.yaml")
    (test := folder / "test_x").mkdir()
    logits = np.array([[0.0, np.log(3.0)], [1000.0, 0.0]], dtype=np.float32)
    scores = pa.table(
        {"path": ["a", "b"], "label": [1, -1], "scores": pa.array(list(logits))}
    ).replace_schema_metadata({"class_names": '["x", "y"]'})
    pq.write_table(scores, test / "scores.parquet")
    results = {"step": 4, "average": "logits", "config": to_dict(config)}
    (test / "results.json").write_text(json.dumps(results))
    read = read_run(folder).test
    np.testing.assert_allclose(read.scores, [[0.25, 0.75]], rtol=1e-6)
    assert read.paths == ["a"]  # the other video has no label
    (test / "scores.parquet").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"scores.parquet is damaged \(.*\); delete .* evaluate"):
        read_run(folder)


@pytest.fixture
def untrained(motion_set, small_run, tmp_path):
    """An output_dir with a config alone."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(small_run()))
    return folder


def test_half_written_log_is_shown_as_far_as_it_goes(untrained, tmp_path, capsys):
    lines = [
        {"kind": "train", "step": 2, "loss": 1.5, "top1": 10.0, "grad_norm": None},
        {"kind": "train", "step": 4, "top1": 12.5},
        {"kind": "val", "step": 4},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr'
    (untrained / "log.jsonl").write_text(text)
    outputs = ["--out", str(tmp_path / "c.png"), "--html", str(tmp_path / "r.html")]
    assert cli.main(["report", str(untrained), *outputs]) == 0
    page = Page((tmp_path / "r.html").read_text())
    labels = [a["aria-label"] for a in page.all("div") if "aria-label" in a]
    assert any("Last values: run (training) 87.5 %" in label for label in labels)
    assert "not tested" in page.texts
    assert "| 1.500" in capsys.readouterr().out


def test_run_without_a_log_says_so(untrained, tmp_path):
    plot([read_run(untrained)], tmp_path / "c.png")
    assert (tmp_path / "c.png").is_file()
    write_page([read_run(untrained)], tmp_path / "r.html")
    assert "No run has a training log yet." in Page((tmp_path / "r.html").read_text()).texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone", "--html", "r.html"], "gone has no config.yaml; pass the output_dir"),
        (["run", "--html", "folder.html"], "folder.html cannot be written: it is a folder"),
        (["run", "--html", "folder"], "folder: its name must end in .html"),
        (["run", "--html", "file/r.html"], "file/r.html cannot be written"),
        (["run", "--out", "c.webm"], "c.webm: its name must end in .png, .pdf, .svg"),
    ],
)
def test_errors_are_one_line_and_leave_no_file(
    untrained, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["report", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_of_the_same_name_are_told_apart(untrained, tmp_path):
    other = tmp_path / "seed1" / "run"
    other.mkdir(parents=True)
    (other / "config.yaml").write_bytes((untrained / "config.yaml").read_bytes())
    names = [run.name for run in read_runs([untrained, other])]
    assert names[1] == "seed1/run"
    assert names[0].endswith("/run")
    assert names[0] != names[1]
