"""The claim of benchmarks/bench_activation_memory.py, checked on the meta device."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_activation_memory.py"


def test_group_norm_saves_no_more_than_frozen_batch_norm(monkeypatch):
    monkeypatch.setenv("I3D_GN_NORM_KERNEL", "triton")
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    benchmark = runpy.run_path(str(BENCHMARK))
    saved, peak = {}, {}
    for norm, make in benchmark["NORMS"].items():
        saved[norm], peak[norm] = benchmark["count"](make, 32)
    assert saved["ours, gn"] <= saved["frozen BN"]
    assert saved["ours, gn"] < 0.6 * saved["BatchNorm3d"]
    assert saved["ours, gn"] < 0.3 * saved["torch.nn.GroupNorm"]
    assert saved["ours, gn"] < 0.6 * saved["ours, gn, recompute=False"]
    assert saved["ours, gn, recompute=False"] <= saved["BatchNorm3d"]
    assert peak["ours, gn"] < 0.8 * peak["BatchNorm3d"]
    # The output of conv1 alone is as large: the counter does count.
    assert saved["frozen BN"] > 64 * 16 * 112 * 112 * 2
