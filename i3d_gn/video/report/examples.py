"""Test videos worth looking at, with frames: confident mistakes and best hits."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from i3d_gn.video.report.runs import Run, Test
from i3d_gn.video_io.crop_plan import CropPlan
from i3d_gn.video_io.decode import VideoDecodeError, decode_frames
from i3d_gn.video_io.index import VideoIndex
from i3d_gn.video_io.strips import frame_strip

NUM_FRAMES = 6
_HEIGHT = 96  # pixels


@dataclass(frozen=True)
class Example:
    """A test video: its class, the predicted one, and the probability of the latter."""

    path: str
    true: str
    predicted: str
    confidence: float


def confident_mistakes(test: Test, limit: int) -> list[Example]:
    """The mistakes with the highest scores, at most one per pair of true and predicted class."""
    return _best(test, limit, right=False)


def best_hits(test: Test, limit: int) -> list[Example]:
    """The hits with the highest scores, at most one per class."""
    return _best(test, limit, right=True)


def _best(test: Test, limit: int, *, right: bool) -> list[Example]:
    predictions = test.predictions
    confidence = test.scores.max(axis=1)
    wanted = np.flatnonzero((predictions == test.labels) == right)
    order = wanted[np.argsort(-confidence[wanted], kind="stable")]
    chosen: dict[tuple[int, int], Example] = {}
    for i in order:
        if len(chosen) == limit:
            break
        true, predicted = int(test.labels[i]), int(predictions[i])
        chosen.setdefault(
            (true, predicted),
            Example(
                test.paths[i],
                test.class_names[true],
                test.class_names[predicted],
                float(confidence[i]),
            ),
        )
    return list(chosen.values())


@dataclass
class TestFrames:
    """Frames of test videos, each video decoded once; remembers why an index cannot be read."""

    __test__ = False

    _indexes: dict[tuple[str, str | None], VideoIndex | str] = field(default_factory=dict)
    _numbers: dict[int, dict[str, int]] = field(default_factory=dict)
    _strips: dict[tuple[int, str], np.ndarray | str] = field(default_factory=dict)

    def strip(self, run: Run, path: str) -> np.ndarray | str:
        """Frames of a test video of a run, uint8 (H, W, 3), or why there are none."""
        index = self.index(run)
        if isinstance(index, str):
            return index
        key = (id(index), path)
        if key not in self._strips:
            self._strips[key] = self._decode(index, path)
        return self._strips[key]

    def index(self, run: Run) -> VideoIndex | str:
        """The index of the test videos of a run, or why it cannot be read."""
        key = (run.config.data.val_index, run.config.data.root)
        if key not in self._indexes:
            try:
                self._indexes[key] = VideoIndex.load(key[0], root=key[1])
            except (ValueError, OSError) as error:
                self._indexes[key] = str(error)
        return self._indexes[key]

    def _decode(self, index: VideoIndex, path: str) -> np.ndarray | str:
        if id(index) not in self._numbers:
            self._numbers[id(index)] = {name: i for i, name in enumerate(index.paths)}
        number = self._numbers[id(index)].get(path)
        if number is None:
            return f"{path} is not in {index.index_path} anymore"
        length, count = int(index.num_frames[number]), NUM_FRAMES
        height, width = int(index.heights[number]), int(index.widths[number])
        rows = min(_HEIGHT, height)
        columns = max(1, width * rows // height)
        try:
            with index.file_of(number) as file:
                frames = decode_frames(
                    file,
                    np.unique(np.linspace(0, length - 1, count).astype(int)),
                    plan=CropPlan(rows, columns, 0, 0, rows, columns),
                    size=(height, width),
                )
        except (VideoDecodeError, OSError) as error:
            return str(error)
        return frame_strip(frames, num_frames=count, max_height=_HEIGHT)
