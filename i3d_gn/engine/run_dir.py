"""One folder belongs to one run."""

from pathlib import Path
from typing import Any

import yaml

from i3d_gn.engine.checkpoint import checkpoint_step, latest_checkpoint
from i3d_gn.engine.distributed import World, same_everywhere
from i3d_gn.engine.run_log import write_text_atomically
from i3d_gn.engine.typed_config import ConfigError, differences, to_yaml


def claim_output_dir(output_dir: Path, config: Any, world: World) -> Path | None:
    """Write the resolved config, unless another run's stands there.

    Returns:
        The run's newest checkpoint, to go on after it; None where it starts.

    Raises:
        ConfigError: another run was begun there, or the processes see different folders.
    """
    path = output_dir / "config.yaml"
    resume_from = latest_checkpoint(output_dir / "checkpoints")
    log = output_dir / "log.jsonl"
    begun = resume_from is not None or (log.is_file() and log.stat().st_size > 0)
    if begun and path.is_file():
        changed = differences(yaml.safe_load(path.read_text(encoding="utf-8")), config)
        if changed:
            raise ConfigError(
                f"{output_dir} holds a run with another config ({'; '.join(changed)}); "
                "choose another output_dir, or remove that one to start over"
            )
    if not same_everywhere(-1 if resume_from is None else checkpoint_step(resume_from), world):
        raise ConfigError(
            f"the processes do not find the same newest checkpoint under {output_dir}; put "
            "output_dir where all of them see it"
        )
    if world.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, to_yaml(config))
    return resume_from
