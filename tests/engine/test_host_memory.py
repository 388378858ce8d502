import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from i3d_gn.engine.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def run():
    for _ in range(4):
        torch.ones(20_000_000)  # 80 MB

for _ in range(5):
    run()  # small blocks settle
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode):
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again(monkeypatch):
    for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert page_faults("keep") < 1000
    # 4 x 80 MB in pages of 4 kB are 78,000; kernels with transparent huge pages need fewer.
    assert page_faults("keep") < page_faults("leave") / 4


def test_the_environment_has_the_last_word(monkeypatch):
    from i3d_gn.engine.host_memory import keep_freed_memory

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
