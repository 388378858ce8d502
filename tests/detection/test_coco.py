import json
import logging
import shutil

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from i3d_gn.data.batches import Sample
from i3d_gn.detection.coco import (
    CocoImages,
    TestCoco,
    TrainingCoco,
    average_precision,
    coco_records,
)


@pytest.fixture(scope="module")
def val(shapes):
    return CocoImages(str(shapes / "val"), str(shapes / "val.json"))


@pytest.fixture
def broken(shapes, tmp_path):
    """Makes a copy of the validation set with changed annotations."""

    def make(change):
        shutil.copytree(shapes / "val", tmp_path / "val")
        content = json.loads((shapes / "val.json").read_text())
        change(content)
        (tmp_path / "val.json").write_text(json.dumps(content))
        return str(tmp_path / "val"), str(tmp_path / "val.json")

    return make


def perfect(images):
    """Detections that equal the annotations, through the format that a network returns."""
    records = []
    for image_id in images.image_ids:
        target = images.targets(image_id)
        detections = {
            "boxes": target["boxes"],
            "labels": target["labels"],
            "scores": torch.ones(len(target["labels"])),
            "masks": target["masks"][:, None].float(),
        }
        records += coco_records(image_id, detections, images.category_ids)
    return records


def test_perfect_detections_have_an_ap_of_100(val):
    values = average_precision(val, perfect(val))
    assert values["box_ap"] == values["mask_ap"] == pytest.approx(100)
    assert values["box_ap50"] == values["mask_ap50"] == pytest.approx(100)
    assert values["box_ap_large"] == -1  # no object is larger than 96 x 96 pixels


def test_known_errors_have_the_ap_worked_out_by_hand(val):
    records = perfect(val)
    # Boxes shrunk to 3/4 of their area have IoU 0.75: right at 0.5, 0.55, ..., 0.75 and not above.
    for record in records:
        record["bbox"][2] *= 0.7501
    values = average_precision(val, records)
    assert values["box_ap"] == pytest.approx(100 * 6 / 10)
    assert values["box_ap75"] == pytest.approx(100)
    assert values["mask_ap"] == pytest.approx(100)
    # The last detections of a class are missed: recall r gives the share of the 101 points up to r.
    category = val.category_ids[0]
    of_class = [r for r in records if r["category_id"] == category]
    kept = len(of_class) - 1
    missed = [r for r in records if r is not of_class[-1]]
    values = average_precision(val, missed)
    points = np.count_nonzero(np.linspace(0, 1, 101) <= kept / len(of_class) + 1e-9)
    assert values["box_ap50"] == pytest.approx(100 * (points / 101 + 2) / 3)
    # Wrong classes everywhere: no detection is right.
    ids = val.category_ids
    for record in records:
        record["category_id"] = ids[(ids.index(record["category_id"]) + 1) % 3]
    assert average_precision(val, records)["box_ap50"] < 40
    assert average_precision(val, [])["box_ap"] == 0


def test_detections_in_a_crowd_are_not_counted(val):
    crowds = [a for a in val.coco.anns.values() if a["iscrowd"]]
    assert crowds
    rle = val.coco.annToRLE(crowds[0])
    false = {
        "image_id": crowds[0]["image_id"],
        "category_id": crowds[0]["category_id"],
        "bbox": crowds[0]["bbox"],
        "score": 2.0,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
    }
    values = average_precision(val, [false, *perfect(val)])
    assert values["box_ap"] == values["mask_ap"] == pytest.approx(100)
    elsewhere = {**false, "bbox": [0, 0, 3, 3]}
    assert average_precision(val, [elsewhere, *perfect(val)])["box_ap"] < 100


def test_targets_equal_the_annotations(val):
    image_id = next(i for i in val.image_ids if len(val.objects[i]) > 1)
    target = val.targets(image_id)
    for box, label, mask, annotation in zip(
        target["boxes"], target["labels"], target["masks"], val.objects[image_id], strict=True
    ):
        x, y, w, h = annotation["bbox"]
        assert box.tolist() == pytest.approx([x, y, x + w, y + h], rel=1e-6)
        assert val.category_ids[label - 1] == annotation["category_id"]
        assert mask.sum() == pytest.approx(annotation["area"], rel=0.2)
        ys, xs = np.nonzero(mask.numpy())
        assert xs.min() == pytest.approx(x, abs=1.5)
        assert ys.max() == pytest.approx(y + h, abs=1.5)


def test_generated_shapes_cover_the_pixels_of_their_masks(val):
    for image_id in val.image_ids:
        (pixels,) = TestCoco(val)[[Sample(0, val.image_ids.index(image_id))]].images
        masks = [val.coco.annToMask(a) for a in val.coco.imgToAnns[image_id]]
        expected = np.any(masks, axis=0) if masks else np.zeros(pixels.shape[1:], dtype=bool)
        assert np.array_equal(pixels.amin(0).numpy() >= 120, expected)  # noise is below 90


