"""Checkpoints: atomic, loaded without running code, carrying what testing needs."""

import hashlib
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
_NAME = re.compile(r"step_(\d{8})\.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, in one line."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """`folder/step_00001000.pt` for step 1000."""
    return folder / f"step_{step:08d}.pt"


def checkpoint_step(path: Path) -> int:
    """1000 for `step_00001000.pt`."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def save_checkpoint(folder: Path, *, step: int, contents: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` atomically; then remove all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, step)
    temporary = folder / f".{path.name}.tmp"
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, "step": step, **contents}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest step first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step, or None."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours onto the CPU (`weights_only`: no code of the file is run).

    Raises:
        CheckpointError: file missing, unreadable, or not a checkpoint of this package.
    """
    path = Path(path)
    if path.is_dir():
        found = latest_checkpoint(path) or latest_checkpoint(path / "checkpoints")
        hint = f"; the newest checkpoint in it is {found}" if found else ""
        raise CheckpointError(f"{path} is a folder, not a checkpoint{hint}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({reason})") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of i3d_gn (format {FORMAT}); "
            "to start from 2-D weights set model.weights instead"
        )
    return contents


def load_model_state(model: torch.nn.Module, state: dict[str, Any], *, path: str | Path) -> None:
    """Fill `model` from a checkpoint's state, all of it or not at all.

    Raises:
        CheckpointError: a key or a shape differs; the first ones are named.
    """
    own = model.state_dict()
    problems = [f"lacks {key}" for key in own if key not in state]
    problems += [f"has unknown {key}" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)}, the model's {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path}: does not fit the model of this config: {'; '.join(problems[:3])}{more}"
        )
    model.load_state_dict(state)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
