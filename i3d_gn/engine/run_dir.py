"""One output directory, one run."""

from pathlib import Path
from typing import Any

import yaml

from i3d_gn.engine.checkpoint import checkpoint_step, latest_checkpoint
from i3d_gn.engine.distributed import Process, is_equal_on_all_ranks
from i3d_gn.engine.typed_config import ConfigError, differences, to_dict, to_yaml
from i3d_gn.files import write_text


def claim_run_dir(output_dir: Path, config: Any, process: Process) -> Path | None:
    """Write the resolved config to `output_dir`, unless another run has already used it.

    Returns:
        The newest checkpoint, from which the run resumes; None if it starts.

    Raises:
        ConfigError: Another run has started there, or the ranks see different directories.
    """
    path = output_dir / "config.yaml"
    resume_from = latest_checkpoint(output_dir / "checkpoints")
    log = output_dir / "log.jsonl"
    started = resume_from is not None or (log.is_file() and log.stat().st_size > 0)
    if started and path.is_file():
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        changed = differences(saved, to_dict(config), type(config))
        if changed:
            raise ConfigError(
                f"{output_dir} holds a run with another config ({'; '.join(changed)}); "
                "use another output_dir, or delete that one to start over"
            )
    step = -1 if resume_from is None else checkpoint_step(resume_from)
    if not is_equal_on_all_ranks(step, process):
        raise ConfigError(
            f"the ranks do not find the same newest checkpoint under {output_dir}; put output_dir "
            "on storage that all of them share"
        )
    if process.is_main:
        write_text(path, to_yaml(config))
    return resume_from
