"""The claim of benchmarks/bench_activation_memory.py, counted on the meta device."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_activation_memory.py"


def test_group_norm_keeps_no_more_than_frozen_batch_norm(monkeypatch):
    monkeypatch.setenv("I3D_GN_NORM_KERNEL", "triton")
    benchmark = runpy.run_path(str(BENCHMARK))
    kept, peak = {}, {}
    for norm, make in benchmark["NORMS"].items():
        kept[norm], peak[norm] = benchmark["count"](make, 32)
    assert kept["ours, gn"] <= kept["frozen BN"]
    assert kept["ours, gn"] < 0.6 * kept["BatchNorm3d"]
    assert kept["ours, gn"] < 0.3 * kept["torch.nn.GroupNorm"]
    assert kept["ours, gn, recompute=False"] <= kept["BatchNorm3d"]
    assert peak["ours, gn"] < 0.8 * peak["BatchNorm3d"]
    # conv1's output alone: the counter sees what is there.
    assert kept["frozen BN"] > 64 * 16 * 112 * 112 * 2
