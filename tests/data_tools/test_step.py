import pytest

from data_tools.step import Item, RunOptions, run_step

FULL_DISK = "open('/dev/full', 'wb', 0).write(b'x')"


def run(folder, *expressions):
    items = [Item(key=text, fingerprint=None, argument=text) for text in expressions]
    return run_step(
        eval, items, name="evaluate", ledger_path=folder / "ledger", run_options=RunOptions()
    )


def test_full_disk_ends_the_step_and_keeps_what_is_done(tmp_path):
    with pytest.raises(OSError, match="No space left on device; free some space, and run"):
        run(tmp_path, "1 + 1", FULL_DISK, "2 + 2")
    again = run(tmp_path, "1 + 1", "2 + 2")
    assert (again.results, again.num_kept) == ({"1 + 1": 2, "2 + 2": 4}, 1)


def test_other_failures_do_not_end_it(tmp_path):
    step = run(tmp_path, "1 / 0", "2 + 2")
    assert step.results == {"2 + 2": 4}
    assert step.failures == {"1 / 0": "ZeroDivisionError: division by zero"}
