"""The soak of benchmarks/soak_data_tools.py, in small."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak_data_tools.py"

pytest.importorskip("webdataset", reason="packing needs webdataset (pip install 'i3d_gn[shards]')")


@pytest.mark.slow
def test_killed_anywhere_all_steps_end_as_undisturbed():
    arguments = ["--clips", "60", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "as an undisturbed run leaves it" in done.stdout
