"""Which errors of a collective operation mean that a rank was lost."""

import pytest

from i3d_gn.engine.distributed import is_about_ranks


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer", 1),
        ("Application timeout caused pair closure", 1),  # in backward, when the other was stopped
        ("Connection closed by peer [127.0.0.1]:1234", 1),
        ("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)", 0),
        ("DataLoader worker (pid 3) is killed by signal: Killed.", 0),
    ],
)
def test_errors_of_lost_ranks_are_recognized(message, expected):
    assert is_about_ranks(RuntimeError(message)) is bool(expected)
