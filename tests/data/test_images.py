import numpy as np
import pytest
import torch
from PIL import Image

from i3d_gn.data.batches import Sample
from i3d_gn.data.images import CenterImages, LabeledImages, TrainingImages
from i3d_gn.data.loader import batch_loader
from i3d_gn.data.samplers import ShuffledMicroBatches


@pytest.fixture
def images(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("cat", "ant"):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return LabeledImages(tmp_path)


def test_classes_are_sorted_folders(images):
    assert images.class_names == ["ant", "cat"]
    assert images.labels == [0, 0, 0, 1, 1, 1]


def test_crop_is_a_function_of_seed_and_position(images):
    data = TrainingImages(images, crop_size=24, area_min=0.1, seed=5)
    samples = [Sample(10, 1), Sample(11, 4), Sample(12, 1)]
    before = torch.random.get_rng_state()
    batch = data[samples]
    assert torch.equal(before, torch.random.get_rng_state())
    assert batch.inputs.shape == (3, 24, 24, 3)
    assert batch.inputs.dtype == torch.uint8
    assert batch.labels.tolist() == [0, 1, 0]
    torch.manual_seed(99)
    alone = data[[samples[1]]]
    assert torch.equal(alone.inputs[0], batch.inputs[1])
    assert not torch.equal(batch.inputs[0], batch.inputs[2])  # another position
    other = TrainingImages(images, crop_size=24, area_min=0.1, seed=6)[samples]
    assert not torch.equal(other.inputs, batch.inputs)


def test_images_do_not_depend_on_the_number_of_workers(images):
    data = TrainingImages(images, crop_size=24, area_min=0.1, seed=5)
    order = ShuffledMicroBatches(
        6, seed=1, global_batch_size=4, micro_batch_size=2, rank=0, world_size=1, first_step=0,
        last_step=4,
    )  # fmt: skip
    runs = [
        [
            b.inputs
            for b in batch_loader(data, order, num_workers=workers, device=torch.device("cpu"))
        ]
        for workers in (0, 2)
    ]
    assert len(runs[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_validation_uses_the_center_crop(images, tmp_path):
    data = CenterImages(images, short_side=40, crop_size=20)  # no change of size
    batch = data[[Sample(0, 0)]]
    with Image.open(images.paths[0]) as image:
        pixels = np.asarray(image)
    assert np.array_equal(batch.inputs[0].numpy(), pixels[10:30, 20:40])
    halved = CenterImages(images, short_side=20, crop_size=20)[[Sample(0, 0)]].inputs[0]
    box = pixels.reshape(20, 2, 30, 2, 3).mean((1, 3))[:, 5:25]
    assert np.abs(halved.numpy() - box).mean() < 20


def test_gray_and_transparent_images_become_rgb(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (30, 30), 7).save(tmp_path / "a" / "0.png")
    Image.new("RGBA", (30, 30), (1, 2, 3, 9)).save(tmp_path / "a" / "1.png")
    data = CenterImages(LabeledImages(tmp_path), short_side=30, crop_size=30)
    batch = data[[Sample(0, 0), Sample(1, 1)]]
    assert batch.inputs[:, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


def test_unreadable_images_are_one_line_errors(tmp_path):
    with pytest.raises(ValueError, match="nowhere: folder not found"):
        LabeledImages(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="class folder"):
        LabeledImages(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jpg").write_bytes(b"\xff\xd8\xff and no more")
    data = CenterImages(LabeledImages(tmp_path), short_side=30, crop_size=30)
    with pytest.raises(ValueError, match=r"0\.jpg: cannot be read as an image"):
        data[[Sample(0, 0)]]
