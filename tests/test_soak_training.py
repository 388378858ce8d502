"""benchmarks/soak_training.py with few rounds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.slow
def test_soak_with_a_damaged_checkpoint_and_a_killed_test(tmp_path):
    command = [
        sys.executable, REPOSITORY / "benchmarks" / "soak_training.py", tmp_path / "record.jsonl",
        "--rounds=2", "--kinds", "newest checkpoint damaged", "test killed",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| **all** | 2 | 2 | 0 | 0 | 0 |" in done.stdout
