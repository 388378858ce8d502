"""Datasets over an index: random clips to train on, whole videos to test on.

An item of either is a function of the video and of numbers that come with the request, never of
the worker that happens to serve it.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from i3d_gn.data.batches import ClipBatch, Sample, Stream
from i3d_gn.data.clips import clip_indices, random_start, spaced_starts, union_of_clips
from i3d_gn.data.transforms import evaluation_crops, random_crop_plan
from i3d_gn.video_io.decode import VideoDecodeError, decode_frames
from i3d_gn.video_io.index import VideoIndex


class RandomClips(Dataset[ClipBatch]):
    """Random clips with the training augmentation, a micro-batch at a time.

    An item's key is a list of `Sample`s. Clip start, scale, crop and flip of a sample come from a
    generator seeded by (seed, stream, *salt, position), so that two runs see the same clips
    whatever their workers.

    Args:
        index: The videos.
        num_frames, stride: Frames of a clip, and from one to the next.
        short_side: Smallest and largest short side a frame is resized to, in pixels.
        crop_size: Side of the square cut from it, in pixels.
        flip_probability: Of a horizontal flip.
        backend: Decoder, see `decode_frames`.
        seed, stream, salt: What seeds the draws, besides the position.
    """

    def __init__(
        self,
        index: VideoIndex,
        *,
        num_frames: int,
        stride: int,
        short_side: tuple[int, int],
        crop_size: int,
        flip_probability: float,
        backend: Literal["pyav", "decord"],
        seed: int,
        stream: Stream,
        salt: int = 0,
    ) -> None:
        self.index = index
        self.num_frames = num_frames
        self.stride = stride
        self.short_side = short_side
        self.crop_size = crop_size
        self.flip_probability = flip_probability
        self.backend: Literal["pyav", "decord"] = backend
        self.seed = seed
        self.stream = stream
        self.salt = salt

    def __len__(self) -> int:
        """Number of videos."""
        return len(self.index)

    def __getitem__(self, samples: Sequence[Sample]) -> ClipBatch:
        """The clips of `samples`, in their order; broken ones are left out and named."""
        size = self.crop_size
        clips = torch.empty(len(samples), self.num_frames, size, size, 3, dtype=torch.uint8)
        labels: list[int] = []
        broken: list[str] = []
        for sample in samples:
            try:
                self._decode(sample, out=clips[len(labels)].numpy())
            except VideoDecodeError as error:
                broken.append(str(error))
            else:
                labels.append(int(self.index.labels[sample.video]))
        if not labels:  # the network still runs: in DDP the other processes wait for it
            blank = torch.zeros_like(clips[:1])
            return ClipBatch(
                blank, torch.zeros(1, dtype=torch.int64), torch.zeros(1), tuple(broken)
            )
        return ClipBatch(
            clips[: len(labels)], torch.tensor(labels), torch.ones(len(labels)), tuple(broken)
        )

    def _decode(self, sample: Sample, *, out: np.ndarray) -> None:
        rng = np.random.default_rng((self.seed, self.stream, self.salt, sample.position))
        index, video = self.index, sample.video
        length = int(index.num_frames[video])
        start = random_start(length, num_frames=self.num_frames, stride=self.stride, rng=rng)
        plan = random_crop_plan(
            int(index.heights[video]),
            int(index.widths[video]),
            short_side=self.short_side,
            crop_size=self.crop_size,
            flip_probability=self.flip_probability,
            rng=rng,
        )
        indices = clip_indices(
            start, num_frames=self.num_frames, stride=self.stride, video_length=length
        )
        with index.file_of(video) as path:
            decode_frames(path, indices, plan=plan, backend=self.backend, out=out)


class TestVideo(NamedTuple):
    """All that a network needs to test one video.

    frames: uint8 (U, H, W, 3), each needed frame once. clips: int64 (clips, T), rows of numbers
    into `frames`. crops: (top, left, height, width) in pixels, applied to every clip.
    broken: why there are no frames, or None.
    """

    __test__ = False

    video: int
    label: int
    frames: torch.Tensor
    clips: torch.Tensor
    crops: tuple[tuple[int, int, int, int], ...]
    broken: str | None


class TestVideos(Dataset[TestVideo]):
    """Videos with the frames of their evenly spaced clips, each decoded once.

    Args:
        index: The videos.
        num_clips, num_frames, stride, spacing: See `spaced_starts`.
        align_starts: Move each start back to a multiple of `stride`. Clips then share more frames,
            at stride 2 about half of them need no decoding; not what the paper does.
        short_side: Of the resized frame, in pixels.
        spatial: "full" | "three_crop" | "center", see `evaluation_crops`.
        crop_size: Side of the crops of the last two, in pixels.
        backend: Decoder, see `decode_frames`.
    """

    __test__ = False

    def __init__(
        self,
        index: VideoIndex,
        *,
        num_clips: int,
        num_frames: int,
        stride: int,
        spacing: Literal["nonlocal", "uniform", "slowfast"],
        align_starts: bool,
        short_side: int,
        spatial: Literal["full", "three_crop", "center"],
        crop_size: int,
        backend: Literal["pyav", "decord"],
    ) -> None:
        self.index = index
        self.num_clips = num_clips
        self.num_frames = num_frames
        self.stride = stride
        self.spacing: Literal["nonlocal", "uniform", "slowfast"] = spacing
        self.align_starts = align_starts
        self.short_side = short_side
        self.spatial: Literal["full", "three_crop", "center"] = spatial
        self.crop_size = crop_size
        self.backend: Literal["pyav", "decord"] = backend

    def __len__(self) -> int:
        """Number of videos."""
        return len(self.index)

    def __getitem__(self, video: int) -> TestVideo:
        """Video number `video` of the index."""
        index = self.index
        label = int(index.labels[video])
        length = int(index.num_frames[video])
        starts = spaced_starts(
            length,
            num_clips=self.num_clips,
            num_frames=self.num_frames,
            stride=self.stride,
            spacing=self.spacing,
        )
        if self.align_starts:
            starts = starts - starts % max(1, self.stride)
        clips = np.stack(
            [
                clip_indices(
                    int(start), num_frames=self.num_frames, stride=self.stride, video_length=length
                )
                for start in starts
            ]
        )
        unique, inverse = union_of_clips(clips)
        plan, crops = evaluation_crops(
            int(index.heights[video]),
            int(index.widths[video]),
            short_side=self.short_side,
            mode=self.spatial,
            crop_size=None if self.spatial == "full" else self.crop_size,
        )
        try:
            with index.file_of(video) as path:
                frames = decode_frames(path, unique, plan=plan, backend=self.backend)
        except VideoDecodeError as error:
            none = torch.empty(0, dtype=torch.uint8)
            return TestVideo(video, label, none, none, (), str(error))
        return TestVideo(
            video, label, torch.from_numpy(frames), torch.from_numpy(inverse), tuple(crops), None
        )
