"""Checkpoints: written atomically, verified when loaded, complete enough for testing."""

import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from i3d_gn.engine.torch_archive import ArchiveError, check_archive
from i3d_gn.files import atomic_output

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})\.pt")
BEFORE_VALIDATION = "before_validation.pt"
BEST = "best.pt"

_KEYS = {"model": dict, "optimizer": dict, "config": dict, "trainer": dict, "num_broken": int}

logger = logging.getLogger(__name__)


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
    """Write the checkpoint of `step` atomically, then delete all but the `keep` newest up to it.

    Later ones are damaged: the run did not resume from them.
    """
    path = checkpoint_path(folder, step)
    _write(path, step, contents)
    for old in [p for p in list_checkpoints(folder) if checkpoint_step(p) <= step][:-keep]:
        old.unlink()
    return path


def save_named(folder: Path, name: str, *, step: int, contents: dict[str, Any]) -> Path:
    """Write a checkpoint that is kept beside the newest ones.

    `BEFORE_VALIDATION`, from which a run resumes if it stops while validating after `step`, or
    `BEST`, from which no run resumes.
    """
    path = folder / name
    _write(path, step, contents)
    return path


def delete_before_validation(folder: Path) -> None:
    """Delete the checkpoint `BEFORE_VALIDATION`, once the validation is done."""
    (folder / BEFORE_VALIDATION).unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest step first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def given_or_latest(checkpoint: Path | None, output_dir: Path) -> Path:
    """The checkpoint of a test: the given one, or else the newest of the run in `output_dir`.

    Raises:
        CheckpointError: None is given, and the run has none.
    """
    found = checkpoint or latest_checkpoint(output_dir / "checkpoints")
    if found is None:
        folder = output_dir / "checkpoints"
        raise CheckpointError(f"no checkpoint under {folder}; train first or pass --checkpoint")
    return found


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step, or None."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest intact checkpoint of a run, warning about newer ones that are damaged.

    Returns:
        Its path and contents, or None if there is no checkpoint. The path ends in
        `before_validation.pt` if the run stopped while validating: that is still to be done.

    Raises:
        CheckpointError: There are checkpoints, but all are damaged.
    """
    candidates = [*reversed(list_checkpoints(folder))]
    if (folder / BEFORE_VALIDATION).is_file():
        candidates.insert(0, folder / BEFORE_VALIDATION)
    loaded: tuple[Path, dict[str, Any]] | None = None
    damaged = []
    for path in candidates:
        try:
            contents = load_checkpoint(path)
        except CheckpointError as error:
            logger.warning("%s; resuming from an older checkpoint", error)
            damaged.append(path)
            continue
        if loaded is None or contents["step"] >= loaded[1]["step"]:
            loaded = path, contents
        if path.name != BEFORE_VALIDATION:
            break
    if damaged and loaded is None:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {folder} is intact; restore one from a "
            "backup, or delete the folder to start over"
        )
    return loaded


def is_before_validation(path: Path) -> bool:
    """Whether the validation after this checkpoint's step is still to be done."""
    return path.name == BEFORE_VALIDATION


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of this package onto the CPU (`weights_only`: runs no code of the file).

    Every byte is verified against the checksums of the file: torch itself does not.

    Raises:
        CheckpointError: The file is missing, damaged, or not a checkpoint of this package.
    """
    path = Path(path)
    if path.is_dir():
        found = latest_checkpoint(path) or latest_checkpoint(path / "checkpoints")
        hint = f"; the newest checkpoint in it is {found}" if found else ""
        raise CheckpointError(f"{path} is a folder, not a checkpoint{hint}")
    if not path.is_file():
        raise CheckpointError(f"checkpoint not found: {path}")
    try:
        check_archive(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except ArchiveError as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({error})") from error
    except pickle.UnpicklingError as error:  # the message advises to run what the file says
        raise CheckpointError(
            f"{path}: not a checkpoint of i3d_gn: it holds more than tensors and plain values"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a checkpoint ({reason})") from error
    _check_contents(path, contents)
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


def _write(path: Path, step: int, contents: dict[str, Any]) -> None:
    try:
        with atomic_output(path) as temporary, temporary.open("wb") as file:
            torch.save({"format": FORMAT, "step": step, **contents}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # When writing fails, torch raises a RuntimeError of its own while it handles the OSError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise OSError(
            f"checkpoint {path} cannot be written ({reason}); make sure that the disk is not full, "
            "and run the same command again to resume"
        ) from error


def _check_contents(path: Path, contents: Any) -> None:
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of i3d_gn (format {FORMAT}); weights in other formats can "
            "be inflated or loaded as starting weights, but not resumed or tested"
        )
    step = contents.get("step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{path}: damaged: its step is {step!r}, expected 0 or more")
    match = _NAME.fullmatch(path.name)
    if match and int(match[1]) != step:
        raise CheckpointError(f"{path}: renamed: by its contents it is of step {step}")
    for key, kind in _KEYS.items():
        if not isinstance(contents.get(key), kind):
            raise CheckpointError(f"{path}: damaged: {key!r} is missing or of a wrong type")
