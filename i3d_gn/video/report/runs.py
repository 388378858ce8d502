"""Reading runs from their `output_dir`: config, log, training clips, and the test that counts."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from i3d_gn.engine.run_dir import config_of_run
from i3d_gn.engine.run_log import STRIPS, read_log
from i3d_gn.engine.typed_config import differences, to_dict
from i3d_gn.files import file_sha256
from i3d_gn.video.config import ClipConfig, Config, TestConfig, load_config
from i3d_gn.video_io.strips import Strip, read_strips

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Test:
    """A multi-clip test of a network.

    Attributes:
        results: The contents of `results.json`.
        class_names: (K,)
        paths: Labeled videos (V,), below the root of their index.
        labels: Their classes (V,).
        scores: Their probabilities (V, K).
    """

    __test__ = False

    results: dict[str, Any]
    class_names: list[str]
    paths: list[str]
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]

    @property
    def predictions(self) -> npt.NDArray[np.int64]:
        """The best class of each video (V,); of classes with equal scores the first one."""
        return self.scores.argmax(axis=1)


@dataclass(frozen=True)
class Run:
    """The contents of an `output_dir`.

    Attributes:
        name: Of the folder; of several runs with the same, enough of the path to tell them apart.
        config: Of the run.
        log: Lines of `log.jsonl`.
        test: The newest multi-clip test that is comparable with other runs, None if there is none.
        strips: The first training clips, as the network sees them.
        environment: Versions and device; empty if the run does not say.
    """

    name: str
    config: Config
    log: list[dict[str, Any]]
    test: Test | None
    strips: list[Strip]
    environment: dict[str, Any]

    def curve(self, kind: str, value: str) -> tuple[list[int], list[float]]:
        """Steps and values from the log lines of one kind that have the value.

        `value` may be a path such as "timing.memory_gib".
        """
        points = []
        for line in self.log:
            if line["kind"] == kind:
                found: Any = line
                for key in value.split("."):
                    found = found.get(key) if isinstance(found, dict) else None
                if isinstance(found, (int, float)):
                    points.append((line["step"], float(found)))
        return [step for step, _ in points], [number for _, number in points]

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the log."""
        return max((line["step"] for line in self.log), default=0)


def read_runs(folders: list[Path]) -> list[Run]:
    """Read runs; see `read_run`. Runs of a grid that failed before they began are left out.

    Raises:
        ValueError: No run is left, or as `read_run`.
    """
    failed = [f for f in folders if (f / "grid.log").is_file() and not (f / "config.yaml").exists()]
    for folder in failed:
        logger.warning("%s is left out: it has not begun; see %s", folder, folder / "grid.log")
    folders = [folder for folder in folders if folder not in failed]
    if failed and not folders:
        raise ValueError(f"none of {len(failed)} runs of the grid has begun")
    paths = [folder.absolute() for folder in folders]
    names = []
    for path in paths:
        depth = 1
        while depth < len(path.parts) and any(
            other != path and other.parts[-depth:] == path.parts[-depth:] for other in paths
        ):
            depth += 1
        names.append("/".join(path.parts[-depth:]))
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def read_run(folder: Path, name: str | None = None) -> Run:
    """Read a run's config, log and newest multi-clip test.

    Raises:
        ValueError: `folder` is not the `output_dir` of a run, or its scores are damaged.
    """
    config = config_of_run(folder, load_config, "train")
    found = find_test(folder, config)
    return Run(
        name=name or folder.name,
        config=config,
        log=read_log(folder / "log.jsonl"),
        test=None if found is None else read_test(*found),
        strips=read_strips(folder / STRIPS),
        environment=_read_environment(folder / "environment.json"),
    )


def find_test(folder: Path, config: Config) -> tuple[Path, dict[str, Any]] | None:
    """The test of a run's newest tested checkpoint, with the settings and videos of its config.

    Tests with other settings, clips or videos are not comparable with other runs; they are ignored,
    and named in a warning. Of several tests of the checkpoint the newest with today's index counts;
    if none is, a warning says so.

    Returns:
        Path and contents of its `results.json`, or None.
    """
    found, ignored = [], []
    index = Path(config.data.val_index)
    index_sha256 = file_sha256(index) if index.is_file() else None
    for path in sorted(folder.glob("test_*/results.json")):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            tested = results["config"]
            differing = (
                differences(tested["test"], to_dict(config.test), TestConfig)
                + differences(tested["clip"], to_dict(config.clip), ClipConfig)
                + [key for key in ("val_index",) if tested["data"][key] != config.data.val_index]
            )
            step = -1 if results["step"] is None else int(results["step"])
            of_index = index_sha256 in (None, results.get("index_sha256"))
            order = (step, of_index, path.stat().st_mtime_ns)
        except (OSError, ValueError, KeyError, TypeError):
            differing, order, results = ["damaged"], (-1, False, 0), {}
        if differing:
            ignored.append(f"{path.parent.name} ({'; '.join(differing)})")
        else:
            found.append((order, path, results))
    if ignored:
        logger.warning("%s: ignored tests of another kind: %s", folder, ", ".join(ignored))
    if not found:
        return None
    (_, of_index, _), path, results = max(found, key=lambda test: test[0])
    if not of_index:
        logger.warning("%s: %s has changed since; evaluate again", path.parent, index)
    return path, results


def read_test(path: Path, results: dict[str, Any]) -> Test:
    """The scores of a test that `find_test` found.

    Raises:
        ValueError: They are missing or damaged.
    """
    scores_path = path.with_name("scores.parquet")
    try:
        table = pq.read_table(scores_path, columns=["path", "label", "scores"])
        class_names = json.loads((table.schema.metadata or {})[b"class_names"])
        flat = table["scores"].combine_chunks().flatten().to_numpy().astype(np.float64)
        matrix = flat.reshape(len(table), len(class_names))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise ValueError(
            f"{scores_path} is damaged ({str(error).splitlines()[0]}); delete {path.parent}, and "
            "evaluate again"
        ) from error
    labels = table["label"].to_numpy()
    if results.get("average") == "logits":
        matrix = np.exp(matrix - matrix.max(axis=1, keepdims=True))
        matrix /= matrix.sum(axis=1, keepdims=True)
    labeled = labels >= 0
    paths = np.array(table["path"].to_pylist(), dtype=object)[labeled].tolist()
    return Test(results, class_names, paths, labels[labeled], matrix[labeled])


def _read_environment(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
