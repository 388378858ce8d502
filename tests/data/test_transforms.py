"""Crop plans and normalization."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from i3d_gn.data.transforms import (
    CropPlan,
    evaluation_crops,
    normalize_clips,
    random_crop_plan,
)


def draw(rng, height=256, width=340, *, crop_size=224, flip_probability=0.5):
    return random_crop_plan(
        height,
        width,
        short_side=(256, 320),
        crop_size=crop_size,
        flip_probability=flip_probability,
        rng=rng,
    )


@pytest.mark.parametrize(("height", "width"), [(256, 340), (454, 256), (720, 1280), (100, 100)])
def test_random_plan_keeps_the_aspect_ratio_as_torchvision_does(height, width):
    rng = np.random.default_rng(0)
    for _ in range(30):
        plan = draw(rng, height, width)
        short = min(plan.resize_height, plan.resize_width)
        assert 256 <= short <= 320
        expected = tv.resize(torch.empty(1, height, width), [short]).shape[1:]
        assert (plan.resize_height, plan.resize_width) == tuple(expected)
        assert (plan.height, plan.width) == (224, 224)


def test_scale_crop_and_flip_are_uniform():
    rng = np.random.default_rng(1)
    plans = [draw(rng) for _ in range(20_000)]
    sides = np.bincount([p.resize_height - 256 for p in plans], minlength=65)
    assert len(sides) == 65
    expected = len(plans) / 65
    # 64 degrees of freedom: 104.7 is exceeded once in a thousand seeds.
    assert ((sides - expected) ** 2 / expected).sum() < 104.7
    assert np.mean([p.flip for p in plans]) == pytest.approx(0.5, abs=0.015)
    # Among the room there is, tops and lefts have mean 1/2 and reach both ends.
    tops = np.array([p.top / (p.resize_height - 224) for p in plans])
    lefts = np.array([p.left / (p.resize_width - 224) for p in plans])
    for share in (tops, lefts):
        assert share.mean() == pytest.approx(0.5, abs=0.01)
        assert share.var() == pytest.approx(1 / 12, abs=0.006)
        assert (share.min(), share.max()) == (0, 1)


def test_plan_is_a_function_of_the_generator():
    assert draw(np.random.default_rng((1, 2, 3))) == draw(np.random.default_rng((1, 2, 3)))


def test_flip_probability_ends():
    rng = np.random.default_rng(0)
    assert not any(draw(rng, flip_probability=0.0).flip for _ in range(50))
    assert all(draw(rng, flip_probability=1.0).flip for _ in range(50))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_size": 257}, "crop_size is 257"),
        ({"flip_probability": 1.5}, "flip_probability is 1.5"),
        ({"height": 0}, "the frame is 0x340"),
    ],
)
def test_random_plan_explains_its_errors(change, message):
    with pytest.raises(ValueError, match=message):
        draw(np.random.default_rng(0), **change)


def test_empty_range_of_sides_is_an_error():
    with pytest.raises(ValueError, match="1 <= min <= max"):
        random_crop_plan(
            256,
            340,
            short_side=(320, 256),
            crop_size=224,
            flip_probability=0.5,
            rng=np.random.default_rng(0),
        )


def test_full_is_the_whole_frame():
    plan, crops = evaluation_crops(720, 1280, short_side=256, mode="full")
    assert plan == CropPlan(256, 455, 0, 0, 256, 455)
    assert crops == [(0, 0, 256, 455)]


def test_center_is_torchvisions_center_crop():
    for height, width in [(256, 340), (454, 256), (256, 256)]:
        plan, crops = evaluation_crops(height, width, short_side=256, mode="center", crop_size=224)
        assert crops == [(0, 0, 224, 224)]
        grid = torch.arange(plan.resize_height * plan.resize_width)
        grid = grid.view(1, plan.resize_height, plan.resize_width)
        expected = tv.center_crop(grid, [224, 224])
        got = grid[:, plan.top : plan.top + 224, plan.left : plan.left + 224]
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("height", "width"), [(256, 341), (456, 256), (256, 256), (250, 900)])
@pytest.mark.parametrize("crop_size", [None, 224])
def test_three_crops_lie_along_the_long_side(height, width, crop_size):
    plan, crops = evaluation_crops(
        height, width, short_side=256, mode="three_crop", crop_size=crop_size
    )
    size = crop_size or 256
    long_side = max(plan.resize_height, plan.resize_width)
    step = (long_side - size) // 2
    along = 0 if height > width else 1
    corners = [(plan.top + top, plan.left + left)[along] for top, left, _, _ in crops]
    across = [(plan.top + top, plan.left + left)[1 - along] for top, left, _, _ in crops]
    assert corners == [0, step, 2 * step]
    assert across == [(256 - size) // 2] * 3
    for top, left, crop_height, crop_width in crops:
        assert (crop_height, crop_width) == (size, size)
        assert 0 <= top <= plan.height - size
        assert 0 <= left <= plan.width - size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "five"}, "full, three_crop, center"),
        ({"mode": "full", "crop_size": 224}, "remove crop_size"),
        ({"mode": "center", "crop_size": 300}, "crop_size is 300"),
        ({"mode": "full", "short_side": 0}, "short_side is 0"),
    ],
)
def test_evaluation_crops_explain_their_errors(options, message):
    with pytest.raises(ValueError, match=message):
        evaluation_crops(256, 340, **{"short_side": 256, **options})


def test_a_single_pixel_is_a_valid_size():
    rng = np.random.default_rng(0)
    plan = random_crop_plan(1, 1, short_side=(1, 1), crop_size=1, flip_probability=0.0, rng=rng)
    assert plan == CropPlan(1, 1, 0, 0, 1, 1)
    for mode, crop_size in (("full", None), ("center", 1)):
        plan, crops = evaluation_crops(1, 1, short_side=1, mode=mode, crop_size=crop_size)
        assert (plan, crops) == (CropPlan(1, 1, 0, 0, 1, 1), [(0, 0, 1, 1)])


def test_plan_must_lie_in_the_frame():
    with pytest.raises(ValueError, match="must lie inside"):
        CropPlan(256, 340, 40, 0, 224, 224)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_normalization_against_float64(memory_format):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (2, 3, 4, 5, 6), dtype=torch.uint8, generator=generator)
    clips = clips.contiguous(memory_format=memory_format)
    before = clips.clone()
    got = normalize_clips(clips, mean, std)
    shape = (1, 3, 1, 1, 1)
    expected = clips.double() / 255 - torch.tensor(mean).double().view(shape)
    expected /= torch.tensor(std).double().view(shape)
    assert torch.allclose(got.double(), expected, atol=1e-6)
    assert got.is_contiguous(memory_format=memory_format)
    assert torch.equal(clips, before)
    half = normalize_clips(clips, mean, std, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, got.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("shape", "dtype", "mean", "std", "message"),
    [
        ((2, 3, 4, 5, 6), torch.float32, (0.5, 0.5, 0.5), (1, 1, 1), "must be uint8"),
        ((3, 4, 5, 6), torch.uint8, (0.5, 0.5, 0.5), (1, 1, 1), "must be uint8"),
        ((2, 3, 4, 5, 6), torch.uint8, (0.5,), (1, 1, 1), "must have one number for each"),
        ((2, 3, 4, 5, 6), torch.uint8, (0.5, 0.5, 0.5), (1,), "must have one number for each"),
        ((2, 3, 4, 5, 6), torch.uint8, (0.5, 0.5, 0.5), (1, 0, 1), "std must be positive"),
    ],
)
def test_normalization_explains_its_errors(shape, dtype, mean, std, message):
    with pytest.raises(ValueError, match=message):
        normalize_clips(torch.zeros(shape, dtype=dtype), mean, std)
