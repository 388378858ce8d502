"""One folder belongs to one run."""

from pathlib import Path
from typing import Any

import yaml

from i3d_gn.config import ConfigError, differences, to_yaml
from i3d_gn.distributed import World
from i3d_gn.run_log import write_text_atomically


def claim_output_dir(output_dir: Path, config: Any, world: World) -> None:
    """Write the resolved config, unless another run's stands there.

    Raises:
        ConfigError: it does.
    """
    path = output_dir / "config.yaml"
    if path.is_file():
        changed = differences(yaml.safe_load(path.read_text(encoding="utf-8")), config)
        if changed:
            raise ConfigError(
                f"{output_dir} holds a run with another config ({'; '.join(changed)}); "
                "choose another output_dir, or remove that one to start over"
            )
    if world.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, to_yaml(config))
