"""Datasets over a video index: random clips for training, whole videos for testing.

An item is a function of the video and of the numbers in the request, never of the worker that
serves it.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from i3d_gn.data.batches import Batch, Sample, Stream
from i3d_gn.data.clips import clip_indices, random_start, spaced_starts, union_of_clips
from i3d_gn.data.transforms import evaluation_crops, rand_augment, random_crop_plan
from i3d_gn.video_io.decode import VideoDecodeError, decode_frames
from i3d_gn.video_io.index import VideoIndex, VideoSource
from i3d_gn.video_io.video_files import VideoFiles


class RandomClips(Dataset[Batch]):
    """Random clips with the training augmentation, one micro-batch at a time.

    The key of an item is a list of `Sample`s. Start, scale, crop and flip of a clip come from a
    generator seeded by (seed, stream, salt, position), so that two runs see the same clips whatever
    their workers and ranks.

    Args:
        index: The videos.
        num_frames: Frames per clip, T.
        stride: Frames of the video from one frame of the clip to the next.
        short_side: Smallest and largest short side that frames are resized to, in pixels.
        crop_size: Side of the square crop, in pixels.
        flip_probability: Of a horizontal flip.
        backend: Decoder, see `decode_frames`.
        seed, stream, salt: Seed of the random numbers, together with the position.
        rand_augment: Magnitude of `transforms.rand_augment`, 0 for none.
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
        rand_augment: int = 0,
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
        self.rand_augment = rand_augment

    def __len__(self) -> int:
        """Number of videos."""
        return len(self.index)

    def __getitem__(self, samples: Sequence[Sample]) -> Batch:
        """The clips of `samples`, in order; those that fail to decode are skipped and reported."""
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
                labels.append(int(self.index.labels[sample.item]))
        if not labels:  # the network still runs on a blank clip: in DDP the other ranks wait for it
            return self.skipped(samples, "")._replace(broken=tuple(broken))
        return Batch(
            clips[: len(labels)], torch.tensor(labels), torch.ones(len(labels)), tuple(broken)
        )

    def split(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """One key per sample, see `i3d_gn.data.loader.Containable`."""
        return [[sample] for sample in samples]

    def merge(self, batches: Sequence[Batch]) -> Batch:
        """One batch of several, without their blank clips unless there is nothing else."""
        kept = [b for b in batches if b.weights.any()] or [*batches[:1]]
        return Batch(
            torch.cat([b.inputs for b in kept]),
            torch.cat([b.labels for b in kept]),
            torch.cat([b.weights for b in kept]),
            tuple(line for b in batches for line in b.broken),
        )

    def skipped(self, samples: Sequence[Sample], reason: str) -> Batch:
        """The blank batch that stands for samples that cannot be loaded."""
        size = self.crop_size
        blank = torch.zeros(1, self.num_frames, size, size, 3, dtype=torch.uint8)
        broken = tuple(f"{self.describe([sample])}: {reason}" for sample in samples)
        return Batch(blank, torch.zeros(1, dtype=torch.int64), torch.zeros(1), broken)

    def describe(self, samples: Sequence[Sample]) -> str:
        """Paths of the videos."""
        return ", ".join(self.index.paths[sample.item] for sample in samples)

    def num_bytes(self, samples: Sequence[Sample]) -> int:
        """Bytes of the clips."""
        return len(samples) * self.num_frames * self.crop_size**2 * 3

    def _decode(self, sample: Sample, *, out: np.ndarray) -> None:
        rng = np.random.default_rng((self.seed, self.stream, self.salt, sample.position))
        index, video = self.index, sample.item
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
            size = (int(index.heights[video]), int(index.widths[video]))
            decode_frames(path, indices, plan=plan, size=size, backend=self.backend, out=out)
        if self.rand_augment:
            rand_augment(out, magnitude=self.rand_augment, rng=rng)


class TestVideo(NamedTuple):
    """Everything a network needs to test one video.

    Attributes:
        video: Number of the video in the index.
        label: Its class, -1 if unknown.
        frames: uint8 (U, H, W, 3), each frame that any clip needs once.
        clips: int64 (num_clips, T), positions in `frames`.
        crops: (top, left, height, width) in pixels, applied to every clip.
        broken: Why there are no frames, or None.
    """

    __test__ = False

    video: int
    label: int
    frames: torch.Tensor
    clips: torch.Tensor
    crops: tuple[tuple[int, int, int, int], ...]
    broken: str | None


class TestVideos(Dataset[TestVideo]):
    """Videos with the frames of their evenly spaced test clips, each frame decoded once.

    Args:
        index: The videos, indexed or not.
        num_clips, num_frames, stride, spacing: See `spaced_starts`.
        align_starts: Round each start down to a multiple of `stride`. Clips then share more frames,
            and at stride 2 only about half as many need decoding; the paper does not do this.
        short_side: Short side that frames are resized to, in pixels.
        spatial: "full" | "three_crop" | "center", see `evaluation_crops`.
        crop_size: Side of the crops of "three_crop" and "center", in pixels.
        backend: Decoder, see `decode_frames`.
    """

    __test__ = False

    def __init__(
        self,
        index: VideoIndex | VideoFiles,
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
        try:
            with self.index.source_of(video) as source:
                return self._load(video, source)
        except VideoDecodeError as error:
            return self._broken(video, str(error))

    def _load(self, video: int, source: VideoSource) -> TestVideo:
        starts = spaced_starts(
            source.num_frames,
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
                    int(start),
                    num_frames=self.num_frames,
                    stride=self.stride,
                    video_length=source.num_frames,
                )
                for start in starts
            ]
        )
        unique, inverse = union_of_clips(clips)
        plan, crops = evaluation_crops(
            source.height,
            source.width,
            short_side=self.short_side,
            mode=self.spatial,
            crop_size=None if self.spatial == "full" else self.crop_size,
        )
        size = (source.height, source.width)
        frames = decode_frames(source.path, unique, plan=plan, size=size, backend=self.backend)
        return TestVideo(
            video,
            int(self.index.labels[video]),
            torch.from_numpy(frames),
            torch.from_numpy(inverse),
            tuple(crops),
            None,
        )

    def split(self, video: int) -> list[int]:
        """A video is loaded whole, see `i3d_gn.data.loader.Containable`."""
        return [video]

    def merge(self, videos: Sequence[TestVideo]) -> TestVideo:
        """The one video."""
        (video,) = videos
        return video

    def skipped(self, video: int, reason: str) -> TestVideo:
        """What stands for a video that cannot be loaded."""
        return self._broken(video, f"{self.describe(video)}: {reason}")

    def _broken(self, video: int, reason: str) -> TestVideo:
        none = torch.empty(0, dtype=torch.uint8)
        return TestVideo(video, int(self.index.labels[video]), none, none, (), reason)

    def describe(self, video: int) -> str:
        """Path of the video."""
        return self.index.paths[video]

    def num_bytes(self, video: int) -> int:
        """Bytes of the frames, as if no two clips shared one."""
        index, frames = self.index, self.num_clips * self.num_frames
        if isinstance(index, VideoFiles):
            return frames * 3 * self.short_side**2 * 16 // 9  # not probed yet
        height, width = int(index.heights[video]), int(index.widths[video])
        frames = min(int(index.num_frames[video]), frames)
        return frames * 3 * self.short_side**2 * max(height, width) // min(height, width)
