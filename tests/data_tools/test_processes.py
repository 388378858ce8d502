"""A failing item affects no other. Items are expressions, the function is `eval`."""

import os
import signal
import subprocess
import sys
import time
import types

import pytest

from data_tools.processes import ChildProcess, map_in_processes

CRASH = "__import__('signal').raise_signal(11)"
EXIT = "__import__('os')._exit(3)"
FULL_DISK = "open('/dev/full', 'wb', 0).write(b'x')"
HANG = "__import__('time').sleep(600)"


def run(items, *, num_workers=2, timeout_seconds=60.0, function=eval):
    outcomes = dict(
        map_in_processes(function, items, num_workers=num_workers, timeout_seconds=timeout_seconds)
    )
    assert sorted(outcomes) == list(range(len(items)))
    return [outcomes[i] for i in range(len(items))]


def test_values_belong_to_their_items():
    assert [outcome.value for outcome in run([f"{i} ** 2" for i in range(20)])] == [
        i**2 for i in range(20)
    ]


def test_no_items():
    assert run([]) == []


def test_failures_affect_only_their_item():
    outcomes = run(["1 + 1", CRASH, "2 + 2", "1 / 0", EXIT, "3 + 3", CRASH])
    assert [outcome.value for outcome in outcomes] == [2, None, 4, None, None, 6, None]
    assert [outcome.failure for outcome in outcomes] == [
        None,
        "its process was killed by SIGSEGV",
        None,
        "ZeroDivisionError: division by zero",
        "its process exited with status 3",
        None,
        "its process was killed by SIGSEGV",
    ]


def test_hanging_item_times_out():
    outcomes = run([HANG, "1", "2"], timeout_seconds=10.0)
    assert outcomes[0].failure == "timed out after 10 seconds"
    assert [outcome.value for outcome in outcomes[1:]] == [1, 2]


def test_kinds_of_failure():
    outcomes = run([CRASH, "1 / 0", FULL_DISK, f"({HANG}, 1)", "2"], timeout_seconds=10.0)
    assert [outcome.kind for outcome in outcomes] == ["crash", "error", "disk", "timeout", None]
    assert outcomes[2].failure == "[Errno 28] No space left on device"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
def test_memory_is_limited():
    items = ["len(bytearray(2**26))", "len(bytearray(2**31))", "len(bytearray(2**26))"]
    outcomes = dict(
        map_in_processes(eval, items, num_workers=1, timeout_seconds=60.0, memory_bytes=2**30)
    )
    assert outcomes[0].value == outcomes[2].value == 2**26
    assert (outcomes[1].kind, outcomes[1].failure) == ("memory", "needs more memory than 1 GiB")


def test_child_process_is_reused():
    child = ChildProcess(eval)
    pid = "__import__('os').getpid()"
    first, second = (child.call(pid, timeout_seconds=60.0).value for _ in range(2))
    assert first == second
    assert child.call(CRASH, timeout_seconds=60.0).kind == "crash"
    assert child.call(HANG, timeout_seconds=1.0).kind == "timeout"
    third = child.call(pid, timeout_seconds=60.0).value
    assert third not in {None, first}


def test_processes_run_concurrently(tmp_path):
    """Two items wait for each other."""
    signs = [str(tmp_path / "first"), str(tmp_path / "second")]
    wait_for = "next(True for _ in iter(int, 1) if __import__('os').path.exists({!r}))"
    items = [
        f"open({mine!r}, 'w').close() or {wait_for.format(other)}"
        for mine, other in (signs, signs[::-1])
    ]
    assert [outcome.value for outcome in run(items)] == [True, True]


def test_child_that_cannot_start_is_an_error():
    """Not a failure of each item: here the child cannot import the function."""
    module = types.ModuleType("only_in_the_parent")
    exec("def function(item): return item", module.__dict__)
    sys.modules["only_in_the_parent"] = module
    try:
        with pytest.raises(OSError, match="a worker process could not start"):
            run(["1"], function=module.function)
    finally:
        del sys.modules["only_in_the_parent"]


SCRIPT = """
import sys, time
from pathlib import Path
from data_tools.processes import map_in_processes
from i3d_gn.engine.command import run_command
from i3d_gn.files import atomic_output

def work(name):
    if name:
        with atomic_output(Path(name)) as temporary:
            temporary.write_text("half")
            time.sleep(30)

def command():
    print("started", flush=True)
    for i, outcome in map_in_processes(work, ["", "out/a", "out/b"], num_workers=2,
                                       timeout_seconds=600):
        print("item", i, flush=True)
    return 0

if __name__ == "__main__":
    sys.exit(run_command(command))
"""


@pytest.mark.parametrize("when", ["while children start", "midway"])
@pytest.mark.parametrize(
    ("sign", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGKILL, -9)]
)
def test_children_end_with_their_parent(when, sign, status, tmp_path):
    """At SIGKILL they leave their unfinished files, which the next run removes."""
    (tmp_path / "script.py").write_text(SCRIPT)
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
            text=True,
        )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "started\n"
        if when == "midway":
            assert process.stdout.readline() == "item 0\n"
            while len(list(tmp_path.glob("out/.*.part"))) < 2:
                assert process.poll() is None
                time.sleep(0.01)
        else:
            time.sleep(0.1)
        # Ctrl-C goes to the whole process group, the others only to the parent.
        (os.killpg if sign == signal.SIGINT else os.kill)(process.pid, sign)
        assert process.wait(timeout=30) == status
    deadline = time.monotonic() + 30
    while _group_exists(process.pid):
        assert time.monotonic() < deadline, "children outlived their parent"
        time.sleep(0.1)
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    if sign != signal.SIGKILL:
        assert not list(tmp_path.glob("out/.*"))


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
