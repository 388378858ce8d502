import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from i3d_gn.data.to_device import ToDevice
from i3d_gn.data.transforms import evaluation_crops, normalize_clips
from i3d_gn.data.videos import TestVideos
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.run_dir import DirLock
from i3d_gn.engine.typed_config import ConfigError
from i3d_gn.models import i3d_tiny
from i3d_gn.video.multi_clip import VideoScorer, score_videos
from i3d_gn.video.scores import VideoScore, read_parts, write_part
from i3d_gn.video_io.decode import decode_frames
from i3d_gn.video_io.index import VideoIndex

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
TO_DEVICE = ToDevice(device=torch.device("cpu"), mean=MEAN, std=STD, precision="fp32")
PROCESS = Process(0, 1, torch.device("cpu"))
WINDOW = (2, 2)  # of a 36 pixel crop's feature map


@pytest.fixture
def index(motion_set):
    return VideoIndex.load(motion_set.val_index)


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = i3d_tiny(num_classes=6)
    torch.nn.init.normal_(network.head.linear.weight, std=0.5)  # scores that differ
    return network.eval()


def videos_of(index, spatial="full", num_clips=4):
    return TestVideos(
        index, num_clips=num_clips, num_frames=8, stride=2, spacing="nonlocal",
        align_starts=False, short_side=64,
        spatial=spatial, crop_size=48, backend="pyav",
    )  # fmt: skip


def brute_force(model, index, video, *, spatial, average, num_clips=4, window=WINDOW):
    """Decode and run every clip by itself, and average in loops."""
    length = int(index.num_frames[video])
    plan, crops = evaluation_crops(
        int(index.heights[video]),
        int(index.widths[video]),
        short_side=64,
        mode=spatial,
        crop_size=None if spatial == "full" else 48,
    )
    scores = []
    for clip in range(num_clips):
        start = length * clip // num_clips
        indices = [(start + 2 * k) % length for k in range(8)]
        frames = decode_frames(index.path_of(video), indices, plan=plan)
        for top, left, height, width in crops:
            clip_tensor = torch.from_numpy(frames[:, top : top + height, left : left + width])
            normalized = normalize_clips(clip_tensor.permute(3, 0, 1, 2)[None], MEAN, STD)
            features = {}
            hook = model.res5.register_forward_hook(
                lambda *a, features=features: features.update(map=a[2])
            )
            with torch.no_grad():
                model(normalized)
            hook.remove()
            (fmap,) = features["map"]
            for row in range(fmap.shape[2] - window[0] + 1):
                for column in range(fmap.shape[3] - window[1] + 1):
                    region = fmap[:, :, row : row + window[0], column : column + window[1]]
                    logits = model.head.linear(region.mean(dim=(1, 2, 3)))
                    scores.append(logits.softmax(0) if average == "softmax" else logits)
    return torch.stack(scores).mean(0).detach()


@pytest.mark.parametrize("average", ["softmax", "logits"])
@pytest.mark.parametrize("spatial", ["full", "three_crop", "center"])
def test_scores_equal_a_brute_force_loop(model, index, spatial, average):
    video = videos_of(index, spatial)[2]
    assert len(video.frames) < 4 * 8  # clips share frames
    for clips_per_forward in (1, 3, 10):
        scorer = VideoScorer(model, TO_DEVICE, WINDOW, average, clips_per_forward)
        ours = scorer(video)
        expected = brute_force(model, index, 2, spatial=spatial, average=average)
        torch.testing.assert_close(ours.float(), expected, rtol=1e-4, atol=1e-5)


def run(model, index, folder, tag="tag"):
    scorer = VideoScorer(model, TO_DEVICE, WINDOW, "softmax", clips_per_forward=4)
    return score_videos(
        scorer, videos_of(index), folder=folder, tag=tag, process=PROCESS, num_workers=0
    )


def test_scores_are_written_once_per_video(model, index, tmp_path):
    outcome = run(model, index, tmp_path)
    assert outcome is not None
    table = pq.read_table(tmp_path / "scores.parquet").to_pydict()
    assert table["path"] == index.paths
    scores = np.array(table["scores"])
    np.testing.assert_allclose(scores.sum(1), 1, rtol=1e-5)
    expected = 100 * (scores.argmax(1) == np.array(table["label"])).mean()
    assert outcome.metrics.top1 == pytest.approx(expected)
    assert outcome.metrics.num_videos == len(index)
    assert not (tmp_path / "parts").exists()


def test_stopped_test_resumes_with_the_same_scores(model, index, tmp_path, monkeypatch):
    run(model, index, tmp_path / "whole")
    monkeypatch.setattr("i3d_gn.video.multi_clip.VIDEOS_PER_PART", 3)
    scored = []

    score = VideoScorer.__call__

    def stops_after_five(scorer, video):
        scored.append(video.video)
        if len(scored) == 5:
            raise KeyboardInterrupt
        return score(scorer, video)

    monkeypatch.setattr(VideoScorer, "__call__", stops_after_five)
    with pytest.raises(KeyboardInterrupt):
        run(model, index, tmp_path / "stopped")
    assert [s.video for s in read_parts(tmp_path / "stopped" / "parts" / "tag")] == [0, 1, 2, 3]
    run(model, index, tmp_path / "stopped")
    assert scored == [0, 1, 2, 3, 4, 4, 5]
    tables = [pq.read_table(tmp_path / d / "scores.parquet") for d in ("whole", "stopped")]
    assert tables[0].equals(tables[1])