def test_flips_are_a_function_of_the_position(val):
    examples = TrainingCoco(val, seed=3)
    assert all(val.objects[i] for i in examples.image_ids)
    assert len(examples) < len(val)
    item = 1
    image_id = examples.image_ids[item]
    (plain,) = TestCoco(val)[[Sample(0, val.image_ids.index(image_id))]].images
    expected = val.targets(image_id)
    flips = []
    for position in range(8):
        batch = examples[[Sample(position, item)]]
        again = examples[[Sample(99, 0), Sample(position, item)]]
        assert torch.equal(batch.images[0], again.images[1])
        flipped = not torch.equal(batch.images[0], plain)
        flips.append(flipped)
        wanted = plain.flip(-1) if flipped else plain
        assert torch.equal(batch.images[0], wanted)
        masks, boxes = batch.targets[0]["masks"], batch.targets[0]["boxes"]
        assert torch.equal(masks, expected["masks"].flip(-1) if flipped else expected["masks"])
        x1, y1, x2, y2 = expected["boxes"].T
        width = plain.shape[-1]
        mirrored = torch.stack([width - x2, y1, width - x1, y2], dim=1)
        torch.testing.assert_close(boxes, mirrored if flipped else expected["boxes"])
        assert type(boxes) is type(masks) is torch.Tensor
    assert True in flips
    assert False in flips


def test_objects_that_cannot_be_trained_on_are_counted(broken, caplog):
    def change(content):
        plain = [a for a in content["annotations"] if not a["iscrowd"]]
        plain[0]["bbox"] = [200, 10, 5, 5]
        plain[1]["segmentation"] = []
        plain[2]["segmentation"] = [[1.0, 1.0, 5.0, 5.0]]
        plain[3]["segmentation"] = {"size": [64, 64], "counts": [64 * 64]}
        plain[4]["bbox"] = [-10, -10, 30, 30]  # partly outside: clipped

    with caplog.at_level(logging.INFO):
        images = CocoImages(*broken(change))
    crowds = sum(a["iscrowd"] for a in images.coco.anns.values())
    assert f"{crowds} crowds" in caplog.text
    assert "1 boxes outside their image" in caplog.text
    assert "3 empty masks" in caplog.text
    assert sum(map(len, images.objects.values())) == len(images.coco.anns) - crowds - 4
    clipped = next(a for a in images.coco.anns.values() if a["bbox"][0] == -10)
    target = images.targets(clipped["image_id"])
    assert [0.0, 0.0, 20.0, 20.0] in target["boxes"].tolist()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda c: c["annotations"][0].update(category_id=99), "category 99, which is not in"),
        (lambda c: c["annotations"][0].update(image_id=99), "image 99, which is not in"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"bbox \[1, 2, 3\]; expected"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]), "bbox .*nan"),
        (lambda c: c["annotations"][0].update(segmentation=5), "neither polygons nor RLE"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "gone.png: image not found, as 1"),
        (lambda c: c["images"][0].pop("height"), "image 1 lacks file_name, height or width"),
        (lambda c: c.pop("images"), "not annotations in COCO's format|0 images"),
        (lambda c: c.update(annotations=[]), "0 annotations; expected at least one"),
    ],
)
def test_wrong_annotations_are_one_line_errors(broken, change, line):
    folder, annotations = broken(change)
    with pytest.raises(ValueError, match=line) as caught:
        CocoImages(folder, annotations)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_annotations_are_one_line_errors(shapes, tmp_path):
    path = tmp_path / "x.json"
    for text in ("{", "[]", '{"images": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="COCO's format|expected at least one"):
            CocoImages(str(shapes / "val"), str(path))
    with pytest.raises(ValueError, match="annotations not found"):
        CocoImages(str(shapes / "val"), str(tmp_path / "missing.json"))


def test_broken_images_are_one_line_errors(broken):
    folder, annotations = broken(lambda c: c["images"][1].update(width=65))
    images = CocoImages(folder, annotations)
    with pytest.raises(ValueError, match=r"has 64x64 pixels, but .* says 65x64; replace it"):
        TestCoco(images)[[Sample(0, 1)]]
    path = images.path(images.image_ids[0])
    with open(path, "wb") as file:
        file.write(b"\x89PNG")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        TestCoco(images)[[Sample(0, 0)]]


def test_results_are_read_by_pycocotools(val):
    record = perfect(val)[0]
    image = val.coco.imgs[record["image_id"]]
    assert record["segmentation"]["size"] == [image["height"], image["width"]]
    mask = mask_utils.decode(json.loads(json.dumps(record))["segmentation"])
    target = val.targets(record["image_id"])
    assert np.array_equal(mask, target["masks"][0].numpy())
