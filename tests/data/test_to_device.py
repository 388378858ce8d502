"""Values, layout and arithmetic of the network's input."""

import pytest
import torch

from i3d_gn.data.to_device import ToDevice

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def to_device(**options):
    return ToDevice(
        device=torch.device("cpu"), mean=MEAN, std=STD, **{"precision": "fp32", **options}
    )


def random_bytes(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def normalized(channels_last):
    return (channels_last.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)


@pytest.mark.parametrize("channels_last", [True, False])
def test_clips_are_normalized_in_the_memory_format_of_the_network(channels_last):
    clips = random_bytes(2, 4, 5, 6, 3)
    got = to_device(channels_last=channels_last)(clips)
    assert (got.shape, got.dtype) == ((2, 3, 4, 5, 6), torch.float32)
    torch.testing.assert_close(
        got.permute(0, 2, 3, 4, 1), normalized(clips).float(), rtol=0, atol=1e-5
    )
    assert got.is_contiguous() == (not channels_last)
    assert got.is_contiguous(memory_format=torch.channels_last_3d) == channels_last


def test_clips_are_channels_last_by_default():
    got = to_device()(random_bytes(2, 4, 5, 6, 3))
    assert got.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_are_normalized_and_channels_last(channels_last):
    images = random_bytes(2, 5, 6, 3)
    got = to_device(channels_last=channels_last)(images)
    assert (got.shape, got.dtype) == ((2, 3, 5, 6), torch.float32)
    torch.testing.assert_close(
        got.permute(0, 2, 3, 1), normalized(images).float(), rtol=0, atol=1e-5
    )
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_input_moves_to_the_device():
    there = ToDevice(device=torch.device("meta"), mean=MEAN, std=STD, precision="fp32")
    assert there(random_bytes(2, 4, 5, 6, 3)).device.type == "meta"


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_network_computes_in_the_precision(precision, dtype):
    with to_device(precision=precision).autocast():
        assert torch.nn.Linear(3, 2)(torch.ones(1, 3)).dtype == dtype
    assert torch.nn.Linear(3, 2)(torch.ones(1, 3)).dtype == torch.float32