def test_scores_of_another_tag_are_not_reused(model, index, tmp_path):
    run(model, index, tmp_path / "whole")
    wrong = np.full(6, 1 / 6, dtype=np.float32)
    write_part(tmp_path / "parts" / "other", [VideoScore(v, 0, wrong, None) for v in range(6)], 0)
    run(model, index, tmp_path, tag="ours")
    tables = [pq.read_table(folder / "scores.parquet") for folder in (tmp_path / "whole", tmp_path)]
    assert tables[0].equals(tables[1])


def test_scores_of_the_same_tag_are_reused(model, index, tmp_path):
    saved = np.arange(6, dtype=np.float32)
    write_part(tmp_path / "parts" / "tag", [VideoScore(2, 0, saved, None)], 0)
    run(model, index, tmp_path)
    scores = pq.read_table(tmp_path / "scores.parquet")["scores"].to_pylist()
    assert scores[2] == saved.tolist()
    assert sum(scores[1]) == pytest.approx(1)


def test_non_finite_scores_are_an_error(model, index, tmp_path):
    torch.nn.init.constant_(model.head.linear.bias, float("nan"))
    with pytest.raises(ValueError, match=f"6 of 6 videos have .*not finite.*{index.paths[0]}"):
        run(model, index, tmp_path)


def test_broken_video_is_listed_and_does_not_count(model, index, tmp_path, monkeypatch):
    whole = TestVideos.__getitem__

    def breaks_one(self, video):
        item = whole(self, video)
        return item._replace(broken="no frames") if video == 3 else item

    monkeypatch.setattr(TestVideos, "__getitem__", breaks_one)
    outcome = run(model, index, tmp_path)
    assert outcome is not None
    assert outcome.skipped == {index.paths[3]: "no frames"}
    assert outcome.metrics.num_videos == len(index) - 1
    monkeypatch.setattr(
        TestVideos, "__getitem__", lambda s, v: whole(s, v)._replace(broken="no frames")
    )
    with pytest.raises(ValueError, match="none of 6 videos could .* no frames; check data.root"):
        run(model, index, tmp_path / "all")


def test_videos_that_failed_are_tried_again(model, index, tmp_path, monkeypatch):
    run(model, index, tmp_path / "whole")
    whole = TestVideos.__getitem__
    monkeypatch.setattr(
        TestVideos, "__getitem__", lambda s, v: whole(s, v)._replace(broken="out of reach")
    )
    for _ in range(2):
        with pytest.raises(ValueError, match="none of 6 videos could be decoded: out of reach"):
            run(model, index, tmp_path)
    monkeypatch.setattr(TestVideos, "__getitem__", whole)
    outcome = run(model, index, tmp_path)
    assert outcome is not None
    assert outcome.skipped == {}
    tables = [pq.read_table(folder / "scores.parquet") for folder in (tmp_path / "whole", tmp_path)]
    assert tables[0].equals(tables[1])


def test_new_part_does_not_replace_one_of_the_same_ends(tmp_path):
    scores = np.ones(6, dtype=np.float32)
    write_part(tmp_path, [VideoScore(v, 0, None if v != 1 else scores, None) for v in range(3)], 0)
    write_part(tmp_path, [VideoScore(v, 0, scores, None) for v in (0, 2)], 0)
    assert all(found.scores is not None for found in read_parts(tmp_path))


def test_damaged_part_is_a_one_line_error(model, index, tmp_path):
    parts = tmp_path / "parts" / "tag"
    parts.mkdir(parents=True)
    damaged = parts / "00000000-00000001-0.parquet"
    for write in (
        lambda: damaged.write_bytes(b"no parquet"),
        lambda: pq.write_table(pa.table({"video": ["a"]}), damaged),
    ):
        write()
        with pytest.raises(
            ValueError, match=r"00000000-.*parquet is damaged .* delete it"
        ) as caught:
            run(model, index, tmp_path)
        assert "\n" not in str(caught.value)


def test_scores_of_other_videos_are_an_error(model, index, tmp_path):
    scores = np.zeros(6, dtype=np.float32)
    write_part(tmp_path / "parts" / "tag", [VideoScore(99, 0, scores, None)], 0)
    with pytest.raises(ValueError, match="holds scores of 7 videos, not of the 6 of the index"):
        run(model, index, tmp_path)


def test_two_tests_in_one_folder_are_refused(model, index, tmp_path):
    lock = DirLock(tmp_path)
    with pytest.raises(ConfigError, match="in use by another process"):
        run(model, index, tmp_path)
    lock.close()
    run(model, index, tmp_path)
