"""A grid of runs: one config, some overrides, every combination, several runs at a time.

The YAML file of a grid:

    config: configs/fight_surv.yaml       # what all runs share
    commands: [train, evaluate]           # of each run, in this order
    output_dir: runs/table8_small         # one folder per run below it: <cell>-<fold>-<seed>
    axes:                                 # name of the axis -> name of the value -> overrides
      cell:
        gn_8: {model.norm: gn, train.clips_per_gpu: 8}
        bn_8: {model.norm: bn, train.clips_per_gpu: 8}
      fold:
        fold0: {data.train_index: data/fold0_train.parquet, data.val_index: data/fold0_val.parquet}
      seed:
        s0: {seed: 0}

The first axis varies fastest, so that a grid that was stopped can already be compared. In a run's
folder, `grid.json` lists the commands that have succeeded, which are not repeated unless the config
has changed, and `grid.log` is their output. Training itself resumes from its checkpoints.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from i3d_gn.engine.run_dir import DirLock
from i3d_gn.engine.stop_signals import StopSignals, end_with_parent
from i3d_gn.engine.typed_config import ConfigError, find_config
from i3d_gn.files import file_sha256, printable, write_json

_KEYS = {"config", "commands", "output_dir", "axes"}


@dataclass(frozen=True)
class GridRun:
    """One combination: its folder, its commands with arguments, and the hash of its config."""

    folder: Path
    commands: tuple[tuple[str, ...], ...]
    config_sha256: str

    def num_done(self) -> int:
        """How many of the commands have succeeded with these arguments, from the first on."""
        try:
            done = json.loads((self.folder / "grid.json").read_text(encoding="utf-8"))
            if done["config_sha256"] != self.config_sha256:
                return 0
            pairs = zip(done["commands"], map(list, self.commands), strict=False)
        except (OSError, ValueError, TypeError, KeyError):
            return 0
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def record_done(self, count: int) -> None:
        """Record that the first `count` commands have succeeded."""
        done = {"config_sha256": self.config_sha256, "commands": self.commands[:count]}
        write_json(self.folder / "grid.json", done)


def read_grid(path: Path, overrides: Sequence[str] = ()) -> list[GridRun]:
    """The runs of the grid in `path`, in the order in which they start.

    `overrides` are `key=value` for all runs, such as `data.root=/videos`; `output_dir=FOLDER`
    replaces that of the grid.

    Raises:
        ConfigError: The file cannot be read, or is not a grid; a name occurs twice; there is no
            such config.
    """
    try:  # unlike yaml, OmegaConf reads 1e-4 as a number, and refuses a key that occurs twice
        grid = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(grid, dict) or set(grid) != _KEYS:
        raise ConfigError(f"{path} must have the keys {', '.join(sorted(_KEYS))}, and no others")
    axes, commands = grid["axes"], grid["commands"]
    if not (isinstance(commands, list) and commands and all(isinstance(c, str) for c in commands)):
        raise ConfigError(f"{path}: commands is {commands!r}; expected a list such as [train]")
    if not isinstance(axes, dict) or not axes:
        raise ConfigError(f"{path}: axes is {axes!r}; expected name: {{value: {{key: ...}}}}")
    for name, values in axes.items():
        if not (values and isinstance(values, dict) and all(map(_is_dict, values.values()))):
            raise ConfigError(
                f"{path}: axes.{name} is {values!r}; expected {{value: {{key: ...}}}}"
            )
    config_sha256 = file_sha256(find_config(str(grid["config"])))
    moved = [o.removeprefix("output_dir=") for o in overrides if o.startswith("output_dir=")]
    output_dir = moved[-1] if moved else str(grid["output_dir"])
    for_all = [o for o in overrides if not o.startswith("output_dir=")]
    runs = []
    for reversed_choice in itertools.product(*(axes[name].items() for name in reversed(axes))):
        choice = reversed_choice[::-1]
        folder = Path(output_dir, "-".join(str(value) for value, _ in choice))
        given = [f"{key}={_text(value)}" for _, keys in choice for key, value in keys.items()]
        arguments = (str(grid["config"]), *given, *for_all, f"output_dir={folder}")
        of_run = tuple((command, *arguments) for command in commands)
        if any(run.folder == folder for run in runs):
            raise ConfigError(f"{path}: two runs have the folder {folder}; change their names")
        runs.append(GridRun(folder, of_run, config_sha256))
    return runs


def run_grid(runs: Sequence[GridRun], *, jobs: int, devices: Sequence[str] = ()) -> list[GridRun]:
    """Run what is not done yet, and return the runs that failed.

    Args:
        runs: From `read_grid`.
        jobs: How many run at a time; they share the CPU cores evenly if OMP_NUM_THREADS is not set.
        devices: One value of CUDA_VISIBLE_DEVICES for each of `jobs`, or none.

    Raises:
        ConfigError: Another process is running the grid.
        Stopped: A signal arrived. The runs have saved checkpoints.
    """
    lock = DirLock(runs[0].folder.parent)
    waiting = [run for run in runs if run.num_done() < len(run.commands)]
    free = list(devices or [""] * jobs)
    running: dict[subprocess.Popen[bytes], tuple[GridRun, str]] = {}
    failed: list[GridRun] = []
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done", flush=True)
    try:
        with StopSignals():
            while waiting or running:
                while waiting and free:
                    run, device = waiting.pop(0), free.pop(0)
                    running[_start(run, device, jobs)] = run, device
                time.sleep(0.1)
                for process in [process for process in running if process.poll() is not None]:
                    run, device = running.pop(process)
                    free.append(device)
                    if process.returncode:
                        failed.append(run)
                        print(printable(f"failed, see {run.folder / 'grid.log'}"), flush=True)
                        continue
                    run.record_done(run.num_done() + 1)
                    if run.num_done() < len(run.commands):
                        waiting.insert(0, run)
                    else:
                        print(printable(f"done: {run.folder}"), flush=True)
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()
        lock.close()
    return failed


def _start(run: GridRun, device: str, jobs: int) -> "subprocess.Popen[bytes]":
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if device:
        environment["CUDA_VISIBLE_DEVICES"] = device
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "grid.log").open("ab") as log:
        # In a session of its own: Ctrl-C reaches only this process, which passes it on.
        return subprocess.Popen(
            [sys.executable, "-m", "i3d_gn", *run.commands[run.num_done()]],
            stdout=log, stderr=log, env=environment, start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 (there is one thread)
        )  # fmt: skip


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def main(argv: list[str]) -> int:
    """`i3d-gn grid`."""
    parser = argparse.ArgumentParser(
        prog="i3d-gn grid", description="Run every combination of a grid of overrides."
    )
    parser.add_argument(
        "grid", type=Path, help="YAML file, e.g. benchmarks/grids/table8_small.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one per core or device)")
    parser.add_argument(
        "--devices", default="", help="CUDA devices, e.g. 0,1,2,3: each run has one to itself"
    )
    args = parser.parse_intermixed_args(argv)
    devices = [device for device in args.devices.split(",") if device]
    jobs = args.jobs or len(devices) or len(os.sched_getaffinity(0))
    if jobs < 1 or (devices and jobs != len(devices)):
        raise ConfigError(f"--jobs {jobs} must be at least 1, and the number of --devices if given")
    failed = run_grid(read_grid(args.grid, args.overrides), jobs=jobs, devices=devices)
    return 1 if failed else 0
