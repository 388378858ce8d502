"""The lock of an output directory."""

import os
import signal
import subprocess
import sys

import pytest

from i3d_gn.engine.run_dir import DirLock
from i3d_gn.engine.typed_config import ConfigError

HOLDS = """
import os, sys, time
from pathlib import Path
from i3d_gn.engine.run_dir import DirLock
lock = DirLock(Path(sys.argv[1]))
if not os.fork():
    print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_folder_that_cannot_be_written_names_the_key(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"output_dir .*file/run cannot be written \(.*use another"
    ):
        DirLock(tmp_path / "file" / "run")


def test_lock_ends_with_its_process_though_a_child_lives_on(tmp_path):
    """As loader workers do for some seconds after a `kill -9`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        with pytest.raises(ConfigError, match=f"in use by another process .process {process.pid} "):
            DirLock(tmp_path)
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives
        DirLock(tmp_path).close()
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)  # before waiting: it holds the pipe, too
        process.communicate()
