"""The log of a run: lines of JSON, and TensorBoard events."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from i3d_gn.files import write_text


class RunLog:
    """`log.jsonl` and `tensorboard/` under `output_dir`; a context manager.

    Lines after `last_step`, which a stopped run wrote after its last checkpoint, are removed, so
    that the log of a resumed run equals that of an uninterrupted one in everything but `timing`.

    Args:
        output_dir: Of the run.
        last_step: Optimizer steps done when the run resumes.
        enabled: False on all ranks but 0, where nothing is written.
    """

    def __init__(self, output_dir: Path, *, last_step: int, enabled: bool = True) -> None:
        self.enabled = enabled
        if not enabled:
            return
        # Imports torch, which reading a log does not need.
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        self.path = output_dir / "log.jsonl"
        kept = [line for line in read_log(self.path) if line["step"] <= last_step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(output_dir / "tensorboard"), purge_step=last_step + 1)

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
        if not self.enabled:
            return
        line = {"kind": kind, "step": step, **values, **({"timing": timing} if timing else {})}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in {**values, **(timing or {})}.items():
            if isinstance(value, (int, float)):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Write everything to disk: no checkpoint may be newer than the log lines before it.

        TensorBoard's writer has a queue and, with TensorFlow installed, a buffer of two minutes.
        """
        if self.enabled:
            os.fsync(self._file.fileno())
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close."""
        if self.enabled:
            self._file.close()
            self._tensorboard.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`, up to the first one that is cut off or damaged."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
