"""What a run writes while it runs: lines of JSON, TensorBoard events, lines for the reader."""

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """`log.jsonl` and `tensorboard/` under `output_dir`, continued after `last_step`.

    Lines of later steps, which a stopped run wrote after its last checkpoint, are removed, so that
    a resumed run's log equals an uninterrupted one's in all but `timing`.
    """

    def __init__(self, output_dir: Path, *, last_step: int) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        self.path = output_dir / "log.jsonl"
        kept = [line for line in read_log(self.path) if line["step"] <= last_step]
        write_text_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(output_dir / "tensorboard"), purge_step=last_step + 1)

    def write(
        self, kind: str, step: int, values: dict[str, Any], timing: dict[str, float] | None = None
    ) -> None:
        """Add one line.

        Args:
            kind: "train", "val" or "test".
            step: Optimiser steps done.
            values: What the seed decides.
            timing: What depends on the machine; kept apart.
        """
        line = {"kind": kind, "step": step, **values, **({"timing": timing} if timing else {})}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in {**values, **(timing or {})}.items():
            if isinstance(value, (int, float)):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def flush(self) -> None:
        """Bring both to the disk, so that no checkpoint outlives the lines before it.

        TensorBoard's writer has a queue and, with TensorFlow installed, a buffer of two minutes.
        """
        os.fsync(self._file.fileno())
        self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        self._tensorboard.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `log.jsonl`; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path`, then rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
