"""Scores of videos on disk: parts while a test runs, one table at the end.

    <folder>/parts/<tag>/<first video>-<last video>-<rank>[-<number>].parquet
    <folder>/scores.parquet      all parts, merged at the end

Parts make a test resumable with any number of ranks: a video with a score is not scored again. One
that failed to decode is tried again, as the reason may be gone, such as a folder out of reach.
"""

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from i3d_gn.engine.metrics import VideoMetrics, video_metrics
from i3d_gn.files import atomic_output
from i3d_gn.video_io.index import VideoIndex

_PART = pa.schema(
    [
        ("video", pa.int64()),
        ("label", pa.int64()),
        ("scores", pa.list_(pa.float32())),
        ("broken", pa.string()),
    ]
)


@dataclass(frozen=True)
class VideoScore:
    """The scores (K,) of one video, or why it has none."""

    video: int
    label: int
    scores: npt.NDArray[np.float32] | None
    broken: str | None


@dataclass(frozen=True)
class TestOutcome:
    """Accuracy over the videos that decode, and why the others do not.

    Attributes:
        metrics: Accuracy over the labeled videos, None if there are none.
        num_unlabeled: Videos that have scores but no label.
        skipped: Path below the index's root -> reason.
        timing: Of this rank: `videos` tested now, `seconds`, and `data_wait_share`, the fraction of
            them spent waiting for frames. Near 0 the network is the bottleneck, else decoding.
    """

    __test__ = False

    metrics: VideoMetrics | None
    num_unlabeled: int
    skipped: dict[str, str]
    timing: dict[str, float]

    def summary(self) -> dict[str, float]:
        """The metrics and the number of skipped videos."""
        accuracy = {} if self.metrics is None else asdict(self.metrics)
        counts = {"num_unlabeled": self.num_unlabeled} if self.num_unlabeled else {}
        return {**accuracy, **counts, "num_skipped": len(self.skipped)}


def write_part(parts: Path, scores: Sequence[VideoScore], rank: int) -> None:
    """Write the scores of some videos, atomically, beside the parts that are there."""
    table = pa.table(
        {
            "video": [s.video for s in scores],
            "label": [s.label for s in scores],
            "scores": [s.scores for s in scores],
            "broken": [s.broken for s in scores],
        },
        schema=_PART,
    )
    stem = f"{scores[0].video:08d}-{scores[-1].video:08d}-{rank}"
    names = itertools.chain(
        [f"{stem}.parquet"], (f"{stem}-{i}.parquet" for i in itertools.count(1))
    )
    _write_table(next(path for name in names if not (path := parts / name).exists()), table)


def read_parts(parts: Path) -> list[VideoScore]:
    """All scores written so far, each video once, in the order of the index.

    Of a video that failed and was tried again, the score.

    Raises:
        ValueError: A file is damaged.
    """
    found: dict[int, VideoScore] = {}
    for path in sorted(parts.glob("[0-9]*.parquet")):
        try:
            table = pq.read_table(path, schema=_PART)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged ({str(error).splitlines()[0]}); delete it, and its videos are "
                "scored again"
            ) from error
        for row in table.to_pylist():
            scores = None if row["scores"] is None else np.array(row["scores"], dtype=np.float32)
            score = VideoScore(row["video"], row["label"], scores, row["broken"])
            if score.video not in found or found[score.video].scores is None:
                found[score.video] = score
    return [found[video] for video in sorted(found)]


def merge_parts(
    parts: Path, index: VideoIndex, folder: Path, timing: dict[str, float]
) -> TestOutcome:
    """Replace all parts by `folder`/scores.parquet.

    Raises:
        ValueError: A video has no score (the ranks do not share `folder`), no video could be
            decoded, or scores are not finite.
    """
    scores = read_parts(parts)
    if [score.video for score in scores] != list(range(len(index))):
        raise ValueError(
            f"{parts} holds scores of {len(scores)} videos, not of the {len(index)} of the index: "
            "the ranks do not write to the same folder, or something else does; use storage that "
            "all of them share, delete the folder, and run again"
        )
    scored = [(s, s.scores) for s in scores if s.scores is not None]
    if not scored:
        raise ValueError(
            f"none of {len(scores)} videos could be decoded: {scores[0].broken}; check data.root "
            "and data.val_index, and run again"
        )
    matrix = np.stack([row for _, row in scored])
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(bad):
        first = scored[int(bad[0])][0].video
        raise ValueError(
            f"{len(bad)} of {len(matrix)} videos have scores that are not finite, the first "
            f"is {index.paths[first]}: the network diverged, or its arithmetic overflowed; test an "
            "earlier checkpoint, or with precision fp32"
        )
    labels = np.array([s.label for s, _ in scored])
    labeled = labels >= 0
    metrics = video_metrics(matrix[labeled], labels[labeled]) if labeled.any() else None
    table = pa.table(
        {
            "path": pa.array([index.paths[s.video] for s, _ in scored], pa.string()),
            "label": pa.array([s.label for s, _ in scored], pa.int64()),
            "scores": pa.array(list(matrix), pa.list_(pa.float32())),
        }
    ).replace_schema_metadata({"class_names": json.dumps(list(index.class_names))})
    _write_table(folder / "scores.parquet", table)
    shutil.rmtree(folder / "parts")
    skipped = {index.paths[s.video]: s.broken for s in scores if s.broken is not None}
    return TestOutcome(metrics, int((~labeled).sum()), skipped, timing)


def _write_table(path: Path, table: pa.Table) -> None:
    with atomic_output(path) as temporary:
        pq.write_table(table, temporary)
