"""Checkpoints: written atomically, loaded without running code, complete enough for testing."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from i3d_gn.files import atomic_output

FORMAT = 1
_NAME = re.compile(r"step_(\d{8})\.pt")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; a one-line message."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """`folder/step_00001000.pt` for step 1000."""
    return folder / f"step_{step:08d}.pt"


def checkpoint_step(path: Path) -> int:
    """1000 for `step_00001000.pt`."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def save_checkpoint(folder: Path, *, step: int, contents: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` atomically, then delete all but the newest `keep`."""
    path = checkpoint_path(folder, step)
    with atomic_output(path) as temporary, temporary.open("wb") as file:
        torch.save({"format": FORMAT, "step": step, **contents}, file)
        file.flush()
        os.fsync(file.fileno())
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
    """Load a checkpoint of this package onto the CPU (`weights_only`: runs no code of the file).

    Raises:
        CheckpointError: The file is missing, unreadable, or not a checkpoint of this package.
    """
    path = Path(path)
    if path.is_dir():
        found = latest_checkpoint(path) or latest_checkpoint(path / "checkpoints")
        hint = f"; the newest checkpoint in it is {found}" if found else ""
        raise CheckpointError(f"{path} is a folder, not a checkpoint{hint}")
    if not path.is_file():
        raise CheckpointError(f"{path}: checkpoint not found")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({reason})") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of i3d_gn (format {FORMAT}); weights in other formats can "
            "be inflated or loaded as starting weights, but not resumed or tested"
        )
    return contents


def load_model_state(model: torch.nn.Module, state: dict[str, Any], *, path: str | Path) -> None:
    """Load the state of a checkpoint into `model`, all of it or nothing.

    Raises:
        CheckpointError: A key or a shape differs; the message names the first ones.
    """
    own = model.state_dict()
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)}, the model's {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path}: does not match the model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(state)
