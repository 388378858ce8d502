import csv
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from i3d_gn import cli
from i3d_gn.engine.figures import save_figure
from i3d_gn.video import Recognizer, draw
from i3d_gn.video.timeline import Moment, plot_timeline, render_timeline, timeline
from i3d_gn.video_io.decode import decode_frames, probe_video
from i3d_gn.video_io.index import VideoIndex


@pytest.fixture
def index(motion_set):
    return VideoIndex.load(motion_set.val_index)  # videos of 20 frames, 25 per second


@pytest.fixture
def recognizer(trained_checkpoint):
    return Recognizer.from_checkpoint(trained_checkpoint, device="cpu")


def run(*arguments):
    return cli.main(["predict", *map(str, arguments)])


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_window_of_the_whole_video_is_its_prediction(trained_checkpoint, index):
    # 20 frames take two clips of span 15, from frames 0 and 5.
    overrides = ["test.spacing=uniform", "test.num_clips=2"]
    recognizer = Recognizer.from_checkpoint(trained_checkpoint, overrides=overrides, device="cpu")
    (moment,) = timeline(recognizer, index, 1, window=5.0, every=5.0)
    expected = recognizer(index.path_of(1)).probabilities
    np.testing.assert_array_equal(moment.probabilities, expected)
    assert (moment.start_seconds, moment.end_seconds) == (0, pytest.approx(0.8))


def test_each_window_is_predicted_from_its_own_frames(recognizer, index, monkeypatch):
    seen = []
    score = recognizer.score
    monkeypatch.setattr(recognizer, "score", lambda video: seen.append(video) or score(video))
    moments = list(timeline(recognizer, index, 1, window=0.4, every=0.2))
    assert [m.start_seconds for m in moments] == pytest.approx([0, 0.2, 0.4])
    assert moments[-1].end_seconds == pytest.approx(0.8)
    frames = decode_frames(index.path_of(1), range(20))
    for number, video in enumerate(seen):
        assert video.clips.shape == (1, 8)  # 10 frames, and a clip of span 15 that loops
        wanted = 5 * number + (2 * np.arange(8)) % 10
        means = frames[wanted].mean(axis=(1, 2, 3))
        found = video.frames[video.clips[0]].float().mean(dim=(1, 2, 3))
        np.testing.assert_allclose(found, means, atol=1.5)  # resized


def test_timeline_is_printed_written_plotted_and_drawn(trained_checkpoint, index, tmp_path, capsys):
    path = index.path_of(0)
    out, plot, render = (tmp_path / name for name in ("t.csv", "t.png", "t.mp4"))
    outputs = ["--out", out, "--plot", plot, "--render", render, "--top-k", 2]
    options = ["--window", 0.4, "--checkpoint", trained_checkpoint]
    assert run(path, *options, *outputs) == 0
    rows = rows_of(out)
    assert [(row["start_seconds"], row["rank"]) for row in rows] == [
        ("0.0", "1"), ("0.0", "2"), ("0.4", "1"), ("0.4", "2"),
    ]  # fmt: skip
    best = f"{rows[0]['class']} {float(rows[0]['probability']):.2f}, {rows[1]['class']}"
    assert best in capsys.readouterr().out
    with Image.open(plot) as image:
        assert image.format == "PNG"
    source, written = probe_video(path), probe_video(render)
    assert (written.num_frames, written.width) == (source.num_frames, 480)
    assert written.height == source.height * 480 // source.width + 2 * 24 + 8
    assert written.fps == pytest.approx(source.fps)


def test_rendered_bars_are_those_of_the_nearest_window(recognizer, index, tmp_path):
    moments = [
        Moment(0.0, 0.4, np.array([0.9, 0.1], np.float32)),
        Moment(0.4, 0.8, np.array([0.2, 0.8], np.float32)),
    ]
    path = tmp_path / "r.mp4"
    recognizer.class_names = ("a", "b")
    render_timeline(recognizer, index, 0, moments, 1, path)
    frames = decode_frames(path, range(20))
    row = frames[:, -14, :, :].astype(int)  # through the bar; text does not reach the ends
    is_bar = row[..., 2] > 100
    assert (is_bar[:10, 400]).all()  # 0.9 of 480
    assert not is_bar[11:, 400].any()  # 0.8 of 480; frame 10 is as near to both
    assert is_bar[:, 300].all()


def test_plot_shows_the_classes_that_win(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "i3d_gn.video.timeline.save_figure", lambda figure, path: figures.append(figure)
    )
    rows = [[0.7, 0.2, 0.1], [0.4, 0.1, 0.5]]
    moments = [Moment(i, i + 1.0, np.array(row)) for i, row in enumerate(rows)]
    plot_timeline(tmp_path / "p.png", moments, ("a", "b", "c"))
    lines = figures[0].axes[0].lines
    assert [line.get_label() for line in lines] == ["a", "c"]
    assert lines[1].get_xdata().tolist() == [0.5, 1.5]
    assert lines[1].get_ydata().tolist() == [0.1, 0.5]


