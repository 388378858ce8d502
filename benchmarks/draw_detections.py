"""Draw detections in COCO's results format on their images: boxes, masks, classes, scores.

    python benchmarks/draw_detections.py data/coco_shapes/val.json data/coco_shapes/val \
        runs/shapes/gn_1/detections.json detections.jpg --num 6

Detections with a score of at least 0.5; ground truth is not drawn.
"""

import argparse
from pathlib import Path

import torch
from pycocotools.coco import COCO
from torchvision.io import ImageReadMode, decode_image, write_jpeg
from torchvision.transforms.v2.functional import resize
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("annotations", help="JSON of the images")
    parser.add_argument("images", type=Path, help="their folder")
    parser.add_argument("detections", help="JSON of the results")
    parser.add_argument("out", help="JPEG to write")
    parser.add_argument("--num", type=int, default=6, help="how many images (default: %(default)s)")
    parser.add_argument("--scale", type=int, default=4, help="enlargement (default: %(default)s)")
    args = parser.parse_args()
    coco = COCO(args.annotations)
    results = coco.loadRes(args.detections)
    names = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
    drawn = []
    for image in coco.loadImgs(sorted(coco.getImgIds())[: args.num]):
        picture = decode_image(str(args.images / image["file_name"]), ImageReadMode.RGB)
        size = [args.scale * side for side in picture.shape[1:]]
        picture = resize(picture, size)
        found = [r for r in results.imgToAnns[image["id"]] if r["score"] >= 0.5]
        if found:
            masks = torch.stack([torch.from_numpy(results.annToMask(r)) for r in found])
            boxes = args.scale * torch.tensor([r["bbox"] for r in found])
            boxes[:, 2:] += boxes[:, :2]
            labels = [f"{names[r['category_id']]} {r['score']:.2f}" for r in found]
            picture = draw_segmentation_masks(picture, resize(masks, size) > 0, alpha=0.5)
            picture = draw_bounding_boxes(picture, boxes, labels, colors="white")
        drawn.append(picture)
    write_jpeg(make_grid(drawn, nrow=3), args.out, quality=85)


if __name__ == "__main__":
    main()
