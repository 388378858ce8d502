"""The log of a run: lines of JSON, TensorBoard events, and pictures of its first samples."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from i3d_gn.engine.typed_config import to_flat_dict
from i3d_gn.files import write_text
from i3d_gn.video_io.strips import Strip, read_strips, write_strip

STRIPS = "training_clips"
PERCENTILES = (1, 20, 80, 99)  # of activations, as in [GN] Fig. 6

logger = logging.getLogger(__name__)


class RunLog:
    """`log.jsonl`, `tensorboard/`, `training_clips/` under `output_dir`; a context manager.

    Lines after `last_step`, which a stopped run wrote after its last checkpoint, are removed, so
    that the log of a resumed run equals that of an uninterrupted one in everything but `timing`.

    Args:
        output_dir: Of the run.
        last_step: Optimizer steps done when the run resumes.
        validate_last: The validation after `last_step` is still to be done: drop its lines.
        config: Of the run, for TensorBoard's table of hyperparameters.
        enabled: False on all ranks but 0, where nothing is written.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        last_step: int,
        validate_last: bool = False,
        config: Any = None,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self.last: dict[str, Any] = {}  # the newest value of each metric, as `val/top1`
        if not enabled:
            return
        self.path = output_dir / "log.jsonl"
        kept = [
            line
            for line in read_log(self.path)
            if line["step"] < last_step
            or (line["step"] == last_step and not (validate_last and line["kind"] != "train"))
        ]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._strips = output_dir / STRIPS
        if not last_step:
            shutil.rmtree(self._strips, ignore_errors=True)
        strips = read_strips(self._strips)
        self.num_strips = len(strips)
        self._tensorboard = _TensorBoard(output_dir / "tensorboard", kept, strips, config)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(
        self, kind: str, step: int, values: dict[str, Any], timing: dict[str, float] | None = None
    ) -> None:
        """Add one line.

        Args:
            kind: "train", "val" or "test".
            step: Optimizer steps done.
            values: Results, which are a function of config and seed.
            timing: Measurements, which depend on the machine.
        """
        self.last.update({f"{kind}/{name}": value for name, value in values.items()})
        if not self.enabled:
            return
        line = {"kind": kind, "step": step, **values, **({"timing": timing} if timing else {})}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._tensorboard.add(line)

    def write_strip(self, strip: Strip) -> None:
        """Add a picture of a training sample; called before the first step."""
        if self.enabled:
            write_strip(self._strips / f"{self.num_strips:02d}.png", strip)
            self._tensorboard.add_strip(self.num_strips, strip)
            self.num_strips += 1

    def flush(self) -> None:
        """Write everything to disk: no checkpoint may be newer than the log lines before it."""
        if self.enabled:
            os.fsync(self._file.fileno())
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close."""
        if self.enabled:
            self._file.close()
            self._tensorboard.close()


class _TensorBoard:
    """The log as TensorBoard events: scalars, pictures, hyperparameters with final metrics.

    They are written anew from the log when a run resumes: TensorBoard orders event files by the
    clock, which may have been set back. If they cannot be written, training continues without them.
    """

    def __init__(
        self, folder: Path, lines: list[dict[str, Any]], strips: list[Strip], config: Any
    ) -> None:
        self._writer = None
        self._config = config
        self._metrics: dict[str, float] = {}  # tags that are results, with their last values
        # The writer's thread fails with a traceback; its next call raises the same error.
        self._thread_excepthook = threading.excepthook
        threading.excepthook = self._report_other_threads
        try:
            # Imports torch, which reading a log does not need.
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

            for path in folder.glob("events.out.tfevents.*"):
                path.unlink()
            self._writer = SummaryWriter(str(folder))
        except OSError as error:
            self._give_up(error)
        for number, strip in enumerate(strips):
            self.add_strip(number, strip)
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Add the numbers of a log line."""
        kind, step = line["kind"], line["step"]
        values = {k: v for k, v in line.items() if k not in ("kind", "step", "timing")}
        for name, value in {**values, **line.get("timing", {})}.items():
            if isinstance(value, (int, float)):
                self._try("add_scalar", f"{kind}/{name}", value, step)
                if kind != "train":
                    self._metrics[f"{kind}/{name}"] = value
        for layer, percentiles in line.get("activations", {}).items():
            for percent, value in zip(PERCENTILES, percentiles, strict=True):
                self._try("add_scalar", f"activations/{layer}/{percent:02d}", value, step)

    def add_strip(self, number: int, strip: Strip) -> None:
        """Add a picture of a training sample."""
        tag = f"{STRIPS}/{number:02d} {strip.caption}"
        self._try("add_image", tag, strip.pixels, 0, None, "HWC")

    def flush(self) -> None:
        """Write to disk; the writer has a queue and, with TensorFlow, a buffer of two minutes."""
        self._try("flush")

    def close(self) -> None:
        """Write the hyperparameters, flush, close."""
        if self._config is not None:
            self._try_call(self._add_hparams)
        self._try("flush")
        self._try("close")
        if threading.excepthook == self._report_other_threads:
            threading.excepthook = self._thread_excepthook

    def _add_hparams(self) -> None:
        """Add the config, and which scalars are results, to the same file as the scalars.

        `SummaryWriter.add_hparams` would add a run to the list of runs.
        """
        from torch.utils.tensorboard.summary import hparams  # noqa: PLC0415 (imports torch)

        if self._writer is None or self._writer.file_writer is None:
            return
        values = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in to_flat_dict(self._config).items()
        }
        for summary in hparams(values, self._metrics):
            self._writer.file_writer.add_summary(summary)

    def _report_other_threads(self, failure: threading.ExceptHookArgs) -> None:
        of_writer = type(failure.thread).__module__.startswith("tensorboard.")
        if not (of_writer and isinstance(failure.exc_value, OSError)):
            self._thread_excepthook(failure)

    def _try(self, method: str, *arguments: Any) -> None:
        if self._writer is not None:
            self._try_call(getattr(self._writer, method), *arguments)

    def _try_call(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        logger.warning("TensorBoard events cannot be written (%s); training continues", error)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`; damaged ones, such as one cut off by a crash, are skipped."""
    if not path.is_file():
        return []
    lines, damaged = [], []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = json.loads(text)
            if not (type(line["step"]) is int and isinstance(line["kind"], str)):
                raise TypeError
            lines.append(line)
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged.append(number)
    if damaged:
        logger.warning("%s: skipped damaged lines: %s", path, ", ".join(map(str, damaged)))
    return lines
