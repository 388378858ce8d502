"""One output directory, one run: its lock, its config."""

from __future__ import annotations

import datetime
import json
import os
import socket
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from i3d_gn.engine.typed_config import ConfigError, differences, to_dict, to_yaml
from i3d_gn.files import lock_file, write_text

ConfigT = TypeVar("ConfigT")


class DirLock:
    """Exclusive use of a directory, until `close` or the end of the process.

    Child processes, which may outlive a killed process for a while, do not hold the lock.

    Args:
        directory: Made if there is none.
        name: What the user calls it, for messages.

    Raises:
        ConfigError: Another process is using it (the message says which, and since when), or it
            cannot be written.
    """

    def __init__(self, directory: Path, name: str = "output_dir") -> None:
        self._descriptor: int | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigError(
                f"{name} {directory} cannot be written ({error.strerror or error}); use another one"
            ) from error
        if not lock_file(self._descriptor, wait=False):
            holder = os.read(self._descriptor, 200).decode(errors="replace") or "unknown"
            self.close()
            raise ConfigError(
                f"{name} {directory} is in use by another process ({holder}); wait for it, stop "
                "it, or use another one"
            )
        started = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        os.truncate(self._descriptor, 0)
        holder = f"process {os.getpid()} on {socket.gethostname()} since {started}"
        os.write(self._descriptor, holder.encode())
        _held.add(self)

    def close(self) -> None:
        """Let others use the directory."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()


_held: weakref.WeakSet[DirLock] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_close_in_child)


def check_same_run(output_dir: Path, config: Any, saved: dict[str, Any] | None) -> None:
    """Refuse to continue the run in `output_dir` with another config.

    Args:
        output_dir: Of the run.
        config: Of the command.
        saved: The config in the newest checkpoint, None if there is none.

    Raises:
        ConfigError: The run that started there has another config.
    """
    path, log = output_dir / "config.yaml", output_dir / "log.jsonl"
    if saved is None:
        started = log.is_file() and log.stat().st_size > 0
        if not (started and path.is_file()):
            return
        try:
            saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            saved = None
        if not isinstance(saved, dict):
            raise ConfigError(
                f"{path} is damaged, so that the config of the run there is unknown; use another "
                "output_dir, or delete that one to start over"
            )
    before, after = (json.loads(json.dumps(values)) for values in (saved, to_dict(config)))
    changed = differences(before, after, type(config))
    may_change = getattr(config, "may_change", None)
    if may_change is not None:
        changed = [line for line in changed if not may_change(line.partition(":")[0], before)]
    if changed:
        how = getattr(config, "how_to_continue", lambda keys: "")
        raise ConfigError(
            f"{output_dir} holds a run with another config ({'; '.join(changed)}); use another "
            f"output_dir{how([line.partition(':')[0] for line in changed])}, or delete that one to "
            "start over"
        )


def config_of_run(folder: Path, load: Callable[[Path], ConfigT], command: str) -> ConfigT:
    """The resolved config of the run of `command` in `folder`, read by `load`.

    Raises:
        ValueError: There is none, or it is of another command.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.yaml; pass the output_dir of a training run")
    try:
        return load(path)
    except ConfigError as error:
        raise ValueError(f"{folder} is not a run of i3d-gn {command}: {error}") from error


def write_run_config(output_dir: Path, config: Any) -> None:
    """Write the resolved config, and delete what a killed process left unfinished."""
    for folder in (output_dir, output_dir / "checkpoints"):
        for path in folder.glob(".*.part"):  # of `atomic_output`; the lock keeps others out
            path.unlink(missing_ok=True)
    write_text(output_dir / "config.yaml", to_yaml(config))
