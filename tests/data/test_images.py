import numpy as np
import pytest
import torch
from PIL import Image

from i3d_gn.data.batches import Sample
from i3d_gn.data.images import CenterImages, LabelledImages, TrainingImages
from i3d_gn.data.loader import clip_loader
from i3d_gn.data.samplers import ShuffledMicroBatches


@pytest.fixture
def images(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("cat", "ant"):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = generator.integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return LabelledImages(tmp_path)


def test_classes_are_sorted_folders(images):
    assert images.class_names == ["ant", "cat"]
    assert images.labels == [0, 0, 0, 1, 1, 1]


def test_a_crop_is_a_function_of_seed_and_position(images):
    data = TrainingImages(images, crop_size=24, area_min=0.1, seed=5)
    samples = [Sample(10, 1), Sample(11, 4), Sample(12, 1)]
    before = torch.random.get_rng_state()
    batch = data[samples]
    assert torch.equal(before, torch.random.get_rng_state())
    assert batch.clips.shape == (3, 24, 24, 3)
    assert batch.clips.dtype == torch.uint8
    assert batch.labels.tolist() == [0, 1, 0]
    torch.manual_seed(99)
    alone = data[[samples[1]]]
    assert torch.equal(alone.clips[0], batch.clips[1])
    assert not torch.equal(batch.clips[0], batch.clips[2])  # the same image elsewhere in the stream
    other = TrainingImages(images, crop_size=24, area_min=0.1, seed=6)[samples]
    assert not torch.equal(other.clips, batch.clips)


def test_workers_change_nothing(images):
    data = TrainingImages(images, crop_size=24, area_min=0.1, seed=5)
    order = ShuffledMicroBatches(
        6, seed=1, global_batch_size=4, clips_per_gpu=2, rank=0, world_size=1, first_step=0,
        last_step=4,
    )  # fmt: skip
    runs = [
        [b.clips for b in clip_loader(data, order, num_workers=workers, pin_memory=False)]
        for workers in (0, 2)
    ]
    assert len(runs[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_validation_takes_the_centre(images, tmp_path):
    data = CenterImages(images, short_side=40, crop_size=20)  # no change of size
    batch = data[[Sample(0, 0)]]
    with Image.open(images.paths[0]) as image:
        pixels = np.asarray(image)
    assert np.array_equal(batch.clips[0].numpy(), pixels[10:30, 20:40])
    halved = CenterImages(images, short_side=20, crop_size=20)[[Sample(0, 0)]].clips[0]
    box = pixels.reshape(20, 2, 30, 2, 3).mean((1, 3))[:, 5:25]
    assert np.abs(halved.numpy() - box).mean() < 20


def test_grey_and_transparent_images_become_rgb(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (30, 30), 7).save(tmp_path / "a" / "0.png")
    Image.new("RGBA", (30, 30), (1, 2, 3, 9)).save(tmp_path / "a" / "1.png")
    data = CenterImages(LabelledImages(tmp_path), short_side=30, crop_size=30)
    batch = data[[Sample(0, 0), Sample(1, 1)]]
    assert batch.clips[:, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        LabelledImages(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="class folder"):
        LabelledImages(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jpg").write_bytes(b"\xff\xd8\xff and no more")
    data = CenterImages(LabelledImages(tmp_path), short_side=30, crop_size=30)
    with pytest.raises(ValueError, match=r"0\.jpg: cannot be read as an image"):
        data[[Sample(0, 0)]]
