"""benchmarks/soak_data_tools.py with few clips."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak_data_tools.py"

pytest.importorskip("webdataset", reason="packing needs webdataset (pip install 'i3d_gn[shards]')")


@pytest.mark.slow
def test_soak_with_random_kills():
    arguments = ["--clips", "60", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "equal to an undisturbed run" in done.stdout