def test_any_class_name_is_in_the_legend(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "i3d_gn.video.timeline.save_figure",
        lambda figure, path: [save_figure(figure, path), figures.append(figure)],
    )
    names = ("_hidden", "$x$ and $y", "a\x1b[1m")
    moments = [Moment(i, i + 1.0, np.eye(3)[i]) for i in range(3)]
    plot_timeline(tmp_path / "p.png", moments, names)
    texts = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert texts == [" _hidden", r"\$x\$ and \$y", r"a\x1b[1m"]


def test_window_of_one_training_clip_takes_one_clip(recognizer, index, monkeypatch):
    """Of 8 x 2 frames: one clip covers 16, as in `features`."""
    clips = []
    score = recognizer.score
    monkeypatch.setattr(recognizer, "score", lambda item: clips.append(item.clips) or score(item))
    assert len(list(timeline(recognizer, index, 0, window=16 / 25, every=1.0))) == 1
    assert [item.shape for item in clips] == [(1, 8)]


def test_broken_videos_are_listed(trained_checkpoint, index, tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(index.path_of(0), folder / name)
    (folder / "b.mp4").write_bytes((folder / "b.mp4").read_bytes()[:-300])
    options = ["--window", 1, "--checkpoint", trained_checkpoint]
    assert run(folder, *options) == 0
    assert f"1 videos failed to decode:\n  {folder / 'b.mp4'}" in capsys.readouterr().err
    render = tmp_path / "r.mp4"
    assert run(folder, *options, "--render", render) == 2
    assert "error: 2 videos cannot be drawn; give one video" in capsys.readouterr().err
    assert run(folder / "b.mp4", *options, "--render", render) == 2
    assert not list(tmp_path.glob("*r.mp4*"))


@pytest.mark.parametrize("hang", [False, True])
def test_video_that_breaks_the_decoder_is_listed(
    trained_checkpoint, index, tmp_path, break_decoder, hang, capsys
):
    for video, name in enumerate(["a.mp4", "b.mp4"]):
        shutil.copy(index.path_of(video), tmp_path / name)
    out, alone = tmp_path / "t.csv", tmp_path / "alone.csv"
    options = ["--window", 0.4, "--checkpoint", trained_checkpoint]
    assert run(tmp_path / "b.mp4", *options, "--out", alone) == 0
    # After the first window of a.mp4 has arrived.
    break_decoder("a.mp4", hang=hang, first_frame=15)
    limit = ["--set", "data.timeout_seconds=8"] if hang else []
    assert run(tmp_path, *options, *limit, "--out", out) == 0
    reason = "a loader worker took longer than 8 s" if hang else "a loader worker died (SIGSEGV)"
    assert f"{tmp_path / 'a.mp4'}: {reason}" in capsys.readouterr().err
    rows = rows_of(out)
    assert rows[0]["error"].startswith(f"{tmp_path / 'a.mp4'}: {reason}")
    assert rows[1:] == rows_of(alone)


def test_render_of_a_video_that_crashes_the_decoder_leaves_no_file(
    trained_checkpoint, index, tmp_path, break_decoder, capsys
):
    break_decoder(index.path_of(0).name, first_frame=15)
    render = tmp_path / "r.mp4"
    options = ["--window", 0.4, "--checkpoint", trained_checkpoint]
    assert run(index.path_of(0), *options, "--render", render) == 2
    error = capsys.readouterr().err
    assert f"error: {index.path_of(0)}: a loader worker died (SIGSEGV)" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signal_while_rendering_leaves_no_file(
    trained_checkpoint, index, tmp_path, monkeypatch, number, status, no_children_yet, capsys
):
    def stopped(path, frames, **_options):
        next(iter(frames))
        path.write_bytes(b"half")
        unfinished.extend(tmp_path.iterdir())
        os.kill(os.getpid(), number)
        pytest.fail("the signal stops the command at once")

    unfinished = []
    monkeypatch.setattr(draw, "write_h264", stopped)
    render, out = tmp_path / "r.mp4", tmp_path / "t.csv"
    options = ["--window", 0.4, "--checkpoint", trained_checkpoint]
    assert run(index.path_of(0), *options, "--render", render, "--out", out) == status
    assert "run the same command again" in capsys.readouterr().err
    assert [path.suffix for path in unfinished] == [".part"]
    assert not list(tmp_path.iterdir())
    assert not multiprocessing.active_children()


def test_options_of_a_timeline_need_a_window(trained_checkpoint, capsys):
    with pytest.raises(SystemExit):
        run("x.mp4", "--checkpoint", trained_checkpoint, "--every", 1)
    assert "--every, --render and --plot need --window" in capsys.readouterr().err
